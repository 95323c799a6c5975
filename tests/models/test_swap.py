"""Blocks that wait in the memory of the CPU: the same bits as without, and no block used before it came or after it left."""

from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import pytest
import torch
from tiny_recipes import adapter_table
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from dedistill.adapters.attach import Adapter
from dedistill.adapters.targets import adaptable, resolve_targets
from dedistill.flow.path import flow_loss
from dedistill.models import offload
from dedistill.models import swap as swap_module
from dedistill.models.blocks import checkpoint_blocks
from dedistill.models.example.family import Example
from dedistill.models.model import Model
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.prompts import ENCODING, blocks_of, placed
from dedistill.models.quantize import cast_float, prepare_base, sample_sha256
from dedistill.models.swap import Swap, saved, spread
from dedistill.recipe.model_tables import Architecture

SIZES = {"heads": 2, "head_dim": 16, "rope_axes": [4, 6, 6], "text_dim": 16, "pooled_dim": 16}
SMALL = Architecture(channels=1, height=8, width=16, patch=4, layers=3, single_layers=4, **SIZES)
FAMILIES = {"pixel_flux": PixelFlux(), "example": Example()}


@dataclass
class Lazy:
    """Copies as late as is allowed, when it is waited for; until then a room holds NaN, whatever it held before."""

    copied: list[int] = field(default_factory=list)

    def __call__(self, room, values):
        room.fill_(0xFF)

        def ready():
            if not done:
                room.copy_(values)
                self.copied.append(len(values))
                done.append(True)

        done = []
        return ready


def model(name: str, kind: str = "lokr", quant: str = "int8", *, checkpointed: int | bool = True) -> Model:
    family = FAMILIES[name]
    components = family.build(SMALL) if name == "pixel_flux" else family.tiny(0, layers=5)
    cast_float(components.denoiser, torch.bfloat16)
    shapes = adaptable(components.denoiser)
    prepare_base(components.denoiser, quant, [], "cpu")
    size = {"lora": {"rank": 2}, "lokr": {"factor": 2}}[kind]
    targets = resolve_targets(adapter_table(kind, {"preset": "blocks", **size}), shapes, family.presets(components.denoiser))
    adapter = Adapter(components.denoiser, kind, targets)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    checkpoint_blocks(components.denoiser, family.blocks(components.denoiser), checkpointed)
    return Model(family, components, adapter, 8, bf16=True, adapter=adapter, targets=targets)


def swap(built: Model, count: int) -> Lazy:
    """With blocks that wait out of reach, as a device cannot read the CPU's memory: NaN."""
    blocks, lazy = built.family.blocks(built.components.denoiser), Lazy()
    for held in Swap([blocks[i] for i in spread(count, len(blocks))], "cpu", lazy).held:
        held.lie_in = partial(reach, held.lie_in, {id(held.buffer): torch.full_like(held.buffer, 0xFF)})
        held.lie_in(held.buffer)
    return lazy


def reach(lie_in, instead, buffer):
    lie_in(instead.get(id(buffer), buffer))


def velocity(built: Model, seed: int) -> torch.Tensor:
    noisy = torch.randn(2, *built.components.sample_shape, generator=torch.Generator().manual_seed(seed))
    text = built.family.encode_text(built.components, ["a cat", "a dog in the snow"], 8)
    return built.velocity(noisy, torch.tensor([0.3, 0.8]), text)


def steps(built: Model) -> list[torch.Tensor]:
    """Two micro-batches, images and a validation in between, and all gradients."""
    found = []
    for seed in range(2):
        out = velocity(built, seed)
        flow_loss(out, torch.ones_like(out)).sum().backward()
        with torch.no_grad():
            found += [out.detach(), velocity(built, 7), velocity(built, 8)]
    return found + [p.grad for p in built.trainable().values()]


@pytest.mark.parametrize(
    ("name", "count", "kind", "quant"),
    [
        ("pixel_flux", 4, "lora", "int8"),
        ("pixel_flux", 4, "lokr", "none"),
        ("pixel_flux", 7, "lokr", "int8"),
        ("example", 5, "lora", "none"),
        ("example", 5, "lokr", "int8"),
        ("example", 4, "lora", "fp8"),
    ],
)
def test_every_bit_is_that_of_a_network_that_lies_there_whole(name, count, kind, quant):
    plain, swapped = model(name, kind, quant), model(name, kind, quant)
    lazy = swap(swapped, count)
    for ours, truth in zip(steps(swapped), steps(plain), strict=True):
        assert torch.equal(ours, truth)
    assert lazy.copied


@pytest.mark.parametrize("quant", ["int8", "none"])
def test_weights_can_be_read_between_passes(quant):
    built = model("pixel_flux", quant=quant)
    before = sample_sha256(built.components.denoiser)
    Swap(built.family.blocks(built.components.denoiser), "cpu", Lazy())
    for _ in range(2):
        assert sample_sha256(built.components.denoiser) == before
        velocity(built, 0).sum().backward()


@pytest.mark.parametrize(("name", "count"), [("pixel_flux", 3), ("pixel_flux", 6), ("example", 4)])
def test_a_pass_there_and_back_copies_no_block_more_often_than_twice(name, count):
    """The last two are there when the way back begins, the first two when the next pass does."""
    built = model(name)
    lazy = swap(built, count)
    for i in range(3):
        lazy.copied.clear()
        velocity(built, i).sum().backward()
        assert len(lazy.copied) == 2 * (count - 2) + (2 if i == 0 else 0)


