"""DeepSpeed ZeRO gives what one process gives, from parts (docs/engines.md)."""

import json
import math
import os
from pathlib import Path

import deepspeed
import deepspeed.runtime.zero.muon.original_muon
import deepspeed.runtime.zero.stage3  # noqa: F401 - these here, so that forked processes need not import them
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_world import BF16, FEW, LORA, arguments, furthest, same, saved, train

from dedistill.engine.checkpoint import list_checkpoints
from dedistill.engine.launcher import engine_asked
from dedistill.engine.loop import Trainer
from dedistill.engine.zero import ZeroUpdate, check_zero
from dedistill.errors import UserError
from dedistill.recipe import load_recipe
from dedistill.train import main

SMALL = {2: {"reduce_bucket_size": 1000}, 3: {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}}
"""So small that gradients of a tiny adapter travel in several pieces, and that ZeRO-3 cuts every tensor."""
TOLERANCE = 1e-5


def _launched(stage: int, folder: Path, given: list[str], work) -> int:
    """``work`` as ``accelerate launch`` starts it under ZeRO."""
    file = folder / f"zero{stage}.{os.environ['RANK']}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **SMALL[stage]}}))
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    return work(given)


def zero(stage: int, size: int, recipe: Path, out: Path, *settings: str, work=main) -> Path:
    """A run under ZeRO on ``size`` processes that ends well."""
    said = out.parent / f"said-{out.name}"
    codes = run_ranks(size, _launched, stage, out.parent, arguments(recipe, out, *settings), work, said=said)
    assert codes == [0] * size, [(said / str(r)).read_text()[-2500:] for r in range(size)]
    return out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _noting(given: list[str]) -> int:
    """``main``, noting what each process held at its end."""
    original = Trainer.export

    def fit(self, *arguments):
        yield from ended(self, *arguments)
        state = self.update.optimizer.state.values()
        held = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in self.model.parts.net.parameters()]
        note = {
            "moments": sum(s["exp_avg"].numel() for s in state),
            "base": sum(t.nbytes for t in held),
            "whole": self.model.facts["storage_bytes"],
            "int8": sum(t.nbytes for t in held if t.dtype == torch.int8) / sum(t.nbytes for t in held),
            "trained": self.model.facts["trained_parameters"],
            "live": sum(p.nbytes for p in self.model.parts.net.parameters()),
        }
        (self.run.path / f"held.{self.world.rank}").write_text(json.dumps(note))

    ended, Trainer.fit, Trainer.export = Trainer.fit, fit, original
    return main(given)


@pytest.mark.parametrize("stage", [2, 3])
def test_from_two_processes_to_one_to_three(adapter_recipe, tmp_path, stage):
    """T8, promise 3: ZeRO on 2, plain on 1, ZeRO on 3, by resume, against one process: questions and learning rates to the
    bit, weights and moments to TOLERANCE; each process held its share alone, int8 as int8."""
    alone = train(1, adapter_recipe, tmp_path / "alone", *FEW)
    out = zero(stage, 2, adapter_recipe, tmp_path / "chain", *FEW, "train.steps=2", work=_noting)
    two = [json.loads((out / f"held.{r}").read_text()) for r in range(2)]
    train(1, adapter_recipe, out, *FEW, "train.steps=4")
    zero(stage, 3, adapter_recipe, out, *FEW, "train.steps=6", work=_noting)
    three = [json.loads((out / f"held.{r}").read_text()) for r in range(3)]
    for a, b in zip(rows(alone), rows(out), strict=True):
        assert (a["step"], a["lr"], a["sigma_mean"]) == (b["step"], b["lr"], b["sigma_mean"])
        assert abs(a["loss"] - b["loss"]) < TOLERANCE and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4
    assert furthest(saved(alone), saved(out)) < TOLERANCE
    assert furthest(saved(alone, "optimizer"), saved(out, "optimizer")) < TOLERANCE
    counts = {float(t) for name, t in saved(out, "optimizer").items() if name.endswith("/step")}
    assert counts == {6.0}
    for held in (two, three):
        size = len(held)
        for one in held:
            assert one["trained"] / size <= one["moments"] <= one["trained"] / size + 200
            assert one["base"] < one["whole"] / size * 1.05 if stage == 3 else one["base"] == one["whole"]
            assert one["live"] == (0 if stage == 3 else one["whole"]) and one["int8"] > 0.5


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("fault", ["gradient", "norm"])
def test_a_step_that_is_not_finite_changes_nothing(adapter_recipe, tmp_path, stage, fault):
    """T10, F18: NaN in the gradient of one process, or a step that the guard refuses: weights, moments and counts keep every
    bit on all processes, and the next step goes on."""
    out = zero(stage, 2, adapter_recipe, tmp_path / "r", *FEW, "checkpoint.every=1", "checkpoint.keep=9", work=FAULTS[fault])
    assert [r["applied"] for r in rows(out)] == [True, False, True, True, True, True]
    for group in ("trainable", "optimizer"):
        first, second, third = (load_file(c / f"{group}.safetensors") for c in list_checkpoints(out / "checkpoints")[:3])
        assert same(first, second) and not same(second, third)


def _bad_gradient(given: list[str]) -> int:
    original = ZeroUpdate.finish

    def finish(self):
        original(self)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2 and self.world.rank == 1:
            self._gradients()[0].view(-1)[0] = math.nan

    ZeroUpdate.finish = finish
    return main(given)


def _bad_norm(given: list[str]) -> int:
    original = ZeroUpdate.norm

    def norm(self):
        self.calls = getattr(self, "calls", 0) + 1
        return math.inf if self.calls == 2 else original(self)

    ZeroUpdate.norm = norm
    return main(given)


FAULTS = {"gradient": _bad_gradient, "norm": _bad_norm}


@pytest.mark.parametrize(
    ("stage", "which", "settings"),
    [
        (2, "adapter", ["base.quant=int8-quanto", LORA]),
        (2, "teacher", []),
        (3, "adapter", ["base.quant=none", LORA, "train.precision=bf16", "train.gradient_checkpointing=true"]),
        (3, "adapter", ["train.gradient_checkpointing=true", "train.precision=bf16"]),
        (3, "teacher", []),
    ],
)
def test_every_kind_of_base_and_adapter(request, tmp_path, stage, which, settings):
    """docs/engines.md: the cells of the table that say ok."""
    recipe, settings = request.getfixturevalue(f"{which}_recipe"), [*settings, "train.steps=2"]
    alone = train(1, recipe, tmp_path / "alone", *settings)
    both = zero(stage, 2, recipe, tmp_path / "both", *settings)
    print(furthest(saved(alone), saved(both)))
    assert furthest(saved(alone), saved(both)) < TOLERANCE
    if which == "teacher":
        files = [load_file(next((run / "model").rglob("*.safetensors"))) for run in (alone, both)]
        assert furthest(*files) < TOLERANCE
