"""A base in parts on all processes gives what whole bases give (docs/engines.md)."""

import json
import os
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_world import FEW, arguments, furthest, same, saved, train

from dedistill.train import main

ENVIRONMENT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What accelerate launch says of launch/fsdp2.yaml."""


def _sharded(given: list[str], work=main) -> int:
    os.environ |= ENVIRONMENT
    return work(given)


def shard(size: int, recipe: Path, out: Path, *settings: str, work=main) -> Path:
    """A run under FSDP2 on ``size`` processes that ends well."""
    said = out.parent / f"said-{out.name}"
    codes = run_ranks(size, _sharded, arguments(recipe, out, *settings), work, said=said)
    assert codes == [0] * size, [(said / str(r)).read_text()[-2500:] for r in range(size)]
    return out


@pytest.mark.parametrize("size", [2, 3])
def test_exact(adapter_recipe, tmp_path, size):
    settings = (*FEW, "train.exact=true")
    alone = train(1, adapter_recipe, tmp_path / "alone", *settings)
    out = shard(size, adapter_recipe, tmp_path / "s", *settings)
    assert (out / "metrics.jsonl").read_bytes() == (alone / "metrics.jsonl").read_bytes()
    assert same(saved(out), saved(alone)) and same(saved(out, "optimizer"), saved(alone, "optimizer"))
    print((out / "plan.json").read_text())
