"""Products of codes: near those of floats in every layer, there and back, and the same whatever stands beside a token."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_fsdp2 import shard
from test_run import _stop_after, run, same, weights
from test_world import furthest, saved, train
from test_zero import TOLERANCE, zero
from torch import nn

from dedistill.errors import UserError
from dedistill.models import products
from dedistill.models.example.family import Example
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.products import FORMATS, FP8, INT8, check_products, quantize_tokens
from dedistill.models.quantize import QuantizedLinear, cast_float, multiply_codes, prepare_base
from dedistill.recipe import load_recipe
from dedistill.recipe.model_tables import Architecture
from dedistill.train import main

WIDE = Architecture(
    **{"channels": 4, "height": 16, "width": 16, "patch": 2, "layers": 1, "single_layers": 2, "heads": 4, "head_dim": 64},
    **{"rope_axes": [16, 24, 24], "text_dim": 64, "pooled_dim": 32},
)


KINDS = ("int8", "fp8")


def network(name: str, dtype: torch.dtype = torch.float32, kind: str = "int8"):
    family = PixelFlux() if name == "pixel_flux" else Example()
    components = family.build(WIDE) if name == "pixel_flux" else family.tiny(0)
    cast_float(components.denoiser, dtype)
    prepare_base(components.denoiser, kind, [], "cpu")
    return family, components


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


def there_and_back(linear: nn.Module, x: torch.Tensor, above: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    out = linear(x)
    return out.detach(), torch.autograd.grad(out, x, above)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "kind"), [("pixel_flux", "int8"), ("example", "int8"), ("pixel_flux", "fp8"), ("example", "fp8")]
)
def test_every_layer_is_near_its_float_one(name, kind, dtype):
    """On what a real pass gives it and takes back; single vectors to the bit."""
    family, components = network(name, dtype, kind)
    seen = {}

    def note(layer, args, out):
        x = args[0].detach()
        if out.requires_grad:
            out.register_hook(lambda grad: seen.__setitem__(layer, (x, grad)))
        else:  # of captions and sigma
            seen[layer] = x, torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)

    linears = {m: n for n, m in components.denoiser.named_modules() if isinstance(m, QuantizedLinear)}
    for linear in linears:
        linear.register_forward_hook(note)
    noisy = torch.randn(2, *components.sample_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    text = family.encode_text(components, ["a cat", "a dog in the snow"], 8)
    family.velocity(components, components.denoiser, noisy, torch.tensor([0.3, 0.8]), text).square().sum().backward()
    assert len(seen) == len(linears)
    plain = {linear: there_and_back(linear, *given) for linear, given in seen.items()}
    assert multiply_codes(components.denoiser, family.blocks(components.denoiser), "cpu", "base.matmul", kind)
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


def wide(n: int, out: int, kind: str = "int8") -> QuantizedLinear:
    torch.manual_seed(0)
    linear = QuantizedLinear.of(nn.Linear(n, out), FORMATS[kind])
    linear.products = True
    return linear


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "out"), [(1024, 256), (256, 4096)])
def test_outliers_are_kept_in_bounds(n, out, kind):
    """One channel in a hundred is six times the others, and one token a hundred times, as in large networks."""
    linear, generator = wide(n, out, kind), torch.Generator().manual_seed(1)
    x = torch.randn(1, 200, n, generator=generator) * (1 + 5 * (torch.rand(n, generator=generator) < 0.01))
    x[0, 3] *= 100
    above = torch.randn(1, 200, out, generator=generator)
    ours = there_and_back(linear, x, above)
    linear.products = False
    assert all(cosine(a, b) >= 0.999 for a, b in zip(ours, there_and_back(linear, x, above)))


@pytest.mark.parametrize("freedom", [2.0, 3.0, 1e6])
@pytest.mark.parametrize(("n", "out"), [(1024, 256), (256, 2048)])
def test_fp8_is_near_float32_whatever_the_tails(n, out, freedom):
    """Weights rounded as well. Student's t: of 2 it has no variance, of a million it is normal."""
    linear = wide(n, out, "fp8")
    torch.manual_seed(0)
    dense, tails = nn.Linear(n, out), torch.distributions.StudentT(freedom)
    x, above = tails.sample((1, 100, n)), tails.sample((1, 100, out))
    found, truth = there_and_back(linear, x, above), there_and_back(dense, x, above)
    assert all(0.999 < cosine(a, b) < 0.9999 for a, b in zip(found, truth))


@pytest.mark.parametrize("rows", [1, 40])
def test_fp8_is_what_its_codes_and_scales_say(rows):
    """Against float64 of the rounded numbers; zeros stay zeros, the largest of a row is met."""
    linear = wide(64, 32, "fp8")
    x = torch.randn(1, rows, 64)
    x[0, 0] = 0
    codes, scale = quantize_tokens(x[0], None, FP8)
    assert codes.float().abs().amax(1).tolist() == [0] + [448] * (rows - 1)
    wanted = (codes.double() * scale) @ linear.dequantized().double().t() + linear.bias
    assert float((linear(x)[0] - wanted).abs().max()) < 1e-5
    assert torch.equal(linear(x)[0, 0], linear.bias)


