"""Pairs of noise and image from a teacher's own ODE, for distilling it or straightening it (arXiv 2209.03003).

Kept with each shard: teacher hash, prediction and rule, CFG scale, solver, steps, negative prompt; with each pair: the exact
noise, the caption, and chosen points of the trajectory. A shard is whole or absent, and a function of its number alone: any
number of processes makes the same bytes, and an interrupted run continues.
"""

import io
import json
import zlib
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from dedistill.data.pairs import BLOCK, FACTS, HEADER, ROWS, Shard, archive, differing, open_shard, padded
from dedistill.distributed.world import World
from dedistill.errors import UserError, amount
from dedistill.flow import keyed
from dedistill.flow.solvers import sigma_grid
from dedistill.io.atomic import WholeFile, checksummed, read_checksummed, replace_file
from dedistill.io.ownership import claim, hold
from dedistill.models.family import prediction_facts
from dedistill.models.model import Model
from dedistill.sampling.sampler import Sampling, trajectories

SATURATED = 3.0
"""A pair is left out whose image is so many times as strong (rms) as the median of its shard."""


class HasPrompts(Protocol):
    @property
    def name(self) -> str: ...

    def prompts(self, seed: int, count: int) -> list[str]: ...


def make_pairs(
    model: Model,
    source: HasPrompts,
    out: Path,
    *,
    teacher: str,
    count: int,
    sampling: Sampling,
    points: int,
    seed: int,
    shard_size: int,
    until: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    world: World | None = None,
) -> dict[str, Any]:
    """Write ``count`` pairs into ``out`` and return its facts (also ``pairs.json``). All processes of ``world`` must come here.

    points: windows between stored states, so points + 1 states, the noise first and the image last; must divide
    ``sampling``'s steps. until: of ``count``, only the first so many, of whole shards. progress: pairs that are there about
    now, and all. Raises UserError when ``out`` holds pairs made differently, or what is not ours, or while another works there.
    """
    world = world or World()
    if sampling.steps % points:
        how = f"--points {points} does not divide --steps {sampling.steps}"
        raise UserError(f"{how}: only states of the solver are stored", exit_code=2)
    prompts = source.prompts(seed, count)
    assert len(prompts) == count, f"source '{source.name}' gave {len(prompts)} prompts, {count} were asked for"
    facts = _facts(model, prompts, teacher, sampling, points) | {
        "seed": seed,
        "count": count,
        "shard_size": shard_size,
        "source": source.name,
    }
    world.assert_equal_on_all_ranks(facts)
    count = until or count
    numbers = range(-(-count // shard_size))
    if world.main:
        claim(out, "pairs", "--out")
    lock = hold(out, "--out") if world.main else None
    try:
        missing = world.broadcast_object(_missing(out, facts, numbers) if world.main else [])
        if missing and world.main:
            replace_file(out / FACTS, checksummed({**facts, "shards": [], "complete": False}))
        done = count - shard_size * len(missing)
        for number in missing[world.rank :: world.size]:
            ids = range(number * shard_size, min(count, (number + 1) * shard_size))
            _make_shard(model, out, number, ids, prompts[ids.start : ids.stop], sampling, facts)
            done += shard_size * world.size
            progress(max(0, min(done, count)), count)
        world.wait()
        if world.main:
            shards = [_entry(open_shard(shard_file(out, n))) for n in numbers]
            facts = {**facts, "shards": shards, "complete": True}
            if missing or not _same(out, facts):
                replace_file(out / FACTS, checksummed(facts))
        return world.broadcast_object(facts)
    finally:
        if lock:
            lock.close()


def _facts(model: Model, prompts: Sequence[str], teacher: str, sampling: Sampling, points: int) -> dict[str, Any]:
    """All that decides what a pair is, but its place."""
    how, sigmas = sampling.facts, sigma_grid(sampling.steps, model.grid_shift)
    return {
        "teacher": teacher,
        "cfg": how["cfg"],
        **{key: how[key] for key in ("skip", "method") if how.get(key)},
        "solver": sampling.solver,
        "steps": sampling.steps,
        "shift": model.grid_shift,
        "negative_prompt": model.negative,
        "prompts": sha256("\0".join(prompts).encode()).hexdigest(),
        "sigmas": sigmas[_stored(sampling.steps, points)].tolist(),
        "image": list(model.components.sample_shape),
        # what a codec made is known to 16 bits at most; pixels are the data themselves
        "dtype": "float16" if model.components.vae else "float32",
        **prediction_facts(model.family.spec, model.components),
    }


def _stored(steps: int, points: int) -> np.ndarray:
    return np.arange(0, steps + 1, steps // points)


def teacher_hash(model: Model) -> str:
    """Hash of the network's weights and of the trained part, so that pairs name the model that made them."""
    digest = sha256()
    for tensors in (dict(model.components.denoiser.state_dict()), model.tensors(copy=False)):
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --- which shards are there ------------------------------------------------------------------------------------------


def shard_file(out: Path, number: int) -> Path:
    return out / f"{number:05d}.tar"


def _missing(out: Path, facts: dict[str, Any], numbers: range) -> list[int]:
    """Shards that are not there, or not whole. Raises UserError for pairs that were made differently."""
    way_out = "Delete it or choose another --out."
    try:
        before = read_checksummed(out / FACTS)
    except (OSError, ValueError):  # nothing yet, or damaged: what was made tells how
        before = facts
    if listed := differing(before, facts):
        raise UserError(f"'{out}' holds pairs made differently ({listed}). {way_out}")
    tables = {entry["file"]: entry["sha256"] for entry in before.get("shards", ())}
    missing = []
    for number in numbers:
        place = shard_file(out, number)
        try:
            shard = open_shard(place)
            whole = tables.get(place.name, shard.sha256) == shard.sha256 and shard.is_whole()
        except (OSError, ValueError):
            missing.append(number)
            continue
        if listed := differing(shard.header["facts"], facts):
            raise UserError(f"'{place}' holds pairs made differently ({listed}). {way_out}")
        if not whole:
            missing.append(number)
    return missing


def _entry(shard: Shard) -> dict[str, Any]:
    left_out = len(shard.header["quarantined"])
    entry = {"file": shard.path.name, "pairs": len(shard.rows), "sha256": shard.sha256}
    return entry | ({"quarantined": left_out} if left_out else {})


def _same(out: Path, facts: dict[str, Any]) -> bool:
    try:
        return read_checksummed(out / FACTS) == facts
    except (OSError, ValueError):
        return False


# --- one shard -------------------------------------------------------------------------------------------------------


def _make_shard(
    model: Model, out: Path, number: int, ids: range, captions: list[str], sampling: Sampling, facts: dict[str, Any]
) -> None:
    dtype = getattr(torch, facts["dtype"])
    noise = keyed.noise(facts["seed"], "pairs", 0, ids, model.components.sample_shape).to(dtype).float()  # stored exactly
    kept = _stored(sampling.steps, len(facts["sigmas"]) - 1)
    states = torch.cat([torch.stack([c[k] for k in kept], 1) for c in trajectories(model, captions, noise, sampling)])
    bad, middle = quarantine(states, dtype)
    if 2 * len(bad) > len(ids):
        raise UserError(
            f"shard {number}: {amount(len(bad), 'pair')} of {len(ids)} cannot be used, e.g. pair {ids[min(bad)]}: "
            f"{bad[min(bad)]}. The teacher is damaged, or --cfg {facts['cfg']:g} is more than it can follow"
        )
    good = [i for i in range(len(ids)) if i not in bad]
    stored = states[good].to(dtype)
    error = stored.float() - states[good]
    account = {
        "facts": facts,
        "number": number,
        "quarantined": {str(ids[i]): why for i, why in bad.items()},
        "median_rms": middle,
        "rounding": {"rms": _rms(error) / max(_rms(states[good]), 1e-30), "most": float(error.abs().max())},
    }
    write_shard(shard_file(out, number), account, [ids[i] for i in good], [captions[i] for i in good], stored)


def quarantine(states: Tensor, dtype: torch.dtype) -> tuple[dict[int, str], float]:
    """Rows of ``states`` [N, K + 1, C, H, W] that nothing should be trained on, and why; the median rms of the images."""
    fits = (states.abs() <= torch.finfo(dtype).max).flatten(1).all(1)  # nothing is less than NaN
    strength = states[:, -1].double().flatten(1).square().mean(1).sqrt()
    middle = float(strength[fits].median()) if fits.any() else 0.0
    bad = dict.fromkeys((~fits).nonzero().flatten().tolist(), "not finite")
    strong = (fits & (strength > SATURATED * middle)).nonzero().flatten().tolist()
    bad |= {i: f"saturated: its rms is {float(strength[i]):.3g}, the shard's median {middle:.3g}" for i in strong}
    return bad, middle


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def write_shard(path: Path, account: dict[str, Any], ids: list[int], captions: list[str], states: Tensor) -> None:
    """account: what the header is to say; it is told how many pairs there are, and how large."""
    arrays, texts = [_npy(row.numpy()) for row in states], [caption.encode() for caption in captions]
    sums = [zlib.crc32(text, zlib.crc32(array)) for array, text in zip(arrays, texts, strict=True)]
    front, size = front_of(account, ids, len(arrays[0]), [len(text) for text in texts], sums)
    # fixed owner, mode and time: the same pairs give the same bytes
    with WholeFile(path) as file, wds.TarWriter(file, mtime=0, user="dedistill", group="dedistill") as tar:
        for name, data in front.items():
            key, _, ext = name.partition(".")
            tar.write({"__key__": key, ext: data})
        for i, text, array in zip(ids, texts, arrays, strict=True):
            tar.write({"__key__": f"{i:08d}", "states.npy": array, "txt": text})
    if path.stat().st_size != size:
        raise RuntimeError(f"'{path}' has {path.stat().st_size} bytes, {size} were laid out")


def front_of(
    account: dict[str, Any], ids: Sequence[int], state_bytes: int, text_bytes: Sequence[int], sums: Sequence[int]
) -> tuple[dict[str, bytes], int]:
    """The first two members of a shard, by name, and the bytes of the whole file."""
    members = np.array([padded(state_bytes) + padded(size) for size in text_bytes], np.int64)
    rows = np.stack([np.array(ids, np.int64), np.cumsum(members) - members, text_bytes, sums], 1)
    about = json.dumps({**account, "pairs": len(ids), "state_bytes": state_bytes})
    first = padded(len(about)) + padded(len(_npy(rows)))
    rows[:, 1] += first + BLOCK
    return {HEADER: about.encode(), ROWS: _npy(rows)}, archive(first + int(members.sum()))


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
