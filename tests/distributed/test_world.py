"""One recipe on any number of processes: the same samples, the same gradients, the same run."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from dedistill.data.encode import open_data
from dedistill.distributed.launcher import start
from dedistill.distributed.outside import StopRequests
from dedistill.distributed.world import World, partition_by_cost
from dedistill.errors import UserError
from dedistill.models.model import build_model
from dedistill.objectives.base import objective_for
from dedistill.recipe import load_recipe
from dedistill.recipe.resolve import make_plan
from dedistill.runs.checkpoint import damage, list_checkpoints
from dedistill.runs.directory import RunDirectory
from dedistill.train import main
from dedistill.training.engine import LIMIT, RESOLUTION, Engine, ExactGradients
from dedistill.training.trainer import Trainer

FEW = ("validate.every=2", "validate.samples=6", "snapshot.every=0")


def arguments(recipe: Path, out: Path, *settings: str) -> list[str]:
    return [str(recipe), "--debug", *(a for s in (f"run.out={out}", *settings) for a in ("--set", s))]


def train(size: int, recipe: Path, out: Path, *settings: str) -> Path:
    """A run on ``size`` processes that ends well."""
    said = out.parent / f"said-{out.name}"
    codes = run_ranks(size, main, arguments(recipe, out, *settings), said=said)
    assert codes == [0] * size, [(said / str(r)).read_text()[-1500:] for r in range(size)]
    return out


def saved(out: Path, name: str = "trainable") -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(out / "checkpoints")[-1] / f"{name}.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def furthest(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def one_of(rank: int, size: int) -> World:
    """A world that only says who it is: enough for dealing."""
    world = World()
    world.rank, world.size, world.main = rank, size, rank == 0
    return world


# -- who does what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 20])
def test_every_slot_is_dealt_once_and_evenly(size):
    """16 slots on 3, 5 and 7 ranks, and on more ranks than slots."""
    dealt = partition_by_cost([1] * 16, size)
    assert sorted(i for items in dealt for i in items) == list(range(16))
    assert max(map(len, dealt)) == math.ceil(16 / size) and max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_unequal_work_is_dealt_evenly():
    rng = np.random.default_rng(0)
    for _ in range(200):
        costs, size = rng.integers(1, 100, rng.integers(1, 40)).tolist(), int(rng.integers(1, 9))
        dealt = partition_by_cost(costs, size)
        assert sorted(i for items in dealt for i in items) == list(range(len(costs)))
        loads = [sum(costs[i] for i in items) for items in dealt]
        best = max(max(costs), math.ceil(sum(costs) / size))  # no way of dealing is better than this
        assert max(loads) <= 4 / 3 * best + max(costs) / 3
        assert max(loads) - min(loads) <= max(costs)


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_a_step_is_the_same_on_any_number_of_processes(adapter_recipe, size):
    """Samples, noise, sigmas and captions of each position, and every position once."""
    recipe = load_recipe(adapter_recipe, ["train.batch=16"])
    objective = objective_for(recipe, open_data(recipe, "cpu", print).source, lambda shape: 1.0)
    whole = objective.noisy_batch(3, np.arange(16))
    seen = []
    for rank in range(size):
        own, padding = objective.share(3, 2, one_of(rank, size))
        assert padding == []
        for positions in own:
            task = objective.noisy_batch(3, positions)
            seen += positions.tolist()
            assert torch.equal(task.noisy, whole.noisy[positions]) and torch.equal(task.target, whole.target[positions])
            assert torch.equal(task.sigma, whole.sigma[positions]) and task.captions == [whole.captions[p] for p in positions]
            assert task.names == [whole.names[p] for p in positions]
    assert sorted(seen) == list(range(16))


def test_images_are_dealt_by_their_area(tmp_path, image_recipe):
    recipe = load_recipe(image_recipe, ["data.resolutions=[32, 64]", "data.max_upscale=4", "train.batch=12"])
    source = open_data(recipe, "cpu", lambda line: None).source
    objective = objective_for(recipe, source, lambda shape: 1.0)
    for step in range(4):
        areas = []
        for rank in range(3):
            mine = [int(p) for part in objective.share(step, 1, one_of(rank, 3))[0] for p in part]
            areas.append(sum(math.prod(objective.noisy_batch(step, np.array([p])).noisy.shape[-2:]) for p in mine))
        assert max(areas) - min(areas) <= 64 * 64 // 64  # one image of the larger kind, in latents


# -- words between processes -----------------------------------------------------------------------------------------


def _talk() -> int:
    torch.distributed.init_process_group("gloo")
    world = World.joined()
    heard = world.gather({"rank": world.rank, "loss": [math.nan, 0.1, math.inf], "said": "x" * 1000 * world.rank})
    assert [h["rank"] for h in heard] == [0, 1, 2] and [len(h["said"]) for h in heard] == [0, 1000, 2000]
    assert all(math.isnan(h["loss"][0]) and h["loss"][1:] == [0.1, math.inf] for h in heard)
    assert world.broadcast_object({"name": world.rank}) == {"name": 0}
    world.assert_equal_on_all_ranks({"a": 1, "b": [1, 2]})
    with pytest.raises(UserError, match="rank 2 has another b than rank 0: 7 against 1"):
        world.assert_equal_on_all_ranks({"a": 1, "b": 7 if world.rank == 2 else 1})
    tensors = [torch.full((3, 2), float(world.rank)), torch.tensor(world.rank), torch.ones(5, dtype=torch.float64)]
    world.all_reduce_(tensors)
    assert (
        torch.equal(tensors[0], torch.full((3, 2), 3.0))
        and tensors[1] == 3
        and torch.equal(tensors[2], 3 * torch.ones(5).double())
    )
    if world.rank == 1:
        return 5
    with pytest.raises(UserError, match="another process of this run has ended"):
        world.wait()
    return 0


def test_words_between_processes(tmp_path):
    assert run_ranks(3, _talk, said=tmp_path) == [0, 5, 0], [(tmp_path / str(r)).read_text() for r in range(3)]


# -- gradients -------------------------------------------------------------------------------------------------------


def _widened(_, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    def wide(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(map(wide, arguments)), {name: wide(value) for name, value in options.items()}


def _gradients(recipe_file: Path, out: Path, *settings: str) -> int:
    """Save rank 0's gradient of step 1, in float64."""
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    recipe, world = load_recipe(recipe_file, list(settings)), World.joined()
    model = build_model(recipe)
    for module in (model.root.double(), model.components.denoiser.double(), model.components.denoiser.time_text_embed):
        module.register_forward_pre_hook(_widened, with_kwargs=True)
    engine, source = Engine(recipe, world), open_data(recipe, "cpu", print).source
    engine.place(model, "cpu")
    trainer = Trainer(recipe, make_plan(recipe), model=model, source=source, run=RunDirectory(recipe), engine=engine)
    with StopRequests() as trainer.stop:
        trainer._gradients(trainer.micro_batches(1))
    if world.main:
        save_file({name: p.grad for name, p in trainer.engine.trainable.items()}, out)
    return 0


