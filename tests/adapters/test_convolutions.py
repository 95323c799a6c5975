"""Adapters on convolutions: what they compute, against LyCORIS' own torch backend, and through every file that holds them."""

import pytest
import torch
from lycoris import LycorisNetwork
from lycoris.modules.locon import LoConModule
from lycoris.modules.lokr import LokrModule
from tiny_recipes import adapter_table
from torch import nn
from torch.nn import functional as F

from dedistill.adapters.attach import Adapter, check_started, delta, initialise
from dedistill.adapters.delta import weight_change
from dedistill.adapters.files import load_lokr
from dedistill.adapters.formats import as_lycoris, as_peft, as_transformer, by_layer, check_shapes
from dedistill.adapters.targets import adaptable, count_parameters, resolve_targets
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.io.safetensors import TensorFile
from dedistill.posthoc.deltas import low_rank_deltas, refactored
from dedistill.release.headers import lycoris_config

FORMS = {
    "lokr": ("lokr", {"factor": 4}),
    "lokr-rank": ("lokr", {"factor": 2, "rank": 2}),
    "lokr-even": ("lokr", {"factor": -1}),
    "lora": ("lora", {"rank": 5}),
}
every_form = pytest.mark.parametrize("form", FORMS)


class Net(nn.Module):
    """Windows of 3 x 3, of 1 x 1, uneven ones, with steps and without padding, and one linear."""

    def __init__(self):
        super().__init__()
        self.first, self.down = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.one, self.odd = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 12, (3, 5), padding="valid", dilation=(2, 1))
        self.groups = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.line = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.line(self.groups(self.odd(self.one(self.down(self.first(x)).sin()).sin()).sin()).mean((2, 3)))


