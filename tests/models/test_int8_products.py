"""Products of int8: near those of floats in every layer, there and back, and the same whatever stands beside a token."""

import json

import pytest
import torch
from test_fsdp2 import shard
from test_run import _stop_after, run, same, weights
from test_world import furthest, saved, train
from test_zero import TOLERANCE, zero
from torch import nn

from dedistill.errors import UserError
from dedistill.models.example.family import Example
from dedistill.models.int8_products import check_products
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.quantize import Int8Linear, cast_float, multiply_codes, prepare_base
from dedistill.recipe import load_recipe
from dedistill.recipe.model_tables import Architecture
from dedistill.train import main

WIDE = Architecture(
    **{"channels": 4, "height": 16, "width": 16, "patch": 2, "layers": 1, "single_layers": 2, "heads": 4, "head_dim": 64},
    **{"rope_axes": [16, 24, 24], "text_dim": 64, "pooled_dim": 32},
)


def network(name: str, dtype: torch.dtype = torch.float32):
    family = PixelFlux() if name == "pixel_flux" else Example()
    components = family.build(WIDE) if name == "pixel_flux" else family.tiny(0)
    cast_float(components.denoiser, dtype)
    prepare_base(components.denoiser, "int8", [], "cpu")
    return family, components


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


def there_and_back(linear: nn.Module, x: torch.Tensor, above: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    out = linear(x)
    return out.detach(), torch.autograd.grad(out, x, above)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["pixel_flux", "example"])
def test_every_layer_is_near_its_float_one(name, dtype):
    """On what a real pass gives it and takes back; single vectors to the bit."""
    family, components = network(name, dtype)
    seen = {}

    def note(layer, args, out):
        x = args[0].detach()
        if out.requires_grad:
            out.register_hook(lambda grad: seen.__setitem__(layer, (x, grad)))
        else:  # of captions and sigma
            seen[layer] = x, torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)

    linears = {m: n for n, m in components.denoiser.named_modules() if isinstance(m, Int8Linear)}
    for linear in linears:
        linear.register_forward_hook(note)
    noisy = torch.randn(2, *components.sample_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    text = family.encode_text(components, ["a cat", "a dog in the snow"], 8)
    family.velocity(components, components.denoiser, noisy, torch.tensor([0.3, 0.8]), text).square().sum().backward()
    assert len(seen) == len(linears)
    plain = {linear: there_and_back(linear, *given) for linear, given in seen.items()}
    assert multiply_codes(components.denoiser, "cpu", "base.matmul")
    kinds = set()
    for linear, given in seen.items():
        kinds.add(given[0].dim())
        for ours, truth in zip(there_and_back(linear, *given), plain[linear]):
            assert ours.dtype == dtype
            if given[0].dim() == 2 or not linear.products:
                assert torch.equal(ours, truth)
            else:
                assert cosine(ours, truth) >= 0.999 and not torch.equal(ours, truth), linears[linear]
    assert kinds == {2, 3}


def wide(n: int, out: int, bias: bool = True) -> Int8Linear:
    torch.manual_seed(0)
    linear = Int8Linear.of(nn.Linear(n, out, bias))
    linear.products = True
    return linear


@pytest.mark.parametrize(("n", "out"), [(1024, 256), (256, 4096)])
def test_outliers_are_kept_in_bounds(n, out):
    """One channel in a hundred is six times the others, and one token a hundred times, as in large networks."""
    linear, generator = wide(n, out), torch.Generator().manual_seed(1)
    x = torch.randn(1, 200, n, generator=generator) * (1 + 5 * (torch.rand(n, generator=generator) < 0.01))
    x[0, 3] *= 100
    above = torch.randn(1, 200, out, generator=generator)
    ours = there_and_back(linear, x, above)
    linear.products = False
    assert all(cosine(a, b) >= 0.999 for a, b in zip(ours, there_and_back(linear, x, above)))


def test_a_token_does_not_depend_on_those_beside_it():
    linear = wide(64, 32)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    whole = linear(x)
    assert torch.equal(linear(x[1:, :3]), whole[1:, :3])
    x[0] *= 1000
    assert torch.equal(linear(x)[1], whole[1])


def test_nothing_but_the_codes_is_kept():
    linear, kept = wide(64, 48), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = linear(torch.randn(1, 40, 64).requires_grad_())
    assert sorted(kept) == sorted([linear.weight.data_ptr(), linear.weight_scale.data_ptr()])
    out.sum().backward()


def test_a_number_that_is_not_finite_is_not_hidden():
    x = torch.randn(1, 40, 64)
    x[0, 5, 7] = torch.nan
    assert wide(64, 32)(x).isfinite().all(2).sum() == 39


def test_layers_with_odd_sides_keep_floats():
    net = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 24), nn.Linear(24, 32))
    prepare_base(net, "int8", [], "cpu")
    assert multiply_codes(net, "cpu", "base.matmul") == ["2"]
    odd = nn.Sequential(nn.Linear(6, 6))
    prepare_base(odd, "int8", [], "cpu")
    with pytest.raises(UserError, match="no linear of this network has sides that are multiples of 8"):
        multiply_codes(odd, "cpu", "base.matmul")