def test_any_split_of_the_batch_gives_one_gradient(adapter_recipe, tmp_path):
    """1 process x 4 micro-batches = 2 x 2 = 4 x 1 = 3 unevenly, in float64 to 1e-12."""
    found = {}
    quant = "base.quant=none"
    for size in (1, 2, 3, 4):
        file = tmp_path / f"{size}.safetensors"
        codes = run_ranks(size, _gradients, adapter_recipe, file, quant, "train.micro_batch=2", said=tmp_path / f"said-{size}")
        assert codes == [0] * size, (tmp_path / f"said-{size}" / "0").read_text()
        found[size] = load_file(file)
    largest = max(float(g.abs().max()) for g in found[1].values())
    assert largest > 1e-3
    for size in (2, 3, 4):
        assert furthest(found[1], found[size]) < 1e-12 * largest, size


def parameters(shapes=((3, 4), (5,), ())) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]


def test_exact_sums_do_not_depend_on_order():
    """Integers add up the same in any order, floats do not."""
    generator = torch.Generator().manual_seed(0)
    samples = [[torch.randn(p.shape, generator=generator) * 10.0 ** -(i % 8) for p in parameters()] for i in range(40)]
    found, plain = [], []
    for order in (range(40), reversed(range(40)), np.random.default_rng(1).permutation(40)):
        own, loose = parameters(), parameters()
        exact = ExactGradients(own, World(), batch=40)
        for i in order:
            for p, q, gradient in zip(own, loose, samples[i]):
                p.grad = gradient.clone()
                q.grad = gradient.clone() if q.grad is None else q.grad + gradient
            exact.add()
        exact.finish()
        found.append([p.grad for p in own])
        plain.append([p.grad for p in loose])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
    assert any(not torch.equal(a, b) for other in plain[1:] for a, b in zip(plain[0], other))
    for j, gradient in enumerate(found[0]):
        true = torch.stack([s[j].double() for s in samples]).sum(0)
        assert torch.allclose(gradient.double(), true, rtol=2.0**-23, atol=40 * RESOLUTION)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, LIMIT / 4, -LIMIT])
