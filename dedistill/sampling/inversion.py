"""A user's image as a model's noise, and images that the model makes of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from dedistill.data.images.decode import BadImage, decode
from dedistill.errors import UserError, enough_memory
from dedistill.flow.guidance import CONDITIONAL, Branch, ClassifierFree
from dedistill.flow.inversion import edited, inverted
from dedistill.flow.path import interpolate
from dedistill.flow.solvers import sigma_grid
from dedistill.models.conditioning import Conditioning
from dedistill.models.model import Model
from dedistill.sampling.sampler import Sampling, guided, start_noise


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """How an image becomes a state of the path, and for how long it is held to it on the way back.

    start, stop: shares of the sampler's steps. The path begins in step ``start``, and the image draws until ``stop``.
    """

    gamma: float = 0.5
    start: float = 0.0
    stop: float = 0.25
    fast: bool = False
    """The state is on the straight line from image to noise, as gamma = 1 makes it; no call of the model."""
    seed: int = 0
    source: str = ""
    """Prompt of the inversion: what the image shows; empty: nothing is said of it."""
    null: Literal["empty", "zeros"] = "empty"
    """What nothing is: the empty prompt, or its conditioning with zeros in it."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1 or not self.start <= self.stop <= 1:
            raise UserError("--start and --stop: 0 <= start < 1 and start <= stop <= 1 are needed", 2)
        if not 0 <= self.gamma <= 1:
            raise UserError(f"--gamma {self.gamma:g}: 0 to 1 is needed", 2)
        if self.source and self.null == "zeros":
            raise UserError("--null zeros: has no effect with --source; leave one out", 2)

    def first(self, steps: int) -> int:
        """The step in which the path begins."""
        return _step(self.start, steps)

    def eta(self, eta: float, steps: int, i: int) -> float:
        """The share of step ``i`` of ``steps``."""
        return eta if self.first(steps) <= i < _step(self.stop, steps) else 0.0


def _step(share: float, steps: int) -> int:
    """The first step that does not begin before ``share``; .29 of 100 is 29, whatever rounding makes of it."""
    return -int(-(share * steps - 1e-9) // 1)


def read_image(path: Path, height: int, width: int) -> Tensor:
    """The image in a file, its middle, as [1, 3, height, width] in [-1, 1]."""
    try:
        with enough_memory(f"decoding '{path}'"):
            image = decode(path.read_bytes())
    except OSError as e:
        raise UserError(f"'{path}': {e.strerror or e}", 2) from e
    except BadImage as e:
        raise UserError(f"'{path}': {e}", 2) from e
    whole = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    levels = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).reshape(1, height, width, 3)
    return levels.permute(0, 3, 1, 2).float() / 127.5 - 1


def encoded(model: Model, pixels: Tensor) -> Tensor:
    """What the denoiser sees of one image, the middle of what the codec tells of it: float32, on the model's device."""
    shape = model.components.sample_shape
    return model.family.encode_images(model.components, pixels, torch.zeros(1, *shape)).float().to(model.device)


@torch.no_grad()
def state_of(model: Model, latents: Tensor, steps: int, how: Inversion) -> Tensor:
    """Where the path of ``edit`` begins, of latents [1, C, h, w]."""
    sigmas = sigma_grid(steps, model.grid_shift)[how.first(steps) :]
    noise = start_noise(how.seed, 1, tuple(latents.shape[1:])).to(latents.device)
    if how.fast:
        return interpolate(latents, noise, torch.tensor([sigmas[0]]))
    texts = {CONDITIONAL: said_of_image(model, how)}
    return inverted(guided(model, texts, sigmas, ClassifierFree()), latents, noise, sigmas, how.gamma)


@torch.no_grad()
def edit(
    model: Model,
    texts: Mapping[Branch, Conditioning],
    state: Tensor,
    latents: Tensor,
    sampling: Sampling,
    how: Inversion,
    eta: float,
) -> Tensor:
    """Latents [1, C, h, w] that ``state`` leads to. texts: of the prompt and the negative one, as ``path`` takes them."""
    steps = sampling.steps
    first, sigmas = how.first(steps), sigma_grid(steps, model.grid_shift)
    velocity = guided(model, texts, sigmas, sampling.guidance)
    return edited(
        sampling.solver,
        lambda noisy, sigma, i: velocity(noisy, sigma, first + i),
        state,
        latents,
        sigmas[first:],
        lambda i: how.eta(eta, steps, first + i),
    )


def said_of_image(model: Model, how: Inversion) -> Conditioning:
    """What the model is told while it inverts, and where it is to give the image back."""
    text = model.encode([how.source])
    return text.each(lambda t: torch.zeros_like(t) if t.is_floating_point() else t) if how.null == "zeros" else text
