"""Pairs of noise and image from a teacher's own ODE, for distilling it or straightening it (arXiv 2209.03003).

Kept with each set: CFG scale, solver, steps, negative prompt, teacher hash; with each pair: the exact noise, the
caption, and chosen points of the trajectory. Shards are whole or absent, so an interrupted run continues.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from dedistill.data.pairs import FACTS
from dedistill.data.source import Source
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.flow.solvers import sigma_grid
from dedistill.io.atomic import WholeFile, checksummed, read_checksummed, replace_file
from dedistill.io.hashing import file_sha256
from dedistill.io.ownership import claim
from dedistill.models.family import prediction_facts
from dedistill.models.model import Model
from dedistill.sampling.sampler import Sampling, trajectories


def make_pairs(
    model: Model,
    source: Source,
    out: Path,
    *,
    teacher: str,
    count: int,
    sampling: Sampling,
    points: int,
    seed: int,
    shard_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write ``count`` pairs into ``out`` and return its facts (also ``pairs.json``).

    points: windows between stored states, so points + 1 states, the noise first and the image last; must divide
    ``sampling``'s steps. Raises UserError when ``out`` holds pairs made differently, or what is not ours.
    """
    steps, how = sampling.steps, sampling.facts
    if steps % points:
        raise UserError(f"--points {points} does not divide --steps {steps}: only states of the solver are stored", exit_code=2)
    sigmas = sigma_grid(steps, model.grid_shift)
    stored = np.arange(0, steps + 1, steps // points)
    facts = {
        "teacher": teacher,
        "cfg": how["cfg"],
        **{key: how[key] for key in ("skip", "method") if how.get(key)},
        "solver": sampling.solver,
        "steps": steps,
        "shift": model.grid_shift,
        "negative_prompt": model.negative,
        "seed": seed,
        "count": count,
        "shard_size": shard_size,
        "sigmas": sigmas[stored].tolist(),
        "picture": list(model.components.sample_shape),
        "source": source.name,
        **prediction_facts(model.family.spec, model.components),
    }
    claim(out, "pairs", "--out")
    shards = _finished_shards(out, facts)
    prompts = source.prompts(seed, count)
    assert len(prompts) == count, f"source '{source.name}' gave {len(prompts)} prompts, {count} were asked for"
    for number in range(len(shards), -(-count // shard_size)):
        ids = range(number * shard_size, min(count, (number + 1) * shard_size))
        noise = keyed.noise(seed, "pairs", 0, ids, model.components.sample_shape)
        captions = prompts[ids.start : ids.stop]
        states = [torch.stack([c[k] for k in stored], 1) for c in trajectories(model, captions, noise, sampling)]
        shards.append(_write_shard(out, number, ids, captions, noise, torch.cat(states)))
        replace_file(out / FACTS, checksummed({**facts, "shards": shards, "complete": False}))
        progress(ids.stop, count)
    facts = {**facts, "shards": shards, "complete": True}
    replace_file(out / FACTS, checksummed(facts))
    return facts


def teacher_hash(model: Model) -> str:
    """Hash of the network's weights and of the trained part, so that pairs name the model that made them."""
    import hashlib

    digest = hashlib.sha256()
    for tensors in (dict(model.components.denoiser.state_dict()), model.tensors(copy=False)):
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _finished_shards(out: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Shards of an earlier run with the same settings whose bytes still agree."""
    try:
        before = read_checksummed(out / FACTS)
    except (OSError, ValueError):  # nothing yet, or damaged: shards are made again, byte for byte the same
        return []
    if differing := [k for k in facts if before.get(k) != facts[k]]:
        listed = "; ".join(f"{k}: {before.get(k)!r} there, {facts[k]!r} here" for k in differing)
        raise UserError(f"'{out}' holds pairs made differently ({listed}). Delete it or choose another --out.")
    good = []
    for shard in before["shards"]:
        path = out / shard["file"]
        if not path.exists() or file_sha256(path) != shard["sha256"]:
            break
        good.append(shard)
    return good


def _write_shard(out: Path, number: int, ids: range, captions: list[str], noise: Tensor, states: Tensor) -> dict[str, Any]:
    final = out / f"{number:05d}.tar"
    # fixed owner, mode and time: the same pairs give the same bytes
    with WholeFile(final) as file, wds.TarWriter(file, mtime=0.0, user="dedistill", group="dedistill") as tar:
        for i, caption, start, points in zip(ids, captions, noise, states, strict=True):
            tar.write({"__key__": f"{i:08d}", "txt": caption, "noise.npy": _npy(start), "trajectory.npy": _npy(points)})
    return {"file": final.name, "pairs": len(ids), "sha256": file_sha256(final)}


def _npy(tensor: Tensor) -> bytes:
    stream = io.BytesIO()
    np.save(stream, tensor.numpy(), allow_pickle=False)
    return stream.getvalue()