def test_what_does_not_fit_makes_the_step_not_finite(bad):
    own = parameters()
    exact = ExactGradients(own, World(), batch=4)
    for value in (1.0, bad):
        for p in own:
            p.grad = torch.full_like(p, value)
        exact.add()
    exact.finish()
    assert all(p.grad.isnan().all() for p in own)
    for p in own:  # and is forgotten with the next
        p.grad = torch.full_like(p, 2.0)
    exact.add()
    exact.finish()
    assert all(torch.equal(p.grad, torch.full_like(p, 2.0)) for p in own)


def test_the_largest_gradients_that_are_let_in_do_not_overflow():
    (own,) = parameters([(2,)])
    exact = ExactGradients([own], World(), batch=8)
    largest = torch.nextafter(torch.tensor(LIMIT / 8), torch.tensor(0.0))
    for _ in range(8):
        own.grad = torch.stack([largest, -largest])
        exact.add()
    exact.finish()
    assert torch.equal(own.grad, torch.stack([largest * 8, -largest * 8]))


def test_a_process_with_nothing_to_do_takes_part(adapter_recipe):
    recipe = load_recipe(adapter_recipe)
    engine = Engine(recipe, World())
    engine.place(build_model(recipe), "cpu")
    engine.finish()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in engine.trainable.values())


# -- whole runs ------------------------------------------------------------------------------------------------------


def test_exact_weights_are_bit_equal_at_every_world_size(adapter_recipe, tmp_path):
    """2->1->3 by resume against one process: weights, optimizer and metrics. (3 from the start:
    test_encoding_is_shared.)"""
    settings = (*FEW, "train.exact=true")
    alone, out = train(1, adapter_recipe, tmp_path / "alone", *settings), tmp_path / "chain"
    for i, size in enumerate((2, 1, 3)):
        train(size, adapter_recipe, out, *settings, f"train.steps={2 * (i + 1)}")
    assert (out / "metrics.jsonl").read_bytes() == (alone / "metrics.jsonl").read_bytes()
    assert same(saved(out), saved(alone)) and same(saved(out, "optimizer"), saved(alone, "optimizer"))


def test_fast_weights_agree_to_rounding(adapter_recipe, tmp_path):
    """Without exact, the same questions and learning rates to the bit, and weights to a stated difference."""
    alone = train(1, adapter_recipe, tmp_path / "alone", *FEW, "train.lr=1e-3")
    three = train(3, adapter_recipe, tmp_path / "three", *FEW, "train.lr=1e-3")
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (alone, three)]
    for a, b in zip(*rows, strict=True):
        assert (a["step"], a["lr"], a["sigma_mean"]) == (b["step"], b["lr"], b["sigma_mean"])
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["grad_norm"] - b["grad_norm"]) < 1e-4
    assert furthest(saved(alone), saved(three)) < 1e-5
    assert json.loads((three / "plan.json").read_text())["effects"]["processes"] == 3


