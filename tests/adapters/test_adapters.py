"""What an adapter adds to a layer, to a network and to a file, on dense and on quantized bases."""

from types import SimpleNamespace

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from safetensors.torch import load_file, save_file
from tiny_recipes import adapter_table
from torch import nn
from torch.nn import functional as F

from dedistill.adapters.attach import Adapter, delta, initialise
from dedistill.adapters.files import read_tensors
from dedistill.adapters.naming import file_name
from dedistill.adapters.targets import Resolved, adaptable, resolve_targets
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.quantize import cast_float, dense_weight, prepare_base

FAMILY = PixelFlux()
FORMS = {
    "lokr": {"kind": "lokr", "targets": [{"preset": "blocks", "factor": 4}]},
    "lokr-rank": {"kind": "lokr", "targets": [{"preset": "blocks", "factor": 4, "rank": 2}]},
    "lora": {"kind": "lora", "targets": [{"preset": "blocks", "rank": 3}]},
}
QUANTS = ["none", "int8", "int8-quanto"]
FACTOR_NAMES = {
    "lokr": {"lokr_w1", "lokr_w2"},
    "lokr-rank": {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    "lora": {"lora_up.weight", "lora_down.weight"},
}

every_form = pytest.mark.parametrize("form", FORMS)
every_quant = pytest.mark.parametrize("quant", QUANTS)


def attach(components, table: dict) -> Adapter:
    shapes = adaptable(components.denoiser)
    table = adapter_table(table["kind"], *table["targets"])
    return Adapter(components.denoiser, table.kind, resolve_targets(table, shapes, FAMILY.presets(components.denoiser)))


def build(form: str, quant: str = "none", dtype: torch.dtype = torch.float32, *, size: float = 0.2) -> SimpleNamespace:
    """A tiny network with an adapter whose factors are normal with deviation ``size``; 0 leaves them as LyCORIS does."""
    components = FAMILY.tiny(0)
    cast_float(components.denoiser, dtype)
    prepare_base(components.denoiser, quant, [], "cpu")
    adapter = attach(components, FORMS[form])
    if size:
        fill(adapter, size)
    return SimpleNamespace(components=components, denoiser=components.denoiser, adapter=adapter)


@torch.no_grad()
def fill(adapter: Adapter, size: float, seed: int = 0) -> None:
    for name, p in adapter.trainable().items():
        p.copy_(torch.from_numpy(keyed.generator(seed, name).standard_normal(tuple(p.shape), dtype="float32")) * size)


def velocity(components) -> torch.Tensor:
    """The velocity [2, 1, 8, 16] of a fixed question."""
    text = FAMILY.encode_text(components, ["two then three", "a handwritten seven then a 4"], 12)
    noisy = keyed.noise(0, "question", 0, range(2), components.sample_shape)
    return FAMILY.velocity(components, components.denoiser, noisy, torch.tensor([0.3, 0.8]), text)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).detach().norm() / wanted.detach().double().norm())


@every_quant
@every_form
def test_every_layer_answers_as_dense_weight_plus_delta(form, quant):
    """The bypass form equals the materialised Kronecker or low-rank product, quantized or not."""
    own = build(form, quant)
    for name, module in own.adapter.by_target.items():
        linear = own.denoiser.get_submodule(name)
        x = keyed.noise(0, name, 0, range(7), (linear.in_features,))
        change = delta(module).detach()
        wanted = F.linear(x.double(), dense_weight(linear).double() + change.double(), linear.bias.double())
        assert relative(linear(x).detach(), wanted) < 1e-6, name
        assert change.norm() > 1e-3 * dense_weight(linear).norm(), "the change must be large enough to be seen"
    assert len(own.adapter.by_target) == 20


@every_form
def test_forward_delta_and_reload_agree(form, tmp_path):
    """What training sees, the change of weight and what a file gives back are one."""
    own, plain = build(form), FAMILY.tiny(0)
    adapted = velocity(own.components).detach()
    assert relative(velocity(plain).detach(), adapted) > 1e-3
    with torch.no_grad():
        for name, module in own.adapter.by_target.items():
            plain.denoiser.get_submodule(name).weight += delta(module)
    assert relative(velocity(plain).detach(), adapted) < 1e-6
    save_file(own.adapter.tensors(), tmp_path / "a.safetensors", metadata={"format": "pt", "who": "a"})
    tensors, header = read_tensors(tmp_path / "a.safetensors")
    other = build(form, size=0.4)
    assert not torch.equal(velocity(other.components), adapted)
    other.adapter.load_tensors(tensors, "a.safetensors")
    assert torch.equal(velocity(other.components), adapted)
    assert header["who"] == "a"