@pytest.fixture(params=FORMS)
def adapted(request):
    """(network, its adapter, kind); factors are normal."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    kind, form = FORMS[request.param]
    targets = resolve_targets(adapter_table(kind, {"pattern": "**"} | form), adaptable(net), {})
    adapter = Adapter(net.requires_grad_(False), kind, targets)
    fill(adapter)
    adapter.targets = targets
    assert count_parameters(targets, kind) == sum(p.numel() for p in adapter.trainable().values())
    return net, adapter, kind


@torch.no_grad()
def fill(adapter: Adapter, seed: int = 0) -> None:
    for name, p in adapter.trainable().items():
        p.copy_(torch.from_numpy(keyed.generator(seed, name).standard_normal(tuple(p.shape), dtype="float32")) * 0.3)


def images() -> torch.Tensor:
    return keyed.noise(0, "image", 0, range(2), (4, 16, 18))


def in_layer(net: nn.Module, name: str) -> torch.Tensor:
    seen = []
    hook = net.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(images())
    hook.remove()
    return seen[0]


def test_convolutions_with_groups_of_channels_are_left_alone():
    net = Net()
    shapes = adaptable(net)
    assert list(shapes) == ["first", "down", "one", "odd", "line"]
    assert all(shape == tuple(net.get_submodule(name).weight.shape) for name, shape in shapes.items())


def test_every_layer_answers_as_its_weight_plus_delta(adapted):
    net, adapter, _ = adapted
    for name, module in adapter.by_target.items():
        layer, x = net.get_submodule(name), in_layer(net, name)
        weight, found = layer.weight + delta(module).view_as(layer.weight), layer(x)
        if isinstance(layer, nn.Linear):
            wanted = F.linear(x, weight, layer.bias)
        else:
            wanted = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def test_forward_and_gradients_are_lycoris_own(adapted):
    net, adapter, kind = adapted
    own = net(images())
    own.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in adapter.trainable().items()}
    theirs = LokrModule if kind == "lokr" else LoConModule
    for module in adapter.by_target.values():
        module.__class__ = theirs
        if kind == "lora" and "dilation" in module.kw_dict:  # forgotten there (4.1.3)
            module.lora_down.dilation = module.kw_dict["dilation"]
        module.zero_grad()
        module.org_module[0].forward = module.forward
    other = net(images())
    other.square().sum().backward()
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    for name, p in adapter.trainable().items():
        torch.testing.assert_close(gradients[name], p.grad, rtol=2e-3, atol=2e-3 * float(p.grad.abs().max()))


def test_merged_is_what_was_trained(adapted):
    net, adapter, _ = adapted
    before = net(images())
    plain = Net()
    plain.load_state_dict(net.state_dict())
    assert not torch.allclose(plain(images()), before, atol=1e-2)
    with torch.no_grad():
        for name, module in adapter.by_target.items():
            weight = plain.get_submodule(name).weight
            weight += delta(module).view_as(weight)
    torch.testing.assert_close(plain(images()), before, rtol=1e-4, atol=1e-4)


def test_bf16_and_strength(adapted):
    net, adapter, _ = adapted
    whole, nothing = net(images()), None
    with adapter.at_strength(0.0):
        nothing = net(images())
    with adapter.at_strength(0.5):
        half = net(images())
    assert not torch.equal(half, whole) and not torch.equal(half, nothing)
    low = net.bfloat16()(images().bfloat16())
    assert low.dtype == torch.bfloat16 and (low.float() - whole).norm() < 0.05 * whole.norm()


def test_files_in_every_format_come_back_as_the_same_change(adapted, tmp_path):
    net, adapter, kind = adapted
    shapes = adaptable(net)
    layers = by_layer(adapter.tensors(), shapes, "file")
    formats = {"lycoris": as_lycoris, "transformer": as_transformer} | ({"peft": as_peft} if kind == "lora" else {})
    for write in formats.values():
        again = by_layer(write(layers), shapes, "file")
        check_shapes(again, shapes, "file")
        for name, factors in layers.items():
            torch.testing.assert_close(weight_change(again[name]), weight_change(factors))
    other = Adapter(Net(), kind, adapter.targets)
    other.load_tensors(adapter.tensors(), "file")
    assert all(torch.equal(other.tensors()[name], tensor) for name, tensor in adapter.tensors().items())


@pytest.mark.parametrize(("layer", "window"), [("first", (1, 1)), ("first", (5, 5)), ("line", (3, 3))])
def test_factors_of_another_window_are_refused(layer, window):
    net = Net()
    rows, columns = adaptable(net)[layer][:2]
    tensors = {
        f"lycoris_{layer}.lora_up.weight": torch.ones(rows, 2, 1, 1),
        f"lycoris_{layer}.lora_down.weight": torch.ones(2, columns, *window),
    }
    layers = by_layer(tensors, adaptable(net), "mine.safetensors")
    with pytest.raises(UserError, match=f"'mine.safetensors': '{layer}' gives a weight of shape"):
        check_shapes(layers, adaptable(net), "mine.safetensors")


@pytest.mark.parametrize("turned", [False, True], ids=["two for four", "four for two"])
def test_a_window_of_one_pixel_may_be_left_out(turned):
    """Programs write the factors of a 1 x 1 convolution with two dimensions, or those of a linear with four."""
    shapes = {"a": (8, 6, 1, 1) if not turned else (8, 6)}
    more = (1, 1) if turned else ()
    tensors = {"lycoris_a.lora_up.weight": torch.ones(8, 2, *more), "lycoris_a.lora_down.weight": torch.ones(2, 6, *more)}
    layers = by_layer(tensors, shapes, "file")
    check_shapes(layers, shapes, "file")
    assert weight_change(layers["a"]).shape == (8, 6)


@pytest.mark.parametrize("init", ["default", "ones", "perturbed_normal"])
def test_starts_are_as_asked_for(adapted, init):
    net, adapter, _ = adapted
    weight = {name: net.get_submodule(name).weight.detach() for name in adapter.by_target}
    scale = 0.01 if init == "perturbed_normal" else None
    with torch.no_grad():
        for p in adapter.parameters():
            p.zero_()
    for name, module in adapter.by_target.items():
        initialise(module, name, lambda n=name: weight[n], init=init, scale=scale, seed=3)
    found = check_started(adapter.by_target, weight.__getitem__, init=init, scale=scale)
    assert all(abs(size - (scale or 0)) < 2e-4 for size in found.values())


def test_averages_of_changes(adapted):
    """Dense ones exactly; brought back to the same sizes where one snapshot is all there is."""
    _, adapter, _ = adapted
    first = by_layer(adapter.tensors(), adaptable(Net()), "file")
    fill(adapter, seed=1)
    second = by_layer(adapter.tensors(), adaptable(Net()), "file")
    weights = torch.tensor([0.25, 0.75]).numpy()
    for name, factors in first.items():
        both = {factor: [tensor, second[name][factor]] for factor, tensor in factors.items()}
        wanted = 0.25 * weight_change(factors) + 0.75 * weight_change(second[name])
        torch.testing.assert_close(low_rank_deltas(both).dense(weights), wanted, rtol=1e-4, atol=1e-5)
        new, missed_by = next(refactored(both, weights[None] * 0 + torch.tensor([[0.0, 1.0]]).numpy()))
        assert all(tensor.shape == factors[factor].shape for factor, tensor in new.items()) and missed_by.error < 1e-3
        torch.testing.assert_close(weight_change(new), weight_change(second[name]), rtol=1e-3, atol=1e-4)


def test_lycoris_builds_the_same_layers_from_our_config(adapted):
    """As SimpleTuner does from lycoris_config.json; preset and all."""
    _, adapter, _ = adapted
    shapes = adaptable(Net())
    config = lycoris_config(by_layer(adapter.tensors(), shapes, "file"), shapes)
    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    try:
        LycorisNetwork.apply_preset(config["apply_preset"])
        theirs = LycorisNetwork(
            Net(), config["multiplier"], config["linear_dim"], alpha=config["linear_alpha"], network_module=config["algo"]
        )
    finally:  # presets are attributes of the class
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)
    theirs.apply_to()
    found = {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    assert found == {n: tuple(t.shape) for n, t in adapter.tensors().items()}


def test_a_lokr_goes_into_a_network_by_peft(adapted, tmp_path):
    net, adapter, kind = adapted
    if kind == "lora":
        return
    wanted, plain = net(images()), Net()
    plain.load_state_dict(net.state_dict())
    file = tmp_path / "mine.safetensors"
    tensors = adapter.tensors()
    with TensorFile(file, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}, {}) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor)
    plain.set_adapters = lambda names: None
    load_lokr(plain, file)
    for layer in ("first", "down", "one", "odd", "line"):
        plain.get_submodule(layer).set_adapter("dedistill")
    torch.testing.assert_close(plain(images()), wanted, rtol=1e-4, atol=1e-4)