LORA = "adapter={kind='lora', targets=[{preset='blocks', rank=2}]}"
BF16 = ("train.precision=bf16", "train.optimizer=adamw_bf16")


@pytest.mark.parametrize(
    ("which", "settings"),
    [
        pytest.param("adapter", ["base.quant=none"], marks=pytest.mark.slow),
        pytest.param("adapter", ["base.quant=int8-quanto"], marks=pytest.mark.slow),
        pytest.param("adapter", [LORA], marks=pytest.mark.slow),
        ("adapter", [*BF16]),
        ("adapter", ["base.quant=none", LORA, *BF16]),
        pytest.param("adapter", ["base.quant=int8-quanto", LORA], marks=pytest.mark.slow),
        ("teacher", []),
    ],
    ids=["none lokr", "quanto lokr", "int8 lora", "int8 lokr bf16", "none lora bf16", "quanto lora", "whole network"],
)
def test_every_kind_of_base_and_adapter(request, tmp_path, which, settings):
    """docs/engines.md: the cells of the table that say ok."""
    recipe, settings = request.getfixturevalue(f"{which}_recipe"), [*settings, "train.steps=2", "train.exact=true"]
    alone, both = (train(size, recipe, tmp_path / str(size), *settings) for size in (1, 2))
    assert same(saved(alone), saved(both)) and (alone / "metrics.jsonl").read_bytes() == (both / "metrics.jsonl").read_bytes()
    if which == "teacher":
        files = [load_file(next((run / "model").rglob("*.safetensors"))) for run in (alone, both)]
        assert same(*files)


@pytest.mark.slow
def test_any_chain_of_world_sizes(adapter_recipe, tmp_path):
    """1->2->1, 5->7 and 7->2->5, exact, uneven: 16 slots."""
    settings = (*FEW, "train.exact=true", "train.batch=16")
    alone = train(1, adapter_recipe, tmp_path / "alone", *settings)
    for sizes in ((1, 2, 1), (5, 7), (7, 2, 5)):
        out = tmp_path / "-".join(map(str, sizes))
        for i, size in enumerate(sizes):
            train(size, adapter_recipe, out, *settings, f"train.steps={(2, 6)[i] if len(sizes) == 2 else 2 * (i + 1)}")
        assert (out / "metrics.jsonl").read_bytes() == (alone / "metrics.jsonl").read_bytes(), sizes
        assert same(saved(out), saved(alone))


def _counted(arguments: list[str], out: Path) -> int:
    """``main``, noting the bytes of every collective of torch."""
    moved = []
    for name in ("all_reduce", "broadcast", "all_gather", "reduce", "reduce_scatter", "all_gather_into_tensor", "send"):
        original = getattr(torch.distributed, name)

        def counted(*tensors, _name=name, _original=original, **options):
            moved.append((_name, tensors[-1].nbytes, str(tensors[-1].dtype)))
            return _original(*tensors, **options)

        setattr(torch.distributed, name, counted)
    code = main(arguments)
    out.with_suffix(f".{os.environ['RANK']}").write_text(json.dumps(moved))
    return code


@pytest.mark.parametrize(("exact", "width"), [("false", 4), ("true", 8)])
def test_only_gradients_of_the_adapter_travel(adapter_recipe, tmp_path, exact, width):
    """4 bytes per trained parameter and step, 8 in exact mode; nothing of the base, ever."""
    out, notes = tmp_path / "run", tmp_path / "moved"
    given = arguments(adapter_recipe, out, f"train.exact={exact}", "train.steps=3")
    assert run_ranks(2, _counted, given, notes, said=tmp_path / "said") == [0, 0], (tmp_path / "said/0").read_text()
    facts = json.loads((out / "plan.json").read_text())["effects"]
    for rank in (0, 1):
        moved = json.loads(notes.with_suffix(f".{rank}").read_text())
        sums = [size for name, size, _ in moved if name == "all_reduce"]
        flags = 8 if exact == "true" else 0
        assert sum(sums) == 3 * (width * facts["trained_parameters"] + flags)
        words = sum(size for name, size, _ in moved if name == "all_gather")
        assert {name for name, _, _ in moved} == {"all_reduce", "all_gather"} and words < 20_000
    assert facts["storage_bytes"] > 60_000