@every_form
def test_bypass_keeps_a_small_delta_in_bf16(form):
    """Of a delta 1e-3 of the weight, the bypass branch keeps 99 %; the rebuilt weight loses most of it."""
    own = build(form, dtype=torch.bfloat16)
    for name, module in own.adapter.by_target.items():
        linear = own.denoiser.get_submodule(name)
        weight = dense_weight(linear)
        initialise(module, name, lambda w=weight: w, init="perturbed_normal", scale=1e-3, seed=0)
        x = keyed.noise(0, name, 0, range(256), (linear.in_features,)).bfloat16()
        change = delta(module).detach()
        wanted = F.linear(x.double(), change.double())

        def kept(branch: torch.Tensor, wanted=wanted) -> float:
            return float((branch.double() * wanted).sum() / wanted.square().sum())

        module.org_forward = lambda x, n=linear.out_features: x.new_zeros(*x.shape[:-1], n)
        branch = module(x).detach()
        assert kept(branch) > 0.99 and relative(branch, wanted) < 0.01, name
        rounded = (weight.bfloat16() + change.bfloat16()) - weight.bfloat16()
        assert relative(F.linear(x.float(), rounded.float()), wanted) > 0.5, "the control must show the loss"


@every_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_gives_what_lycoris_gives(form, dtype):
    """Output and every gradient of our forward against those of the library, whose parameters it has."""
    own = build(form, dtype=dtype)
    for name, module in own.adapter.by_target.items():
        module.to(dtype)
        module.scale, module.multiplier = 0.5, 1.5
        linear = own.denoiser.get_submodule(name)
        x = keyed.noise(0, name, 0, range(6), (3, linear.in_features)).to(dtype).requires_grad_()
        weights = [x, *module.parameters()]
        ours = module(x)
        theirs = module.bypass_forward(x, module.multiplier)
        above = keyed.noise(1, name, 0, range(6), tuple(ours.shape[1:])).to(dtype)
        found = (ours, *torch.autograd.grad(ours, weights, above))
        wanted = (theirs, *torch.autograd.grad(theirs, weights, above))
        limit = 1e-12 if dtype == torch.float64 else 2e-6
        assert max(relative(a, b) for a, b in zip(found, wanted)) < limit, name


def test_two_adapters_in_one_process_are_independent(monkeypatch):
    """No class-level state leaks, be it from another adapter or from LyCORIS' own presets."""
    first, second = FAMILY.tiny(0), FAMILY.tiny(0)
    a = attach(first, {"kind": "lokr", "targets": [{"preset": "attention", "factor": 4}]})
    fill(a, 0.2)
    before = velocity(first)
    monkeypatch.setattr(LycorisNetwork, "NAME_ALGO_MAP", {"*": {"algo": "loha", "factor": 2}})
    monkeypatch.setattr(LycorisNetwork, "TARGET_EXCLUDE_NAME", ["*"])
    b = attach(second, {"kind": "lokr", "targets": [{"preset": "mlp", "factor": 8}]})
    fill(b, 0.2)
    assert torch.equal(velocity(first), before)
    assert not torch.equal(velocity(second), before)
    assert {m.lokr_w1.shape for m in a.by_target.values()} == {(4, 4)}
    assert {m.lokr_w1.shape for m in b.by_target.values()} == {(8, 4), (4, 8)}  # 32 = 4 * 8: the smaller part comes first
    assert not a.by_target.keys() & b.by_target.keys()
    b.detach_from_base()
    assert torch.equal(velocity(first), before)


@every_quant
@every_form
def test_detaching_gives_the_base_back_bit_for_bit(form, quant):
    """The frozen network answers as if nothing had ever sat on it."""
    plain = FAMILY.tiny(0)
    prepare_base(plain.denoiser, quant, [], "cpu")
    base = velocity(plain)
    own = build(form, quant)
    assert not torch.equal(velocity(own.components), base)
    own.adapter.detach_from_base()
    assert torch.equal(velocity(own.components), base)
    assert own.denoiser.state_dict().keys() == plain.denoiser.state_dict().keys()


@every_quant
@every_form
def test_gradient_reaches_every_factor_and_nothing_else(form, quant):
    """LyCORIS' start has no gradient in the first factor; one step later every factor has one, the base never."""
    own = build(form, quant, size=0)
    params = own.adapter.trainable()
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    velocity(own.components).square().mean().backward()
    silent = {n for n, p in params.items() if not p.grad.any()}
    first = {"lokr": ("lokr_w1",), "lokr-rank": ("lokr_w1", "lokr_w2_a"), "lora": ("lora_down.weight",)}[form]
    assert silent == {n for n in params if n.endswith(first)}
    optimizer.step()
    optimizer.zero_grad()
    velocity(own.components).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in params.values())
    assert not any(p.requires_grad or p.grad is not None for p in own.denoiser.parameters())
    assert not {id(p) for p in own.adapter.parameters()} & {id(p) for p in own.denoiser.parameters()}