def test_a_token_does_not_depend_on_those_beside_it():
    linear = wide(64, 32)
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    whole = linear(x)
    assert torch.equal(linear(x[1:, :3]), whole[1:, :3])
    x[0] *= 1000
    assert torch.equal(linear(x)[1], whole[1])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_codes_is_kept(kind):
    linear, kept = wide(64, 48, kind), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = linear(torch.randn(1, 40, 64).requires_grad_())
    assert sorted(kept) == sorted([linear.weight.data_ptr(), linear.weight_scale.data_ptr()])
    out.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_not_finite_is_not_hidden(kind, bad):
    x = torch.randn(1, 40, 64)
    x[0, 5, 7] = bad
    assert wide(64, 32, kind)(x).isfinite().all(2).sum() == 39


@pytest.mark.parametrize(("kind", "multiple", "fit"), [("int8", 8, ["2", "3"]), ("fp8", 16, ["3"])])
def test_layers_with_odd_sides_keep_floats(kind, multiple, fit):
    net = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 24), nn.Linear(24, 32), nn.Linear(32, 16))
    prepare_base(net, kind, [], "cpu")
    assert multiply_codes(net, [net], "cpu", "base.matmul", kind) == fit
    odd = nn.Sequential(nn.Linear(6, 6))
    prepare_base(odd, kind, [], "cpu")
    with pytest.raises(UserError, match=f"no linear of this network's blocks has sides that are multiples of {multiple}"):
        multiply_codes(odd, [odd], "cpu", "base.matmul", kind)


def test_a_card_without_fp8_is_refused(monkeypatch):
    """By name, before anything is tried; an A100 and an RTX 3090 here, and a card that has it but no kernel."""
    monkeypatch.setattr(products.torch, "empty", lambda *_, device: SimpleNamespace(device=torch.device(device)))
    for capability in ((8, 0), (8, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(UserError, match=r"x\.toml: products of fp8 do not work on cuda.*8\.9.*use 'float'"):
            check_products("cuda", "x.toml", FP8, torch.bfloat16)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: (_ for _ in ()).throw(ValueError("only bf16 outputs")))
    with pytest.raises(UserError, match=r"products of fp8 do not work on cpu \(only bf16 outputs\)"):
        check_products("cpu", "base.matmul", FP8, torch.float32)


def test_a_device_that_cannot_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (_ for _ in ()).throw(RuntimeError("not implemented for 'Char'")))
    with pytest.raises(UserError, match=r"base\.matmul: products of int8 do not work on cpu .*'Char'.*use 'float'"):
        check_products("cpu", "base.matmul", INT8, torch.float32)


@pytest.mark.parametrize(
    ("quant", "kind"), [("none", "int8"), ("int8-quanto", "int8"), ("fp8", "int8"), ("int8", "fp8"), ("none", "fp8")]
)
def test_what_has_no_codes_of_ours_is_refused(adapter_recipe, quant, kind):
    with pytest.raises(UserError, match=rf"base\.matmul: '{kind}' multiplies codes: set base\.quant = '{kind}'"):
        load_recipe(adapter_recipe, [f"base.quant={quant}", f"base.matmul={kind}"])


BRIEF = ("train.steps=2", "train.micro_batch=2", "validate.every=2", "validate.samples=2", "snapshot.every=0")
WITH = {kind: (f"base.quant={kind}", f"base.matmul={kind}") for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_continues_and_computes_again_to_the_bit(adapter_recipe, tmp_path, monkeypatch, kind):
    plain = run(adapter_recipe, tmp_path / "plain", *WITH[kind])
    _stop_after(monkeypatch, 3)
    words = [w for s in (*WITH[kind], "train.gradient_checkpointing=true", f"run.out={tmp_path / 'b'}") for w in ("--set", s)]
    assert main([str(adapter_recipe), *words]) == 75
    monkeypatch.undo()
    continued = run(adapter_recipe, tmp_path / "b", *WITH[kind], "train.gradient_checkpointing=true")
    assert same(weights(plain), weights(continued))
    assert (plain / "metrics.jsonl").read_bytes() == (continued / "metrics.jsonl").read_bytes()
    products = json.loads((plain / "plan.json").read_text())["effects"][f"{kind}_products"]
    assert any("attn" in name for name in products) and all("blocks" in name for name in products)
    words = [w for s in ("base.matmul=float", f"run.out={continued}", "train.steps=8") for w in ("--set", s)]
    assert main([str(adapter_recipe), *words]) == 1, "a run does not change its arithmetic on the way"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind"), [(2, "int8"), (3, "int8"), (3, "fp8")])
def test_under_zero(adapter_recipe, tmp_path, stage, kind):
    settings = (*WITH[kind], *BRIEF)
    alone = train(1, adapter_recipe, tmp_path / "alone", *settings)
    assert furthest(saved(alone), saved(zero(stage, 2, adapter_recipe, tmp_path / "zero", *settings))) < TOLERANCE


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "fp8"])
def test_two_processes_whole_and_in_parts(adapter_recipe, tmp_path, kind):
    settings = (*WITH[kind], *BRIEF)
    whole = train(2, adapter_recipe, tmp_path / "whole", *settings)
    parts = shard(2, adapter_recipe, tmp_path / "parts", *settings)
    assert same(weights(whole), weights(parts))
