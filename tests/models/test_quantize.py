"""The frozen base: our int8 against quanto's, what is excluded, what is frozen, what it occupies."""

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, get_args

import pytest
import torch
from optimum.quanto import QLinear, freeze, qint8, quantize
from safetensors import safe_open
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from dedistill.cli.export import main as export
from dedistill.cli.train import train
from dedistill.distributed.world import World
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.models.model import build_model
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.quantize import (
    QUANTIZERS,
    QuantizedLinear,
    Quantizer,
    cast_float,
    dense_weight,
    linear_names,
    prepare_base,
    quantize_rows,
    storage_bytes,
)
from dedistill.recipe import Recipe, load_recipe
from dedistill.recipe.model_tables import Base
from dedistill.training.fsdp import Fsdp2

MODES = {"none": nn.Linear, "int8": QuantizedLinear, "int8-quanto": QLinear}
LIBREFLUX = ["*.norm", "*.norm1", "*.norm2", "*.norm2_context", "proj_out", "x_embedder", "norm_out", "context_embedder"]


def linear(inputs: int = 48, outputs: int = 20, dtype=torch.float32, bias: bool = True) -> nn.Linear:
    """Weights of row sizes from 1e-3 to 1, and one row of zeros."""
    layer = nn.Linear(inputs, outputs, bias)
    with torch.no_grad():
        layer.weight.copy_(keyed.noise(0, "weight", 0, [0], (outputs, inputs))[0] * torch.logspace(-3, 0, outputs)[:, None])
        layer.weight[3] = 0
    return layer.to(dtype)


def prepared(layer: nn.Linear, quant: str) -> nn.Linear:
    holder = nn.Sequential(copy.deepcopy(layer))
    assert prepare_base(holder, quant, [], "cpu") == ([] if quant == "none" else ["0"])
    return holder[0]


@pytest.fixture
def flux():
    family = PixelFlux()
    return family, family.tiny(0)


