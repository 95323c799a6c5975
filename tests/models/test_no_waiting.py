"""A forward and backward pass never asks the device for a number: it runs on one that has none ("meta")."""

import pytest
import torch
from tiny_recipes import adapter_table

from dedistill.adapters.attach import Adapter
from dedistill.adapters.targets import adaptable, resolve_targets
from dedistill.flow.path import flow_loss
from dedistill.models.example.family import Example
from dedistill.models.model import Model
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.quantize import cast_float, multiply_codes, prepare_base

CAPTIONS = {"one length": ["a cat", "a dog"], "mixed lengths": ["a cat", "a dog in the snow"]}


def model(family, kind: str, device: str, bf16: bool = True, quant: str = "int8") -> Model:
    components = family.tiny(0)
    cast_float(components.denoiser, torch.bfloat16 if bf16 else torch.float32)
    shapes = adaptable(components.denoiser)
    prepare_base(components.denoiser, quant, [], device)
    size = {"lora": {"rank": 2}, "lokr": {"factor": 2}}[kind]
    targets = resolve_targets(adapter_table(kind, {"preset": "blocks", **size}), shapes, family.presets(components.denoiser))
    with torch.device(device):
        adapter = Adapter(components.denoiser, kind, targets)
    return Model(family, components, adapter, 8, bf16=bf16, adapter=adapter, targets=targets)


@pytest.mark.parametrize(("checkpointing", "products"), [(False, ""), (True, ""), (False, "int8"), (False, "fp8")])
@pytest.mark.parametrize("captions", CAPTIONS)
@pytest.mark.parametrize("kind", ["lora", "lokr"])
@pytest.mark.parametrize("family", [PixelFlux(), Example()], ids=lambda f: f.spec.name)
def test_a_pass_waits_for_nothing(family, kind, captions, checkpointing, products):
    built = model(family, kind, "meta", quant=products or "int8")
    if products:
        multiply_codes(built.components.denoiser, family.blocks(built.components.denoiser), "meta", "base.matmul", products)
    if checkpointing:
        built.components.denoiser.enable_gradient_checkpointing()
    text = family.encode_text(built.components, CAPTIONS[captions], 8)
    noisy, target = (torch.empty(2, *built.components.sample_shape, device="meta") for _ in range(2))
    loss = flow_loss(built.velocity(noisy, torch.empty(2, device="meta"), text.to("meta")), target)
    loss.sum().backward()
    assert loss.shape == (2,)
    assert all(p.grad is not None and p.grad.is_meta for p in built.trainable().values())


def test_the_device_with_no_numbers_shows_a_wait():
    with pytest.raises(RuntimeError, match="meta tensors"):
        bool(torch.empty(2, device="meta").max() > 0)


@pytest.mark.parametrize("family", [PixelFlux(), Example()], ids=lambda f: f.spec.name)
@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_base_computes_in_the_dtype_it_is_stored_in(family, bf16, dtype):
    """Whatever torch's autocast would choose for an operation on this device: what comes out of each block is of one dtype."""
    built, seen = model(family, "lokr", "cpu", bf16), set()

    def look(module, inputs, output):
        assert not torch.is_autocast_enabled("cpu")
        seen.update(t.dtype for t in (output if isinstance(output, tuple) else (output,)))

    for block in family.blocks(built.components.denoiser):
        block.register_forward_hook(look)
    noisy = torch.randn(1, *built.components.sample_shape, generator=torch.Generator().manual_seed(0))
    text = family.encode_text(built.components, ["a cat"], 8)
    assert built.velocity(noisy, torch.tensor([0.5]), text).dtype == torch.float32
    assert seen == {dtype}
