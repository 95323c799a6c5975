"""LPIPS against the same sums by hand in float64, and as a part of the loss."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.signal import correlate2d
from test_objective import Pairs

from dedistill.data.source import Batch, Slot
from dedistill.errors import UserError
from dedistill.flow.path import denoised
from dedistill.models.lpips import SLICES, Lpips
from dedistill.models.model import build_model
from dedistill.models.registry import get_family
from dedistill.models.unet.tiny import write_tiny_unet
from dedistill.objectives.base import objective_for
from dedistill.recipe.resolve import recipe_of

WIDTHS = (2, 3, 3, 4, 4)


def images(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def tiny_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """The names and order of VGG-16, of few channels."""
    state, before, g = {}, 3, torch.Generator().manual_seed(seed)
    for i, (layers, width) in enumerate(zip(SLICES, WIDTHS)):
        for n in layers:
            state[f"net.slice{i + 1}.{n}.weight"] = torch.randn(width, before, 3, 3, generator=g)
            state[f"net.slice{i + 1}.{n}.bias"] = torch.randn(width, generator=g)
            before = width
        state[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=g)
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(tiny_state() | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, file)
    return file


def by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Of two images [3, H, W], loop by loop."""
    state = {name: t.double().numpy() for name, t in tiny_state().items()}

    def seen(x: np.ndarray) -> list[np.ndarray]:
        x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        found = []
        for i, layers in enumerate(SLICES):
            if i:
                h, w = x.shape[1] // 2, x.shape[2] // 2
                x = x[:, : 2 * h, : 2 * w].reshape(len(x), h, 2, w, 2).max((2, 4))
            for n in layers:
                kernel, bias = (state[f"net.slice{i + 1}.{n}.{part}"] for part in ("weight", "bias"))
                padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
                rows = [sum(correlate2d(p, k, "valid") for p, k in zip(padded, ks)) + c for ks, c in zip(kernel, bias)]
                x = np.maximum(np.stack(rows), 0)
            found.append(x / (np.sqrt((x**2).sum(0)) + 1e-10))
        return found

    parts = zip(seen(a), seen(b))
    return sum(float((state[f"lin{i}.model.1.weight"][0] * (x - y) ** 2).sum(0).mean()) for i, (x, y) in enumerate(parts))


@pytest.mark.parametrize("size", [(16, 16), (35, 22)])
def test_it_is_the_sum_by_hand(size, weights):
    a, b = images(1, 3, 3, *size), images(2, 3, 3, *size)
    found = Lpips(weights, "train.lpips")(a, b)
    wanted = [by_hand(x, y) for x, y in zip(a.double().numpy(), b.double().numpy())]
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)
    assert min(wanted) > 0 and not Lpips(weights, "")(a, a).any()


def test_gradients_are_finite_where_nothing_is_seen(weights):
    """Where all features of a place are 0, a root has no slope."""
    made = Lpips(weights, "")
    with torch.no_grad():
        for name, tensor in made.named_buffers():
            tensor.copy_(-tensor.abs() if name.endswith("bias") else tensor)
    a = images(3, 1, 3, 16, 16).requires_grad_()
    made(a, images(4, 1, 3, 16, 16)).sum().backward()
    assert a.grad.isfinite().all() and not any(p.requires_grad for p in made.parameters())


def test_images_are_large_enough(weights):
    with pytest.raises(UserError, match=r"^train\.lpips: images of 16 x 15 pixels"):
        Lpips(weights, "train.lpips")(images(0, 1, 3, 15, 16), images(1, 1, 3, 15, 16))


def test_another_file_is_refused_by_name(weights, tmp_path):
    with pytest.raises(UserError, match=r"^train\.lpips: '.*none\.safetensors' cannot be read"):
        Lpips(tmp_path / "none.safetensors", "train.lpips")
    state = tiny_state()
    del state["lin3.model.1.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"train\.lpips: '.*less.*' lacks 1 tensor of .* e\.g\. lin3\.model.*save_file"):
        Lpips(tmp_path / "less.safetensors", "train.lpips")


class Latents(Pairs):
    name, image = "latents", (4, 8, 8)

    def draw(self, slots: list[Slot]) -> Batch:
        return replace(super().draw(slots), captions=["a red cat"] * len(slots))


@pytest.mark.parametrize("objective", ["endpoint", "reflow"])
def test_it_is_added_to_the_loss_of_images_that_one_step_reaches(objective, weights, tmp_path):
    """Through the codec, and with gradients that reach the network alone."""
    write_tiny_unet(tmp_path / "model", get_family("sd15").published_config(""))

    def recipe(**train):
        return recipe_of(
            {
                "run": {"name": "a", "out": "a"},
                "model": {"family": "sd15", "path": str(tmp_path / "model")},
                "data": {"source": "pairs", "path": "a"},
                "train": {"objective": objective, "steps": 10, "batch": 2, "lr": 1e-3} | train,
                "sample": {"height": 64, "width": 64},
            }
        )

    model = build_model(recipe())
    plain, other = (objective_for(recipe(**t), Latents(), lambda s: 1.0) for t in ({}, {"lpips": str(weights), "huber": 0.1}))
    batch = plain.noisy_batch(0, np.arange(2))
    loss = other.loss(model, batch)
    loss.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.components.denoiser.parameters())
    codec = model.components.vae
    assert not any(p.requires_grad for p in codec._loaded.parameters())
    with torch.no_grad():
        v = model.velocity(batch.noisy, batch.sigma, batch.conditioning(model))
        made, real = (codec.decode(denoised(batch.noisy, batch.sigma, x), "cpu") for x in (v, batch.target))
        error = plain.loss(model, batch)
    wanted = (error + 0.1**2).sqrt() - 0.1 + Lpips(weights, "")(made, real)
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-4, atol=1e-6)


def test_latents_get_the_gradients_of_their_images(tmp_path):
    """One image after another and decoded again: as all at once."""
    write_tiny_unet(tmp_path, get_family("sd15").published_config(""))
    codec = get_family("sd15").load(recipe_of(MODEL | {"model": {"family": "sd15", "path": str(tmp_path)}}).model, seed=0).vae
    latents = images(5, 2, 4, 2, 3).requires_grad_()
    codec.decode(latents, "cpu").square().sum().backward()
    other = latents.detach().clone().requires_grad_()
    codec._loaded.decode(other / codec._loaded.config.scaling_factor).sample.square().sum().backward()
    torch.testing.assert_close(latents.grad, other.grad, rtol=1e-4, atol=1e-4 * float(other.grad.abs().max()))


MODEL = {
    "run": {"name": "a", "out": "a"},
    "data": {"source": "digits"},
    "train": {"steps": 1, "batch": 1, "lr": 1e-3},
}
