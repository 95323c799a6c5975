"""What each of several processes needs, against what two real ones have in use."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import LAUNCH, run_ranks

from benchmarks.forecast import SETTINGS, measured_in_all, recipe_for
from dedistill.distributed.launcher import FILE
from dedistill.distributed.world import World
from dedistill.forecast import spread
from dedistill.forecast.meter import BASE, GATHERED, GRADIENTS, OPTIMIZER, TRAINED
from dedistill.forecast.paper import Case
from dedistill.forecast.spread import PARTS, held
from dedistill.models.registry import get_family
from dedistill.training.engine import Engine
from dedistill.training.fsdp import Fsdp2
from dedistill.training.zero import Zero2


def case(setting: str, optimizer: str = "adamw_bf16", batch: int = 2) -> Case:
    """Of a step of ``batch`` samples, one by one."""
    recipe = recipe_for(128, **SETTINGS[setting])
    train = recipe.train.model_copy(update={"batch": batch, "micro_batch": 1, "optimizer": optimizer})
    return Case(recipe.model_copy(update={"train": train}), get_family("pixel_flux"), (16, 32, 32), 48, card=False)


def _measure(engine: type[Engine], asked: Case, out: Path, elements: int) -> None:
    if engine is Zero2:
        file = out / f"zero{os.environ['RANK']}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": elements}}))
        os.environ[FILE] = str(file)
    dist.init_process_group("gloo")
    most = measured_in_all(asked, World.joined(), engine)
    (out / f"{os.environ['RANK']}.json").write_text(json.dumps(most))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "setting", "optimizer"),
    [
        (Engine, "LoKr, int8", "adamw_bf16"),
        (Fsdp2, "LoRA, checkpointing, int8", "adamw_bf16"),
        (Fsdp2, "LoRA", "adamw_bf16"),
        (Zero2, "LoKr, int8", "adamw"),
    ],
)
def test_a_process_of_two_has_in_use_what_is_forecast(engine, setting, optimizer, tmp_path, monkeypatch):
    """In all, weights and optimizer included."""
    asked, elements = case(setting, optimizer), 20_000
    monkeypatch.setattr(spread, "ELEMENTS", elements)
    codes = run_ranks(2, _measure, engine, asked, tmp_path, elements, said=tmp_path / "said")
    assert codes == [0, 0], (tmp_path / "said/0").read_text()[-2500:]
    found = held(engine, asked, 2).estimate
    measured = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found.highest[1].bytes == pytest.approx(max(measured), rel=0.02)


def test_what_lies_in_parts_is_less_on_more_processes():
    """Of int8 FSDP2 the base, of ZeRO-2 gradients and optimizer; gradients are kept only where they add up."""
    asked = case("LoKr, int8", "adamw", batch=8)
    found = {(e, n): held(e, asked, n).estimate.peaks for e in PARTS for n in (2, 8)}
    place = ("backward", "last block of stack 2")
    bytes_of = lambda engine, n, *kinds: sum(found[engine, n][place].by_category.get(kind, 0) for kind in kinds)  # noqa: E731
    assert bytes_of(Engine, 2, BASE, TRAINED, OPTIMIZER) == bytes_of(Engine, 8, BASE, TRAINED, OPTIMIZER)
    assert bytes_of(Engine, 8, GRADIENTS) < 0.2 * bytes_of(Engine, 2, GRADIENTS)  # one micro-batch has none before it
    assert bytes_of(Fsdp2, 2, BASE) == pytest.approx(4 * bytes_of(Fsdp2, 8, BASE), abs=8)
    assert bytes_of(Fsdp2, 2, GATHERED) == bytes_of(Fsdp2, 8, GATHERED) > 0
    assert bytes_of(Zero2, 2, OPTIMIZER) == pytest.approx(4 * bytes_of(Zero2, 8, OPTIMIZER), abs=32)
    buffer = json.loads((LAUNCH / "zero2.json").read_text())["zero_optimization"]["reduce_bucket_size"]
    assert bytes_of(Zero2, 8, GRADIENTS) == pytest.approx(bytes_of(Zero2, 8, TRAINED) / 8 + 4 * buffer, abs=1)


def test_what_an_engine_refuses_is_no_forecast():
    whole = case("whole network, bf16", "adamw")
    assert held(Engine, whole, 2).estimate and "FSDP2 shards a frozen base" in held(Fsdp2, whole, 2).refused
    assert "train.optimizer" in held(Zero2, case("LoRA"), 2).refused
    swapped = whole.recipe.model_copy(update={"base": whole.recipe.base.model_copy(update={"swap": 2})})
    assert "base.swap" in held(Fsdp2, replace(whole, recipe=swapped), 2).refused