@every_form
def test_tensors_are_private_copies(form):
    """A saved state does not follow the training, nor the training a changed state."""
    own = build(form)
    saved = own.adapter.tensors()
    kept = {n: t.clone() for n, t in saved.items()}
    fill(own.adapter, 0.3, seed=1)
    assert all(torch.equal(saved[n], kept[n]) for n in kept)
    now = velocity(own.components)
    for tensor in own.adapter.tensors().values():
        assert tensor.is_contiguous() and not tensor.requires_grad
        tensor.fill_(9.0)
    assert torch.equal(velocity(own.components), now)


@every_form
def test_names_and_scale_are_those_of_the_format(form):
    """lycoris_<path with _>, alpha = rank, so every reader's scale is 1."""
    own = build(form)
    tensors = own.adapter.tensors()
    wanted = {f"lycoris_{n.replace('.', '_')}.{part}" for n in own.adapter.by_target for part in FACTOR_NAMES[form] | {"alpha"}}
    assert tensors.keys() == wanted
    rank = {"lokr": 1, "lokr-rank": 2, "lora": 3}[form]
    for name, module in own.adapter.by_target.items():
        assert module.scale == 1 and module.lora_dim == rank
        assert float(tensors[f"{file_name(name)}.alpha"]) == rank


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "other form", "alpha"])
def test_wrong_files_are_refused_and_change_nothing(damage):
    """Names, shapes and alphas agree exactly, or nothing is copied."""
    own = build("lokr")
    before = own.adapter.tensors()
    tensors = {n: t if n.endswith(".alpha") else t + 1 for n, t in before.items()}
    name = max(n for n in tensors if not n.endswith(".alpha"))
    if damage == "missing":
        del tensors[name]
    elif damage == "unknown":
        tensors["lycoris_blocks_7.lokr_w1"] = torch.zeros(4, 4)
    elif damage == "alpha":
        name = min(n for n in tensors if n.endswith(".alpha"))
        tensors[name] = torch.tensor(16.0)
    elif damage == "shape":
        tensors[name] = tensors[name].T.reshape(-1)
    else:
        tensors = build("lora").adapter.tensors()
    named = {"unknown": "lycoris_blocks_7.lokr_w1", "other form": "lora_down", "alpha": f"{name} 16, expected 1"}
    with pytest.raises(UserError, match=f"'here.safetensors' does not fit.*{named.get(damage, name)}"):
        own.adapter.load_tensors(tensors, "here.safetensors")
    assert all(torch.equal(t, before[n]) for n, t in own.adapter.tensors().items())


@every_form
def test_lycoris_itself_reads_our_files(form, tmp_path):
    """Save -> create_lycoris_from_weights (bypass) -> the same output."""
    own, plain = build(form), FAMILY.tiny(0)
    save_file(own.adapter.tensors(), tmp_path / "a.safetensors")
    with torch.no_grad():
        network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), plain.denoiser)
        for module in network.loras:
            module.bypass_mode = True
        network.apply_to()
        found, wanted = velocity(plain), velocity(own.components)
        assert len(network.loras) == len(own.adapter.by_target)
        assert relative(found, wanted) < 1e-6
        network.restore()
        assert relative(velocity(plain), wanted) > 1e-3
    assert load_file(tmp_path / "a.safetensors").keys() == own.adapter.tensors().keys()


@pytest.mark.parametrize(
    ("size", "factor", "small"),
    [
        *[(127, -1, 1), (127, 4, 1), (250, 4, 2), (360, 16, 15), (512, 4, 4), (24, 8, 3), (1024, -1, 32)],
        *[(9216, 10, 9), (12288, 10, 8), (15360, 10, 10), (3072, 16, 16), (3072, 7, 6)],
    ],
)
def test_table_of_factors(size, factor, small):
    """w1 is (l x m), w2 (k x n) with out = l k, in = m n; the largest divisor not above the factor, smaller part first.

    LyCORIS' own table says 12 x 30 for 360 at factor 16, its code 15 x 24: that is what the rule gives.
    """
    with torch.device("meta"):
        denoiser = nn.ModuleDict({"wide": nn.Linear(6, size), "tall": nn.Linear(size, 6)})
        adapter = Adapter(denoiser, "lokr", [Resolved(n, (0, 0), factor, None, n) for n in denoiser])
    wide, tall = adapter.by_target["wide"], adapter.by_target["tall"]
    assert (wide.lokr_w1.shape[0], wide.lokr_w2.shape[0]) == (small, size // small)
    assert (tall.lokr_w1.shape[1], tall.lokr_w2.shape[1]) == (small, size // small)


@pytest.mark.parametrize(("rank", "full"), [(11, False), (12, True), (40, True)])
def test_a_rank_of_half_the_factor_is_a_full_matrix(rank, full):
    """With w2 of 24 x 8, a rank from 12 on is kept whole, and still has scale 1."""
    denoiser = nn.ModuleDict({"linear": nn.Linear(32, 96)})
    module = Adapter(denoiser, "lokr", [Resolved("linear", (96, 32), 4, rank, "linear")]).by_target["linear"]
    assert module.use_w2 is full and module.scale == 1 and float(module.alpha) == rank
    assert delta(module).shape == (96, 32)