CONFIGS = {
    "t5": T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=6, num_heads=4, feed_forward_proj="gated-gelu"),
    "clip": CLIPTextConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4),
}


@pytest.mark.parametrize(("kind", "waiting"), [("t5", 0), ("t5", 4), ("t5", 6), ("clip", 5)])
def test_text_encoders_larger_than_the_device_give_the_same(kind, waiting, monkeypatch):
    """As few of their blocks wait as the memory that is free makes necessary."""
    torch.manual_seed(0)
    network = {"t5": T5EncoderModel, "clip": CLIPTextModel}[kind](CONFIGS[kind]).eval()
    tokens = torch.arange(2 * 9).view(2, 9)
    with torch.no_grad():
        truth = [network(tokens).last_hidden_state for _ in range(2)]
    blocks = blocks_of(network)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    free = sum(p.nbytes for p in network.parameters()) + ENCODING - saved(sizes, waiting)
    monkeypatch.setattr(swap_module, "free_memory", lambda device: free)
    placed(network, "cpu")
    assert sum(bool(block._forward_pre_hooks) for block in blocks) == waiting and len(blocks) == len(sizes) > 4
    with torch.no_grad():
        for one in truth:
            assert torch.equal(network(tokens).last_hidden_state, one)


def test_a_block_used_before_it_came_would_show():
    built = model("pixel_flux")
    blocks = built.family.blocks(built.components.denoiser)
    Swap(blocks, "cpu", lambda room, values: [room.fill_(0xFF)] and (lambda: None))
    assert not velocity(built, 0).isfinite().any()


@pytest.mark.parametrize("name", FAMILIES)
def test_without_checkpointing_gradients_read_what_is_gone(name):
    """Why recipes need it."""
    built = model(name, checkpointed=False)
    swap(built, 5)
    out = velocity(built, 0)
    out.sum().backward()
    assert out.isfinite().all() and any(not p.grad.isfinite().all() for p in built.trainable().values())


@pytest.mark.parametrize("backward", [False, True])
def test_a_room_given_away_too_early_would_show(monkeypatch, backward):
    """Before the block in it is through: forward in every number, backward in every gradient."""
    following = Swap._following

    def hasty(self, i):
        if backward == (torch._C._current_graph_task_id() != -1):
            (self.used,) = (room for room in self.rooms if room is not self.used)
        return following(self, i)

    monkeypatch.setattr(Swap, "_following", hasty)
    built = model("pixel_flux")
    swap(built, 5)
    out = velocity(built, 0)
    assert bool(out.isfinite().all()) == backward
    if backward:
        out.sum().backward()
        assert any(not p.grad.isfinite().all() for p in built.trainable().values())


def test_a_pass_that_breaks_off_costs_nothing():
    plain, swapped = model("pixel_flux"), model("pixel_flux")
    swap(swapped, 5)
    blocks = swapped.family.blocks(swapped.components.denoiser)
    for block in (blocks[1], blocks[4]):
        broken = block.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            velocity(swapped, 0)
        broken.remove()
    for ours, truth in zip(steps(swapped), steps(plain), strict=True):
        assert torch.equal(ours, truth)


@pytest.mark.parametrize(("count", "among"), [(3, 7), (7, 7), (20, 57), (4, 5), (0, 5)])
def test_blocks_are_spread_evenly(count, among):
    chosen = spread(count, among)
    assert len(set(chosen)) == count and all(0 <= i < among for i in chosen) and chosen == sorted(chosen)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("name", "kind"), [("pixel_flux", "lokr"), ("example", "lora")])
def test_gradients_are_the_same_however_many_blocks_are_computed_again(name, kind):
    truth = steps(model(name, kind, checkpointed=False))
    for count in (1, 4, True):
        for ours, wanted in zip(steps(model(name, kind, checkpointed=count)), truth, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.parametrize(
    ("name", "kind", "count"), [("pixel_flux", "lora", True), ("pixel_flux", "lokr", 4), ("example", "lora", True)]
)
def test_gradients_are_the_same_where_inputs_wait_on_the_cpu(name, kind, count, monkeypatch):
    """All that blocks keep is put away, but what does not need gradients, and each is brought back once."""
    kept = []

    class Away(offload.Away):
        def __init__(self, tensor):
            kept.append(tensor.shape)
            super().__init__(tensor)

        def back(self):
            kept.remove(self.kept.shape)
            return super().back()

    monkeypatch.setattr(offload, "LEAST", 1)
    monkeypatch.setattr(offload, "Away", Away)
    truth, built = steps(model(name, kind, checkpointed=count)), model(name, kind, checkpointed=False)
    denoiser = built.components.denoiser
    checkpoint_blocks(denoiser, built.family.blocks(denoiser), count, away=True)
    out = velocity(built, 0)
    out.sum().backward()
    assert not kept
    for parameter in built.trainable().values():
        parameter.grad = None
    velocity(built, 0)
    assert len(kept) >= 3  # the first block's input needs no gradient
    kept.clear()
    for ours, wanted in zip(steps(built), truth, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize(("count", "again"), [(False, 0), (2, 2), (6, 6), (True, 7)])
def test_so_many_blocks_are_called_twice(count, again):
    built, calls = model("pixel_flux", checkpointed=count), []
    for i, block in enumerate(built.family.blocks(built.components.denoiser)):
        block.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    velocity(built, 0).sum().backward()
    assert calls == [*range(7), *reversed(range(again))]