def _signalled(arguments: list[str], rank: int, number: int) -> int:
    """``main``, where one rank gets a signal in its second step."""
    original = Trainer.train_step

    def step(self, index, tasks):
        if index == 1 and self.world.rank == rank:
            os.kill(os.getpid(), number)
        return original(self, index, tasks)

    Trainer.train_step = step
    return main(arguments)


@pytest.mark.parametrize(("rank", "number"), [pytest.param(0, signal.SIGINT, marks=pytest.mark.slow), (1, signal.SIGTERM)])
def test_a_signal_to_any_process_stops_all_after_one_save(adapter_recipe, tmp_path, rank, number):
    """The step is finished, saved once, and continued to the bit."""
    settings, out = (*FEW, "checkpoint.every=0"), tmp_path / "run"
    whole = train(2, adapter_recipe, tmp_path / "whole", *settings)
    codes = run_ranks(2, _signalled, arguments(adapter_recipe, out, *settings), rank, number, said=tmp_path / "said")
    assert codes == [75] * 2
    (checkpoint,) = list_checkpoints(out / "checkpoints")
    assert damage(checkpoint) == "" and checkpoint.name == "step-00000002"
    said = [(tmp_path / "said" / str(r)).read_text() for r in (0, 1)]
    assert "stopped and saved at step 2" in said[0] and said[1] == ""
    train(2, adapter_recipe, out, *settings)
    assert same(saved(out), saved(whole)) and (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def _poisoned(arguments: list[str]) -> int:
    """``main``, where rank 1 finds NaN in its own gradient in the second step."""
    original, steps = Engine.finish, []

    def finish(self):
        steps.append(self)
        if len(steps) == 2 and self.world.rank == 1:
            next(iter(self.trainable.values())).grad.view(-1)[0] = math.nan
        return original(self)

    Engine.finish = finish
    return main(arguments)


def test_nan_in_one_process_is_skipped_by_all(adapter_recipe, tmp_path):
    """The step changes no weight of any process (they are compared at each save), and the next ones do."""
    out = tmp_path / "run"
    given = arguments(adapter_recipe, out, *FEW, "checkpoint.every=1", "checkpoint.keep=9")
    assert run_ranks(2, _poisoned, given, said=tmp_path / "said") == [0, 0], (tmp_path / "said/0").read_text()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["applied"] for r in rows] == [True, False, True, True, True, True]
    first, second, third = (load_file(c / "trainable.safetensors") for c in list_checkpoints(out / "checkpoints")[:3])
    assert same(first, second) and not same(second, third)


def _astray(arguments: list[str]) -> int:
    """``main``, where rank 1's weights drift, as they would without shared gradients."""
    original = Trainer.train_step

    def step(self, index, tasks):
        row = original(self, index, tasks)
        if self.world.rank == 1:
            with torch.no_grad():
                next(iter(self.engine.trainable.values())).view(-1)[0] += 1e-6
        return row

    Trainer.train_step = step
    return main(arguments)


def _unshared(arguments: list[str]) -> int:
    """``main``, where gradients are not summed over processes."""
    World.all_reduce_ = lambda self, tensors: None
    return main(arguments)


