"""Everything that is saved, as a flow: prepare, save, read back. Faults are injected into the saving."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from averages import lerp_snapshots

from dedistill.data.cache import Store
from dedistill.data.images.index import Entry, Index, Limits, Sample
from dedistill.data.images.types import NOWHERE, ImageSet
from dedistill.io.atomic import replace_json, whole_folder, write_synced
from dedistill.posthoc.snapshots import find_snapshots, write_snapshot
from dedistill.runs.checkpoint import newest_valid, read_checkpoint, save_checkpoint
from dedistill.runs.metrics import JsonlWriter


@dataclass(frozen=True)
class Flow:
    """``read`` gives ``old`` after ``prepare``, ``new`` after ``save``, and ``old`` or ``new`` whatever befalls ``save``."""

    prepare: Callable[[Path], object]
    save: Callable[[Path], object]
    read: Callable[[Path], Any]
    old: Any
    new: Any


def group(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"trainable": {"w": torch.full((8,), value)}, "optimizer": {"w/exp_avg": torch.full((8,), -value)}}


def put(disk: Path, step: int) -> None:
    save_checkpoint(disk / "run" / "checkpoints", step, group(step), {"skipped": 0}, keep=2)


def loaded(disk: Path) -> int | None:
    """The step that would be continued from, after checking that all of it is of that step."""
    newest, _ = newest_valid(disk / "run" / "checkpoints")
    if newest is None:
        return None
    groups, manifest = read_checkpoint(newest)
    assert torch.equal(groups["trainable"]["w"], torch.full((8,), float(manifest["step"])))
    assert torch.equal(groups["optimizer"]["w/exp_avg"], torch.full((8,), -float(manifest["step"])))
    return manifest["step"]


def _checkpoints(*before: int) -> Flow:
    return Flow(lambda d: [put(d, s) for s in before], lambda d: put(d, 30), loaded, before[-1] if before else None, 30)


def _snapshot(disk: Path, step: int) -> None:
    write_snapshot(disk / "snapshots", step, {"w": torch.full((4,), float(step))}, {"format": "pt"})


def _average(disk: Path, alpha: float) -> None:
    lerp_snapshots(find_snapshots(disk / "snapshots"), [alpha], disk / "posthoc")


def _read_averages(disk: Path) -> dict[str, list[float]]:
    from safetensors.torch import load_file

    return {p.stem: load_file(p)["w"].tolist() for p in (disk / "posthoc").glob("*.safetensors")}


def _export(disk: Path, step: int) -> None:
    with whole_folder(disk / "model") as folder:
        for name in ("weights", "config"):
            write_synced(folder / name, f"{name} {step}".encode())


def _read_export(disk: Path) -> int | None:
    if not (disk / "model").exists():
        return None
    texts = {p.name: p.read_text().split() for p in (disk / "model").iterdir()}
    assert texts.keys() == {"weights", "config"}, "a part of a folder"
    (step,) = {step for _, step in texts.values()}
    return int(step)


def _shard(disk: Path, value: int) -> None:
    store = Store(disk / "latents", {"vae": "x"})
    store.write({f"k{value}": {"latent": torch.full((4,), float(value))}})


def _read_store(disk: Path) -> list[int]:
    store = Store(disk / "latents", {"vae": "x"})
    assert store.damaged() == []
    there = [v for v in (1, 2) if f"k{v}" in store]
    assert all(store.read(f"k{v}")["latent"].tolist() == [v] * 4 for v in there)
    return there


def _journal(disk: Path, step: int) -> None:
    journal = JsonlWriter(disk / "metrics.jsonl", step - 1)
    journal.write({"step": step})
    journal.sync()
    journal.close()


def _read_journal(disk: Path) -> list[int]:
    JsonlWriter(disk / "metrics.jsonl", 9).close()
    return [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()]


def _index(disk: Path, caption: str) -> None:
    sample = Sample("s/a.png", (caption,), 8, 8, "0" * 64, 0, NOWHERE)
    Index([ImageSet("s")], Limits(), [Entry(sample, (), "")]).save(disk / "index.jsonl")


FLOWS = {
    "first checkpoint": _checkpoints(),
    "second checkpoint": _checkpoints(10),
    "later checkpoint": _checkpoints(10, 20),
    "plan, recipe, inputs": Flow(
        lambda d: replace_json(d / "plan.json", 1),
        lambda d: replace_json(d / "plan.json", 2),
        lambda d: json.loads((d / "plan.json").read_text()),
        *(1, 2),
    ),
    "snapshot": Flow(
        lambda d: _snapshot(d, 1),
        lambda d: _snapshot(d, 2),
        lambda d: sorted(p.name for p in (d / "snapshots").glob("*.safetensors")),
        ["step-00000001.safetensors"],
        ["step-00000001.safetensors", "step-00000002.safetensors"],
    ),
    "average": Flow(
        lambda d: (_snapshot(d, 1), _snapshot(d, 2)),
        lambda d: _average(d, 0.5),
        *(_read_averages, {}, {"alpha_linear_0.5": [1.5] * 4}),
    ),
    "model folder": Flow(lambda d: _export(d, 1), lambda d: _export(d, 2), _read_export, 1, 2),
    "cache shard": Flow(lambda d: _shard(d, 1), lambda d: _shard(d, 2), _read_store, [1], [1, 2]),
    "journal": Flow(lambda d: _journal(d, 1), lambda d: _journal(d, 2), _read_journal, [1], [1, 2]),
    "index": Flow(
        lambda d: _index(d, "old"),
        lambda d: _index(d, "new"),
        lambda d: Index.load(d / "index.jsonl").samples[0].captions,
        *(("old",), ("new",)),
    ),
}
MAY_BE_MADE_AGAIN = {"model folder"}
"""Killed between two renames it may be missing: it is then exported again."""
