"""A base in parts on all processes gives what whole bases give (docs/engines.md)."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.autoencoders.vae import Decoder
from ranks import run_launched, run_ranks
from test_world import FEW, LORA, arguments, one_of, same, saved, train
from torch.utils._python_dispatch import TorchDispatchMode

from dedistill.data.encode import open_data
from dedistill.distributed.launcher import UNHEEDED, engine_asked
from dedistill.errors import RUN_AGAIN
from dedistill.objectives.base import objective_for
from dedistill.recipe import load_recipe
from dedistill.runs.checkpoint import damage, list_checkpoints
from dedistill.train import main
from dedistill.training import fsdp as sharding
from dedistill.training.trainer import Trainer

ENVIRONMENT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What accelerate says of launch/fsdp2.yaml."""


def _sharded(work, *given) -> int:
    os.environ |= ENVIRONMENT
    return work(*given)


def shard(size: int, recipe: Path, out: Path, *settings: str, work=main, more: tuple = ()) -> Path:
    """A run under FSDP2 on ``size`` processes that ends well."""
    said = out.parent / f"said-{out.name}"
    codes = run_ranks(size, _sharded, work, arguments(recipe, out, *settings), *more, said=said)
    assert codes == [0] * size, [(said / str(r)).read_text()[-2500:] for r in range(size)]
    return out


def rows(out: Path) -> bytes:
    return (out / "metrics.jsonl").read_bytes()


def assert_same(a: Path, b: Path) -> None:
    """Weights, optimizer and metrics, to the bit."""
    assert same(saved(a), saved(b)) and same(saved(a, "optimizer"), saved(b, "optimizer")) and rows(a) == rows(b)


# -- the same training -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_exact_weights_are_bit_equal_and_continue_anywhere(adapter_recipe, tmp_path):
    """A base in parts on 2, a whole one on 1, parts on 3 unevenly, against one process."""
    settings = (*FEW, "train.exact=true")
    for i, (start, size) in enumerate([(shard, 2), (train, 1), (shard, 3)]):
        start(size, adapter_recipe, tmp_path / "chain", *settings, f"train.steps={2 * (i + 1)}")
    assert_same(tmp_path / "chain", train(1, adapter_recipe, tmp_path / "alone", *settings))


def test_fast_weights_are_those_of_whole_bases(adapter_recipe, tmp_path):
    """To the bit on equally many processes, and so as near to one process as theirs (test_world)."""
    settings = (*FEW, "base.quant=none", "train.micro_batch=2", "train.steps=2")
    parts, whole = (start(2, adapter_recipe, tmp_path / start.__name__, *settings) for start in (shard, train))
    assert_same(parts, whole)
    effects = [json.loads((out / "plan.json").read_text())["effects"] for out in (parts, whole)]
    assert [e["engine"] for e in effects] == ["fsdp2", "ddp"]
    assert effects[0]["storage_bytes"] == effects[1]["storage_bytes"] > 1.7 * effects[0]["storage_bytes_here"]


BF16 = ["train.precision=bf16", "train.optimizer=adamw_bf16"]


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        pytest.param(["base.quant=none", LORA, *BF16], 2, marks=pytest.mark.slow),
        (BF16, 2),
    ],
    ids=["none lora bf16", "int8 lokr bf16"],
)
def test_every_kind_of_base_and_adapter(adapter_recipe, tmp_path, settings, size):
    """docs/engines.md: the cells of the table that say ok."""
    settings = [*FEW, *settings, "train.steps=2", "train.exact=true"]
    assert_same(shard(size, adapter_recipe, tmp_path / "s", *settings), train(1, adapter_recipe, tmp_path / "alone", *settings))