@pytest.mark.parametrize("fault", [_astray, _unshared])
def test_processes_with_different_weights_stop(adapter_recipe, tmp_path, fault):
    """Three steps on different data without shared gradients are found at the first save, and nothing is saved."""
    out = tmp_path / "run"
    given = arguments(adapter_recipe, out, *FEW, "checkpoint.every=3")
    assert run_ranks(2, fault, given, said=tmp_path / "said") == [1, 1]
    for rank in (0, 1):
        said = (tmp_path / "said" / str(rank)).read_text()
        assert f"rank {rank}: error: rank 1 has another checksum of the weights at step 3 than rank 0" in said
    assert not list_checkpoints(out / "checkpoints")


def _other_seed(arguments: list[str]) -> int:
    """``main`` with another recipe on rank 1."""
    return main([*arguments, "--set", f"run.seed={os.environ['RANK']}"])


def test_processes_with_different_recipes_do_not_start(adapter_recipe, tmp_path):
    out = tmp_path / "run"
    assert run_ranks(2, _other_seed, arguments(adapter_recipe, out), said=tmp_path / "said") == [1, 1]
    assert "rank 1 has another run.seed than rank 0" in (tmp_path / "said/0").read_text()


def test_a_fault_of_rank_0_ends_all(adapter_recipe, tmp_path):
    """A directory that is in use: rank 0 says so, the other does not wait for it."""
    out = tmp_path / "run"
    with RunDirectory(load_recipe(adapter_recipe, [f"run.out={out}"])):
        codes = run_ranks(2, main, arguments(adapter_recipe, out), said=tmp_path / "said")
    assert codes == [1, 75]
    assert "another process is running in" in (tmp_path / "said/0").read_text()
    assert "rank 1: error: another process of this run has ended" in (tmp_path / "said/1").read_text()


def _start_with_one_that_dies() -> int:
    if os.environ["RANK"] == "0":
        torch.distributed.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, is_master=True, wait_for_workers=True)
        return 1
    try:
        start(cpu=True)
    except UserError as e:
        print(e)
        return e.exit_code
    return 0


def test_a_process_that_dies_while_the_others_join_it(tmp_path):
    """Rank 0 ends between the rendezvous and the first word: the other says so, and that the run may be tried again."""
    assert run_ranks(2, _start_with_one_that_dies, said=tmp_path) == [1, 75], (tmp_path / "1").read_text()
    assert "another process of this run has ended" in (tmp_path / "1").read_text()


def test_encoding_is_shared(image_recipe, tmp_path):
    """Each process writes shards of its own; together they hold what one process would have written, to the bit."""
    given = [str(image_recipe), "--debug", "--cache-only", "--set"]
    for size in (1, 3):
        said = tmp_path / f"said-{size}"
        codes = run_ranks(size, main, [*given, f"data.cache={tmp_path}/{size}"], said=said)
        assert codes == [0] * size, [(said / str(r)).read_text() for r in range(size)]
    for store in ("latents", "text"):
        shards = [sorted((tmp_path / str(size) / store).glob("*.safetensors")) for size in (1, 3)]
        assert [len(s) for s in shards] == [1, 3]
        one, three = ({k: v for shard in s for k, v in load_file(shard).items()} for s in shards)
        assert same(one, three)
    assert (tmp_path / "said-3/1").read_text() == ""
    exact = (f"data.cache={tmp_path}/3", "train.exact=true", "data.resolutions=[48, 64]", "data.max_upscale=2")
    a = train(1, image_recipe, tmp_path / "a", *exact)
    b = train(3, image_recipe, tmp_path / "b", *exact)
    assert same(saved(a), saved(b)) and (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert same(saved(a, "optimizer"), saved(b, "optimizer"))


def test_work_for_one_process_is_done_by_the_first(image_recipe, tmp_path):
    """--check-cache and --rehearse under a launcher of several: the others end at once, and nobody waits for them."""
    codes = run_ranks(2, main, [str(image_recipe), "--check-cache"], said=tmp_path / "said")
    assert codes == [1, 0] and (tmp_path / "said/1").read_text() == ""
    assert "crops are not encoded yet" in (tmp_path / "said/0").read_text()