def test_a_device_that_cannot_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (_ for _ in ()).throw(RuntimeError("not implemented for 'Char'")))
    with pytest.raises(UserError, match=r"base\.matmul: products of int8 do not work on cpu .*'Char'.*use 'float'"):
        check_products("cpu", "base.matmul")


@pytest.mark.parametrize("quant", ["none", "int8-quanto"])
def test_what_has_no_codes_of_ours_is_refused(adapter_recipe, quant):
    with pytest.raises(UserError, match=r"base\.matmul: 'int8' multiplies codes: set base\.quant = 'int8'"):
        load_recipe(adapter_recipe, [f"base.quant={quant}", "base.matmul=int8"])


INT8 = "base.matmul=int8"


def test_a_run_continues_and_computes_again_to_the_bit(adapter_recipe, tmp_path, monkeypatch):
    plain = run(adapter_recipe, tmp_path / "plain", INT8)
    _stop_after(monkeypatch, 3)
    words = [w for s in (INT8, "train.gradient_checkpointing=true", f"run.out={tmp_path / 'b'}") for w in ("--set", s)]
    assert main([str(adapter_recipe), *words]) == 75
    monkeypatch.undo()
    continued = run(adapter_recipe, tmp_path / "b", INT8, "train.gradient_checkpointing=true")
    assert same(weights(plain), weights(continued))
    assert (plain / "metrics.jsonl").read_bytes() == (continued / "metrics.jsonl").read_bytes()
    products = json.loads((plain / "plan.json").read_text())["effects"]["int8_products"]
    assert any("attn" in name for name in products)
    words = [w for s in ("base.matmul=float", f"run.out={continued}", "train.steps=8") for w in ("--set", s)]
    assert main([str(adapter_recipe), *words]) == 1, "a run does not change its arithmetic on the way"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_under_zero(adapter_recipe, tmp_path, stage):
    settings = (INT8, "train.steps=2", "train.micro_batch=2", "validate.every=2", "validate.samples=2", "snapshot.every=0")
    alone = train(1, adapter_recipe, tmp_path / "alone", *settings)
    assert furthest(saved(alone), saved(zero(stage, 2, adapter_recipe, tmp_path / "zero", *settings))) < TOLERANCE


def test_two_processes_whole_and_in_parts(adapter_recipe, tmp_path):
    settings = (INT8, "train.steps=2", "train.micro_batch=2", "validate.every=2", "validate.samples=2", "snapshot.every=0")
    whole = train(2, adapter_recipe, tmp_path / "whole", *settings)
    parts = shard(2, adapter_recipe, tmp_path / "parts", *settings)
    assert same(weights(whole), weights(parts))