@pytest.mark.parametrize("outputs", [20, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_equal_quantos(dtype, outputs):
    """Symmetric, one scale per output row, in the weight's own dtype; an all-zero row stays zero."""
    layer = linear(outputs=outputs, dtype=dtype)
    theirs = prepared(layer, "int8-quanto").weight
    codes, scale = quantize_rows(layer.weight.detach())
    assert codes.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (outputs, 1)
    assert torch.equal(codes, theirs._data) and torch.equal(scale, theirs._scale)
    assert not codes[3].any() and codes[-1].abs().max() == 127


@pytest.mark.parametrize(("width", "error"), [(256, 0.0069), (3072, 0.0086)])
def test_forward_error(width, error):
    """Weight-only error of Gaussian weights, .69 % at 256 inputs and .86 % at 3,072; below 1 %."""
    layer = nn.Linear(width, 64, bias=False)
    layer.weight.data = keyed.noise(0, "weight", 0, [0], (64, width))[0]
    x = keyed.noise(0, "x", 0, range(64), (width,))
    exact, ours = layer(x).detach(), prepared(layer, "int8")(x)
    assert ((ours - exact).norm() / exact.norm()).item() == pytest.approx(error, abs=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 48), (2, 5, 48)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_passes_equal_those_of_the_dense_weight(shape, dtype, bias):
    """Output and input gradient are those of a plain linear with the dequantized weight."""
    layer = linear(dtype=dtype, bias=bias)
    ours = prepared(layer, "int8")
    x = keyed.noise(0, "x", 0, [0], shape)[0].to(dtype).requires_grad_()
    y = ours(x)
    direction = torch.cos(y.detach())
    y.backward(direction)
    reference = x.detach().clone().requires_grad_()
    expected = F.linear(reference, ours.dequantized(), layer.bias)
    expected.backward(direction)
    assert torch.equal(y, expected) and torch.equal(x.grad, reference.grad) and x.grad.any()


def test_output_and_gradient_equal_quantos():
    layer = linear()
    grads, outputs = [], []
    for quant in ("int8", "int8-quanto"):
        x = keyed.noise(0, "x", 0, range(7), (48,)).requires_grad_()
        y = prepared(layer, quant)(x)
        y.sin().sum().backward()
        outputs.append(y.detach())
        grads.append(x.grad)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quant", MODES)
def test_prepared_base_is_frozen_and_lets_gradients_through(flux, quant):
    """Nothing of the base requires a gradient (quanto's freeze() turns that on), and backward reaches the input."""
    family, components = flux
    names = prepare_base(components.denoiser, quant, [], "cpu")
    assert not [n for n, p in components.denoiser.named_parameters() if p.requires_grad]
    assert (
        names == ([] if quant == "none" else linear_names(components.denoiser)) and len(linear_names(components.denoiser)) == 28
    )
    assert {type(components.denoiser.get_submodule(n)) for n in linear_names(components.denoiser)} == {MODES[quant]}
    noisy = keyed.noise(0, "noise", 0, range(2), components.sample_shape).requires_grad_()
    text = family.encode_text(components, ["3 seven", ""], 12)
    for _ in range(2):
        family.velocity(components, components.denoiser, noisy, torch.tensor([0.2, 0.8]), text).square().sum().backward()
    assert noisy.grad.isfinite().all() and noisy.grad.abs().amax((1, 2, 3)).min() > 0.1
    assert all(p.grad is None for p in components.denoiser.parameters())


def test_velocity_of_the_quantized_network(flux):
    """Both int8 modes are the same network, within 1 % of the original."""
    family, components = flux
    noisy, sigma = keyed.noise(0, "noise", 0, range(4), components.sample_shape), torch.tensor([0.1, 0.4, 0.7, 1.0])
    text, results = family.encode_text(components, ["3 seven"] * 4, 12), {}
    for quant in MODES:
        denoiser = copy.deepcopy(components.denoiser)
        prepare_base(denoiser, quant, [], "cpu")
        results[quant] = family.velocity(
            replace(components, denoiser=denoiser, mask="bool"), denoiser, noisy, sigma, text
        ).detach()
    torch.testing.assert_close(results["int8"], results["int8-quanto"], rtol=0, atol=1e-5)
    error = (results["int8"] - results["none"]).norm() / results["none"].norm()
    assert 1e-4 < error < 0.01


@pytest.mark.parametrize("quant", MODES)
@pytest.mark.parametrize("pattern", [p for p in LIBREFLUX if "norm" in p] + ["**.norm1", "norm", "transformer_blocks.0", "a**"])
def test_exclude_that_matches_no_linear_is_an_error(flux, quant, pattern):
    """LibreFLUX's patterns name containers and protect nothing; ours refuse, whatever the mode."""
    _, components = flux
    with pytest.raises(UserError) as error:
        prepare_base(components.denoiser, quant, ["proj_out", pattern], "cpu", lambda key: f"r.toml:7: {key}")
    assert error.value.exit_code == 2
    assert str(error.value).startswith("r.toml:7: base.exclude.1: ") and f"'{pattern}'" in str(error.value)
    assert {type(m) for m in components.denoiser.modules() if isinstance(m, nn.Linear)} == {
        nn.Linear
    }  # nothing was done by halves


EXCLUDED = {
    "proj_out": ["proj_out"],
    "x_embedder": ["x_embedder"],
    "**.norm1.linear": ["transformer_blocks.0.norm1.linear"],
    "**.norm*.linear": [
        "norm_out.linear",
        "single_transformer_blocks.0.norm.linear",
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
    ],
    "time_text_embed.**": [f"time_text_embed.{e}_embedder.linear_{i}" for e in ("text", "timestep") for i in (1, 2)],
}


@pytest.mark.parametrize("quant", ["int8", "int8-quanto"])
@pytest.mark.parametrize("pattern", EXCLUDED)
def test_excluded_linears_keep_their_weights(flux, quant, pattern):
    """What the pattern names, and no more; the returned names are those that changed type."""
    _, components = flux
    before = copy.deepcopy(components.denoiser)
    names = prepare_base(components.denoiser, quant, [pattern], "cpu")
    types = {n: type(components.denoiser.get_submodule(n)) for n in linear_names(components.denoiser)}
    assert sorted(n for n, kind in types.items() if kind is nn.Linear) == EXCLUDED[pattern]
    assert names == [n for n, kind in types.items() if kind is MODES[quant]]
    for name in EXCLUDED[pattern]:
        assert torch.equal(components.denoiser.get_submodule(name).weight, before.get_submodule(name).weight)


def test_libreflux_list_under_quanto():
    """Quanto itself, given LibreFLUX's list, excludes 3 linears of 60 in a network of 2 + 4 blocks."""
    image = {"channels": 1, "height": 8, "width": 16, "patch": 4, "layers": 2, "single_layers": 4, "heads": 2}
    new = SimpleNamespace(**image, head_dim=16, rope_axes=[4, 6, 6], text_dim=16, pooled_dim=16)
    denoiser = PixelFlux().build(new).denoiser
    names = linear_names(denoiser)
    quantize(denoiser, weights=qint8, exclude=LIBREFLUX)
    kept = [n for n in names if type(denoiser.get_submodule(n)) is nn.Linear]
    assert len(names) == 60 and sorted(kept) == ["context_embedder", "proj_out", "x_embedder"]


def test_quanto_takes_linears_only():
    """The returned names are all that was quantized, in a network with convolutions too."""
    denoiser = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    assert prepare_base(denoiser, "int8-quanto", [], "cpu") == ["2"]
    assert type(denoiser[0]) is nn.Conv2d


def test_quantos_freeze_asks_for_gradients():
    """The library's behaviour that decides the order of prepare_base; if it changes, this says so."""
    holder = nn.Sequential(linear()).requires_grad_(False)
    quantize(holder, weights=qint8)
    freeze(holder)
    assert holder[0].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_weight_is_one_for_both(dtype):
    """The weight a layer stands for: float32, the same from ours and quanto's, and near the original."""
    layer = linear(dtype=dtype)
    ours, theirs = (dense_weight(prepared(layer, quant)) for quant in ("int8", "int8-quanto"))
    assert torch.equal(ours, theirs) and ours.dtype == torch.float32 and type(theirs) is torch.Tensor
    assert not ours.requires_grad and not theirs.requires_grad
    plain = dense_weight(layer)
    assert torch.equal(plain, layer.weight.detach().float()) and not plain.requires_grad
    step = plain.abs().amax(1, keepdim=True) / 127
    assert torch.all((ours - plain).abs() <= step * (0.501 if dtype == torch.float32 else 1.1))


def test_storage_counts_int8_as_one_byte():
    """Codes 1 byte, scale and bias 4; quanto's weights report the float size they stand for."""
    layer = nn.Linear(256, 64)
    assert storage_bytes(nn.Sequential(layer)) == 4 * (256 * 64 + 64)
    ours = nn.Sequential(prepared(layer, "int8"))
    theirs = nn.Sequential(prepared(layer, "int8-quanto"))
    expected = 256 * 64 + 4 * 64 + 4 * 64
    assert storage_bytes(ours) == expected
    assert storage_bytes(theirs) == expected + sum(4 * b.numel() for b in theirs.buffers())
    assert storage_bytes(nn.Sequential(prepared(layer.bfloat16(), "int8"))) == 256 * 64 + 2 * 64 + 2 * 64


@pytest.mark.parametrize("move", ["deepcopy", "bfloat16", "half", "double"])
def test_codes_survive_copies_and_casts(move):
    """Casts touch scale and bias only; a copy is equal and its own."""
    layer = prepared(linear(), "int8")
    codes = layer.weight.clone()
    moved = copy.deepcopy(layer) if move == "deepcopy" else getattr(copy.deepcopy(layer), move)()
    dtype = torch.float32 if move == "deepcopy" else getattr(torch, move)
    assert moved.weight.dtype == torch.int8 and torch.equal(moved.weight, codes)
    assert moved.weight_scale.dtype == moved.bias.dtype == dtype
    assert Counter(p.requires_grad for p in moved.parameters()) == {False: 3}
    x = keyed.noise(0, "x", 0, range(3), (48,))
    assert moved(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(moved(x.to(dtype)).float(), layer(x), rtol=0.02, atol=0.05)
    moved.weight.data.zero_()
    assert torch.equal(layer.weight, codes)


def test_cast_float_stores_floats_only():
    """Before quantization, so that scales follow; int8 codes stay what they are."""
    denoiser = nn.Sequential(linear(), prepared(linear(), "int8"))
    cast_float(denoiser, torch.bfloat16)
    assert Counter(p.dtype for p in denoiser.parameters()) == {torch.bfloat16: 4, torch.int8: 1}
    assert prepared(denoiser[0], "int8").weight_scale.dtype == torch.bfloat16


def test_state_dict_round_trip(flux):
    """Plain tensors: a safetensors file of one prepared network fills another, and the velocity is equal to the bit."""
    family, components = flux
    prepare_base(components.denoiser, "int8", ["**.norm*.linear"], "cpu")
    raw = save(components.denoiser.state_dict())
    other = family.tiny(1)
    prepare_base(other.denoiser, "int8", ["**.norm*.linear"], "cpu")
    other.denoiser.load_state_dict(load(raw), strict=True)
    noisy, sigma = keyed.noise(0, "noise", 0, range(2), components.sample_shape), torch.tensor([0.3, 0.9])
    text = family.encode_text(components, ["3 seven", "one"], 12)
    untrained = family.tiny(0)
    velocities = [family.velocity(p, p.denoiser, noisy, sigma, text) for p in (components, other)]
    assert torch.equal(*velocities)
    assert not torch.equal(velocities[0], family.velocity(untrained, untrained.denoiser, noisy, sigma, text))


def test_layer_with_one_output():
    """One output row: a scale [1, 1], and the same weight as quanto's single scale."""
    layer = nn.Linear(16, 1)
    assert prepared(layer, "int8").weight_scale.shape == (1, 1)
    assert torch.equal(dense_weight(prepared(layer, "int8")), dense_weight(prepared(layer, "int8-quanto")))


def test_quanto_one_by_one_is_quanto_at_once(flux):
    """Converting linears each alone gives the tensors that the library gives for the whole network."""
    _, components = flux
    whole = copy.deepcopy(components.denoiser)
    quantize(whole, weights=qint8, include=linear_names(whole))
    freeze(whole)
    prepare_base(components.denoiser, "int8-quanto", [], "cpu")
    ours, theirs = components.denoiser.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- a way of storing that only this file knows -----------------------------------------------------------------------


class OneScale(nn.Linear):
    """int8 codes with a single scale for the whole weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("one_scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.one_scale, self.bias)


class ByTensor(Quantizer):
    refused: ClassVar = {"fsdp2": "is of this test alone"}

    def convert(self, linear: nn.Linear) -> nn.Linear:
        return OneScale(linear)

    def made(self, module: nn.Module) -> bool:
        return isinstance(module, OneScale)

    def dense(self, linear: nn.Linear) -> torch.Tensor:
        return linear.weight * linear.one_scale


@pytest.fixture
def by_tensor_recipe(adapter_recipe, monkeypatch) -> Recipe:
    monkeypatch.setitem(QUANTIZERS, "by-tensor", ByTensor())
    recipe = load_recipe(adapter_recipe)
    return recipe.model_copy(update={"base": recipe.base.model_copy(update={"quant": "by-tensor"})})


def test_recipes_know_the_quantizers():
    assert get_args(Base.model_fields["quant"].annotation) == tuple(QUANTIZERS)


def test_a_new_quantizer_builds_the_network_it_says(by_tensor_recipe):
    """Stored at a byte a weight, read back by adapters, within a step of its scale of the dense network."""
    plain = build_model(load_recipe(Path(by_tensor_recipe.files[0]), ["base.quant=none"]))
    model = build_model(by_tensor_recipe)
    assert model.facts["quantized"] == linear_names(model.components.denoiser) and not model.facts["unquantized"]
    assert model.facts["storage_bytes"] < 0.35 * plain.facts["storage_bytes"]
    for name in linear_names(model.components.denoiser):
        linear, exact = (
            model.components.denoiser.get_submodule(name),
            dense_weight(plain.components.denoiser.get_submodule(name)),
        )
        assert type(linear) is OneScale
        assert (dense_weight(linear) - exact).abs().max() <= 0.501 * float(linear.one_scale)
    with pytest.raises(UserError, match=r"'by-tensor' is of this test alone, or launch/ddp\.yaml"):
        Fsdp2(by_tensor_recipe, World()).check()


def test_a_run_on_a_new_quantizer_trains_and_is_released(by_tensor_recipe, tmp_path):
    """Through the trainer, and what was trained leaves as an adapter that others load."""
    assert train(by_tensor_recipe, []) == 0
    out = Path(by_tensor_recipe.run.out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["applied"] for row in rows] == [True] * 6 and rows[-1]["val_loss"] < rows[0]["val_loss_start"]
    released = tmp_path / "released" / "x.safetensors"
    last = out / "snapshots" / "step-00000006.safetensors"
    assert export([str(last), "--format", "lycoris", "--out", str(released)]) == 0
    with safe_open(released, "pt") as tensors:
        assert len(tensors.keys()) > 0
