"""Blocks that torch compiles: whole, once for all sizes, and beside everything else."""

import json
from itertools import product

import pytest
import torch
from test_fsdp2 import shard
from test_run import run, same, weights
from test_small_cards import CHECKPOINTED
from test_swap import model, swap
from test_world import train
from torch._dynamo.utils import counters

from dedistill.errors import UserError
from dedistill.models import compiled as compiling
from dedistill.models.compiled import compile_blocks
from dedistill.models.products import FORMATS
from dedistill.models.quantize import QuantizedLinear, multiply_codes
from dedistill.recipe import load_recipe
from dedistill.training.zero import Zero3

BUCKETS = [(8, 16), (16, 8), (8, 24), (24, 8), (16, 16), (8, 32), (32, 8), (16, 24)]
CAPTIONS = ["a cat", "a dog in the snow", "the red house and the blue sun on a hill", ""]
COMPILED = "train.compile=blocks"


@pytest.fixture(autouse=True)
def graphs_alone(monkeypatch):
    """Taken down and run as they are; to make C++ of one takes a minute."""
    monkeypatch.setattr(compiling, "COMPILER", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def ask(built, size, captions) -> torch.Tensor:
    noisy = torch.randn(len(captions), 1, *size, generator=torch.Generator().manual_seed(0))
    text = built.family.encode_text(built.components, captions, 12).trimmed()
    out = built.velocity(noisy, torch.full((len(captions),), 0.3), text)
    return out


@pytest.mark.slow
def test_no_size_is_compiled_twice():
    """Without a break in any block, and after one batch of each sort nothing is compiled any more: two kinds of blocks, with a
    mask and without, and double ones for a single token of text. The first block's graph is that of the others."""
    built = model("pixel_flux", "lokr", checkpointed=False)
    assert compile_blocks(built.family, built.family.blocks(built.components.denoiser)) == 7
    for captions in (CAPTIONS[:2], CAPTIONS[1:2] * 2, [""] * 2):  # with a mask, without, of a single token
        ask(built, BUCKETS[0], captions)
    warm = counters["stats"]["unique_graphs"]
    assert warm == 5 and not counters["graph_break"]
    for size, (i, j) in product(BUCKETS, [(0, 1), (2, 1), (2, 2), (3, 3)]):
        ask(built, size, [CAPTIONS[i], CAPTIONS[j]])
    assert counters["stats"]["unique_graphs"] == warm and not counters["graph_break"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("n", "out"), [(32, 48), (64, 16)])
def test_no_weight_is_kept_between_the_passes(n, out, kind):
    """A compiler takes equal terms of both passes for one, and a base of floats would lie beside that of codes."""
    linear, kept = QuantizedLinear.of(torch.nn.Linear(n, out), FORMATS[kind]), []
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager_decomp_partition")
    x = torch.randn(5, n, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = compiled(x)
    assert not [t for t in kept if t.is_floating_point() and t.numel() == n * out]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(linear(x).sum(), x)[0])


def pair(kind: str = "int8"):
    """Compiled, of blocks that wait and products of codes, and the same without a compiler."""
    built, wanted = (model("pixel_flux", "lokr", kind) for _ in range(2))
    for one in (built, wanted):
        multiply_codes(one.components.denoiser, one.family.blocks(one.components.denoiser), "cpu", "base.matmul", kind)
    swap(built, 5)
    compile_blocks(built.family, built.family.blocks(built.components.denoiser))
    return built, wanted


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_graphs_give_the_bits_of_what_they_were_taken_from(kind):
    built, wanted = pair(kind)
    for size in BUCKETS[:2]:
        a, b = (ask(one, size, CAPTIONS[:2]) for one in (built, wanted))
        assert torch.equal(a, b)
        (a.square().sum() + b.square().sum()).backward()
    assert counters["stats"]["unique_graphs"] == 2, "one for all double blocks, the first too, one for all single ones"
    for ours, truth in zip(built.trainable().values(), wanted.trainable().values(), strict=True):
        assert torch.equal(ours.grad, truth.grad)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_they_are_near(monkeypatch, compiler):
    """As bf16 rounds: what is fused is not rounded in between."""
    monkeypatch.setattr(compiling, "COMPILER", compiler)
    built, wanted = pair()
    a, b = (ask(one, BUCKETS[0], CAPTIONS[:2]) for one in (built, wanted))
    (a.square().sum() + b.square().sum()).backward()
    found, truth = (torch.cat([p.grad.flatten() for p in one.trainable().values()]) for one in (built, wanted))
    for ours, theirs in ((a, b), (found, truth)):
        far = float((ours - theirs).detach().norm() / theirs.norm())
        print(compiler, far)
        assert far < 2e-2


BRIEF = ("train.steps=2", "train.micro_batch=8", "snapshot.every=0")


def without_validation(recipe, tmp_path):
    brief = tmp_path / "brief.toml"
    brief.write_text(recipe.read_text().replace("[validate]\nevery = 3\nsamples = 16\n", ""))
    return brief


def test_a_run_is_the_same_and_says_so(adapter_recipe, tmp_path):
    recipe = without_validation(adapter_recipe, tmp_path)
    """Where products are of int8 and all is computed again, too."""
    kinds = [BRIEF, (*BRIEF, COMPILED, CHECKPOINTED)]
    plain, compiled = (run(recipe, tmp_path / str(len(kind)), *kind, "base.matmul=int8") for kind in kinds)
    assert same(weights(plain), weights(compiled))
    assert (plain / "metrics.jsonl").read_bytes() == (compiled / "metrics.jsonl").read_bytes()
    assert json.loads((compiled / "plan.json").read_text())["effects"]["compiled_blocks"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("start", [train, shard])
def test_two_processes_whole_and_in_parts(adapter_recipe, tmp_path, start):
    recipe = without_validation(adapter_recipe, tmp_path)
    compiled = start(2, recipe, tmp_path / "compiled", *BRIEF, "train.micro_batch=4", COMPILED)
    assert same(weights(compiled), weights(train(2, recipe, tmp_path / "plain", *BRIEF, "train.micro_batch=4")))


def test_what_cannot_work_is_refused(adapter_recipe):
    with pytest.raises(UserError, match=r"train\.compile: cannot keep what exact = true promises"):
        load_recipe(adapter_recipe, [COMPILED, "train.exact=true"])
    from dedistill.distributed.world import World

    with pytest.raises(UserError, match=r"train\.compile: .*puts each layer together"):
        Zero3(load_recipe(adapter_recipe, [COMPILED]), World()).check()
