"""One step of training beside diffusers: the same weights, captions, latents and noise through its own pipelines, networks and
schedulers, as its scripts put them together, give the same loss and the same gradient of every tensor."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from test_conformance import LENGTH, SETTINGS
from torch import Tensor
from torch.nn import functional as F

from dedistill.data.source import Batch, Slot
from dedistill.models.model import assemble
from dedistill.models.registry import get_family
from dedistill.objectives.base import objective_for
from dedistill.recipe.resolve import recipe_of

SIDE = 8
"""Of latents; 64 pixels."""
SDE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Latents:
    """Endless latents with captions."""

    name = "latents"

    def __init__(self, channels: int):
        self.image = (channels, SIDE, SIDE)

    def slots(self, seed: int, step: int, batch: int, *, held_out: bool = False) -> list[Slot]:
        return [Slot(str(n), (n,), f"{n} red cats") for n in range(batch)]

    def draw(self, slots: list[Slot]) -> Batch:
        latents = torch.randn(len(slots), *self.image, generator=torch.Generator().manual_seed(1))
        return Batch(latents, [slot.caption for slot in slots])


def straight(data: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy samples and timesteps of its flow models' scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=sigma.tolist())
    return scheduler.scale_noise(data, scheduler.timesteps, noise), scheduler.timesteps


def of_flux(pipe, captions: list[str], data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    noisy, t = straight(data, noise, sigma)
    embeds, pooled, text_ids = pipe.encode_prompt(captions, None, max_sequence_length=LENGTH)
    out = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, *noisy.shape),
        timestep=t / 1000,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=text_ids,
        img_ids=pipe._prepare_latent_image_ids(len(noisy), SIDE // 2, SIDE // 2, "cpu", torch.float32),
    ).sample
    return F.mse_loss(pipe._unpack_latents(out, 8 * SIDE, 8 * SIDE, 8), noise - data)


def of_sd3(pipe, captions: list[str], data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    noisy, t = straight(data, noise, sigma)
    embeds, _, pooled, _ = pipe.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=LENGTH
    )
    return F.mse_loss(pipe.transformer(noisy, embeds, pooled, t).sample, noise - data)


def of_sd15(pipe, captions: list[str], data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    embeds, _ = pipe.encode_prompt(captions, "cpu", 1, False)
    return of_unet(pipe, data, noise, sigma, embeds)


def of_sdxl(pipe, captions: list[str], data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    embeds, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    ids = torch.tensor([[8.0 * SIDE, 8.0 * SIDE, 0, 0, 8.0 * SIDE, 8.0 * SIDE]]).expand(len(data), -1)
    return of_unet(pipe, data, noise, sigma, embeds, {"text_embeds": pooled, "time_ids": ids})


def of_unet(pipe, data: Tensor, noise: Tensor, sigma: Tensor, embeds: Tensor, added: dict | None = None) -> Tensor:
    """At the step of its schedule whose a and b stand to one another as data and noise do."""
    scheduler = DDPMScheduler(**SDE)
    kept = scheduler.alphas_cumprod.double()
    ratio = ((1 - kept) / kept).sqrt()
    t = (ratio[None] - (sigma.double() / (1 - sigma.double()))[:, None]).abs().argmin(1)
    predicted = pipe.unet(scheduler.add_noise(data, noise, t), t, embeds, added_cond_kwargs=added).sample
    return F.mse_loss(predicted, noise)


THEIRS = {"flux": of_flux, "sd3": of_sd3, "sd15": of_sd15, "sdxl": of_sdxl}


@pytest.mark.parametrize("name", THEIRS)
def test_a_step_is_diffusers_own(name, tmp_path):
    family, flow = get_family(name), name in ("flux", "sd3")
    own = {"mask": "none", "t5_mask": False, "text_length": LENGTH if flow else 77} | SETTINGS.get(name, {})
    table = recipe_of(
        {
            "run": {"name": "a", "out": "a"},
            "model": {"family": name, "path": str(tmp_path), "new": None} | own,
            "data": {"source": "digits", "caption_dropout": 0.5},
            "train": {"objective": "flow" if flow else "diffusion", "steps": 1, "batch": 6, "lr": 1e-3},
            "sample": {"height": 8 * SIDE, "width": 8 * SIDE},
        }
    )
    family.write_tiny(table.model, tmp_path, None, full_depth=False)
    components = family.load(table.model, seed=0)
    model = assemble(table, family, components, "cpu")
    objective = objective_for(table, Latents(components.sample_shape[0]), lambda shape: 1.5, components.schedule)
    batch = objective.noisy_batch(0, np.arange(6))
    assert "" in batch.captions and len(set(batch.captions)) > 2
    loss = objective.loss(model, batch).mean()
    loss.backward()
    gradients = {n: p.grad for n, p in components.denoiser.named_parameters()}

    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    data = objective.source.draw(objective.source.slots(0, 0, 6)).latents
    wanted = THEIRS[name](pipe, batch.captions, data, batch.target + data, batch.sigma)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    denoiser = pipe.transformer if flow else pipe.unet
    total = torch.stack([p.grad.norm() for p in denoiser.parameters() if p.grad is not None]).norm()
    for n, parameter in denoiser.named_parameters():
        there, here = (torch.zeros(1) if g is None else g for g in (parameter.grad, gradients[n]))
        assert (here - there).norm() <= 1e-4 * there.norm() + 1e-6 * total, n