@pytest.mark.slow
def test_flux_with_buckets_masks_and_previews(image_recipe, tmp_path):
    """Images of two sizes, captions of mixed lengths, 4 slots on 3 processes; previews need all of them."""
    settings = ["train.exact=true", "base.quant=int8", "data.resolutions=[48, 64]", "data.max_upscale=2", "train.steps=2"]
    settings += ["preview.every=2", "preview.prompts=['the red sun']", "preview.cfgs=[1.0, 3.0]"]
    settings += ["train.gradient_checkpointing=true", "validate.every=2", "validate.samples=2"]
    settings += ["meters.every=2", "meters.samples=2", "meters.steps=2"]
    alone = train(1, image_recipe, tmp_path / "alone", *settings)
    out = shard(3, image_recipe, tmp_path / "s", *settings)
    assert_same(out, alone)
    images = sorted(p.relative_to(alone) for p in (alone / "previews").rglob("*.png"))
    assert len(images) == 6 and all((out / p).read_bytes() == (alone / p).read_bytes() for p in images)


# -- equally many passes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 20])
def test_all_run_equally_many_passes(image_recipe, tmp_path, size):
    """Also where slots are fewer than processes, and of several shapes; who trains on what is as without sharding."""
    recipe = load_recipe(image_recipe, ["train.batch=12", "data.resolutions=[32, 64]", "data.max_upscale=4"])
    objective = objective_for(recipe, open_data(recipe, "cpu", lambda line: None).source, lambda shape: 1.0)
    for step in range(3):
        passes = set()
        for rank in range(size):
            world = one_of(rank, size)
            plain, nothing = objective.share(step, 2, world)
            world.requires_equal_forwards = True
            own, padding = objective.share(step, 2, world)
            assert nothing == [] and all(np.array_equal(a, b) for a, b in zip(own, plain, strict=True))
            assert all(objective.noisy_batch(step, positions).noisy.isfinite().all() for positions in padding)
            passes.add(len(own) + len(padding))
        assert len(passes) == 1


def _poisoned_company(arguments: list[str]) -> int:
    """``main``, where all that counts for nothing is NaN."""
    original, seen = Trainer.micro_batches, []

    def tasks(self, start):
        for item in original(self, start):
            if item is not None and not len(item[0]):
                item[1].noisy.fill_(math.nan)
                seen.append(item)
            yield item

    Trainer.micro_batches = tasks
    code = main(arguments)
    assert bool(seen) == (os.environ["RANK"] != "0")
    return code


@pytest.mark.slow
def test_passes_for_company_change_nothing(adapter_recipe, tmp_path):
    """4 slots on 3 processes: two of them run a pass for nothing in each step. NaN in it reaches no weight and no loss."""
    settings = (*FEW, "train.batch=4", "train.steps=2", "train.micro_batch=1")
    out = shard(3, adapter_recipe, tmp_path / "s", *settings, work=_poisoned_company)
    assert_same(out, train(3, adapter_recipe, tmp_path / "plain", *settings))
    assert all(json.loads(row)["applied"] for row in rows(out).splitlines())


# -- what lies and travels where -------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Notes the name and the bytes of every collective: those that arrive, of gathers."""

    def __init__(self):
        super().__init__()
        self.moved: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            self.moved.append((func._schema.name, first.nbytes if isinstance(first, torch.Tensor) else 0))
        return func(*args, **(kwargs or {}))


def _noted(arguments: list[str], notes: Path) -> int:
    """``main``, noting what lies here after sharding, and what the collectives of each step move."""
    shard_base, step, steps = sharding.shard_base, Trainer.train_step, []

    def noting(model, world, device):
        units = dict(enumerate(model.family.blocks(model.components.denoiser)))
        whole = {i: sharding.local_bytes(block) for i, block in units.items()} | {
            "all": sharding.local_bytes(model.components.denoiser)
        }
        shape = {name: (list(p.shape), str(p.dtype)) for name, p in model.components.denoiser.named_parameters()}
        shard_base(model, world, device)
        here = {n: (list(p.to_local().shape), str(p.to_local().dtype)) for n, p in model.components.denoiser.named_parameters()}
        facts = {"whole": whole, "shapes": shape, "here": here, "bytes": sharding.local_bytes(model.components.denoiser)}
        notes.with_suffix(f".{world.rank}").write_text(json.dumps(facts))

    def counted(self, index, tasks):
        with Collectives() as collectives:
            row = step(self, index, tasks)
        steps.append(collectives.moved)
        return row

    sharding.shard_base, Trainer.train_step = noting, counted
    code = main(arguments)
    notes.with_suffix(f".steps.{os.environ['RANK']}").write_text(json.dumps(steps))
    return code


@pytest.mark.parametrize(("quant", "size"), [("int8", 3), pytest.param("none", 2, marks=pytest.mark.slow)])
def test_each_process_holds_its_part_as_it_is_stored(adapter_recipe, tmp_path, quant, size):
    """1 / size of every tensor, int8 as int8; per pass each block travels twice, the last and what is around them once,
    and nothing else but gradients of the adapter, as without sharding."""
    settings = (*FEW, f"base.quant={quant}", "validate.every=100", "train.batch=8", "train.micro_batch=2", "train.steps=2")
    out = shard(size, adapter_recipe, tmp_path / "s", *settings, work=_noted, more=(tmp_path / "notes",))
    trained = json.loads((out / "plan.json").read_text())["effects"]["trained_parameters"]
    held = 0
    for rank in range(size):
        facts = json.loads((tmp_path / f"notes.{rank}").read_text())
        for name, (shape, dtype) in facts["here"].items():
            whole = facts["shapes"][name]
            share = -(-whole[0][0] // size)
            assert dtype == whole[1] and shape[1:] == whole[0][1:] and shape[0] <= share, name
        dtypes = {dtype for _, dtype in facts["here"].values()}
        assert dtypes == ({"torch.int8", "torch.float32"} if quant == "int8" else {"torch.float32"})
        held += facts["bytes"]
        assert facts["bytes"] < 1.1 / size * facts["whole"]["all"]
        once = facts["whole"]["all"] + facts["whole"]["0"]  # of two blocks
        steps = json.loads((tmp_path / f"notes.steps.{rank}").read_text())
        for moved in steps[1:]:  # before the first one, validation has left the last block gathered
            gathered = sum(size for name, size in moved if name == "c10d::_allgather_base_")
            assert gathered == 2 * once if size == 2 else 2 * once <= gathered < 2.1 * once
            assert sum(size for name, size in moved if name == "c10d::allreduce_") == 4 * trained
            assert {name for name, _ in moved} <= {"c10d::_allgather_base_", "c10d::allreduce_", "c10d::allgather_"}
    assert held == facts["whole"]["all"]


# -- ends and stops --------------------------------------------------------------------------------------------------


def _signalled(arguments: list[str], end: bool) -> int:
    """``main``, where rank 1 gets a signal in its second step, or ends without a word."""
    original = Trainer.train_step

    def step(self, index, tasks):
        if index == 1 and self.world.rank == 1:
            os._exit(7) if end else os.kill(os.getpid(), signal.SIGTERM)
        return original(self, index, tasks)

    Trainer.train_step = step
    return main(arguments)


def test_a_signal_to_any_process_stops_all_after_one_save(adapter_recipe, tmp_path):
    """Nobody is left waiting for weights."""
    given = arguments(adapter_recipe, tmp_path / "run", *FEW, "checkpoint.every=0")
    codes = run_ranks(2, _sharded, _signalled, given, False, said=tmp_path / "said")
    assert codes == [RUN_AGAIN] * 2, (tmp_path / "said/0").read_text()
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert damage(checkpoint) == "" and checkpoint.name == "step-00000002"


def test_a_process_that_ends_takes_the_others_along(adapter_recipe, tmp_path):
    given = arguments(adapter_recipe, tmp_path / "run", *FEW, "checkpoint.every=1")
    assert run_ranks(2, _sharded, _signalled, given, True, said=tmp_path / "said") == [RUN_AGAIN, 7]
    assert "another process of this run has ended" in (tmp_path / "said/0").read_text()
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert damage(checkpoint) == "" and checkpoint.name == "step-00000001"


def _full(arguments: list[str], codec: bool) -> int:
    """``main`` out of memory in a preview: in the codec, or in the network on rank 1 alone."""

    def full(module, _):
        if isinstance(module, Decoder if codec else FluxTransformer2DModel) and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")

    if codec or os.environ["RANK"] == "1":
        torch.nn.modules.module.register_module_forward_pre_hook(full)
    return main(arguments)


@pytest.mark.parametrize("codec", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_preview_without_memory_leaves_nobody_waiting(image_recipe, tmp_path, codec):
    settings = ["preview.every=1", "preview.prompts=['the red sun', 'a dog']", "train.steps=1"]
    given = arguments(image_recipe, tmp_path / "run", *settings)
    codes = run_ranks(2, _sharded, _full, given, codec, said=tmp_path / "said")
    said = [(tmp_path / "said" / str(r)).read_text() for r in range(2)]
    if codec:
        assert codes == [0, 0] and said[0].count("out of memory; training goes on") == 1, said
    else:
        assert codes == [RUN_AGAIN] * 2 and "another process of this run has ended" in said[0], said
        assert "rank 1: error: out of memory in a preview" in said[1]


# -- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"FSDP_VERSION": "1"}, "asks for FSDP 1, which is refused"),
        *(({variable: value}, f"sets {variable}={value}, which is refused") for variable, value in UNHEEDED),
        ({}, "one process alone has nobody to share the work of fsdp2 with"),
    ],
)
def test_what_would_not_be_followed_is_refused(adapter_recipe, monkeypatch, capsys, variables, words):
    for name, value in (ENVIRONMENT | variables).items():
        monkeypatch.setenv(name, value)
    assert main([str(adapter_recipe)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("which", "settings", "words"),
    [
        ("teacher", [], "without a table [adapter] the whole network is trained. Use launch/ddp.yaml"),
        ("adapter", ["base.quant=int8-quanto"], "'int8-quanto' would be sharded as the floats it stands for"),
    ],
)
def test_what_cannot_lie_in_parts_is_refused(request, tmp_path, which, settings, words):
    """docs/engines.md: the cells of the table that say refused. Nothing is loaded before."""
    given = arguments(request.getfixturevalue(f"{which}_recipe"), tmp_path / "run", *settings)
    assert run_ranks(2, _sharded, main, given, said=tmp_path / "said") == [2, 2]
    assert words in (tmp_path / "said/0").read_text() and not (tmp_path / "run").exists()


def test_the_engine_is_hidden_from_libraries(adapter_recipe, tmp_path):
    """transformers leaves text encoders empty on all ranks but the first where it believes in FSDP, accelerate wraps."""
    assert run_ranks(2, _sharded, _hidden, said=tmp_path / "said") == [0, 0], (tmp_path / "said/0").read_text()


def _hidden() -> int:
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"
    from accelerate.utils import DistributedType
    from transformers.integrations import is_fsdp_enabled

    from dedistill.distributed.launcher import start

    torch.distributed.init_process_group("gloo")
    assert is_fsdp_enabled() and engine_asked() == "fsdp2"
    accelerator, world = start(cpu=True)
    assert not is_fsdp_enabled() and accelerator.distributed_type == DistributedType.MULTI_CPU
    assert world.engine == sharding.Fsdp2.name
    world.shutdown()
    return 0


def test_accelerate_launch_with_fsdp2_yaml(adapter_recipe, tmp_path):
    """The file for GPUs itself, which starts processes on CPUs where there are no GPUs."""
    given, said = arguments(adapter_recipe, tmp_path / "run", "train.steps=1"), tmp_path / "said"
    assert run_launched("fsdp2.yaml", main, given, said=said) == 0, (said / "0").read_text()
    effects = json.loads((tmp_path / "run/plan.json").read_text())["effects"]
    assert (effects["engine"], effects["processes"]) == ("fsdp2", 2)
    assert 2 * effects["storage_bytes_here"] == effects["storage_bytes"]
