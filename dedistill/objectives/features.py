"""The second stage of one-step distillation: images are compared as the frozen base sees them, beside pixel by pixel.

InstaFlow takes LPIPS there, a network of its own with pixels to decode for it. Here the features are those of the base's own
middle block on latents, which needs nothing: both images at the same little noise, and the distance as a share of their size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dedistill.flow.path import denoised, flow_loss, interpolate
from dedistill.models.conditioning import Conditioning
from dedistill.models.family import Output
from dedistill.models.model import Model
from dedistill.objectives.base import NoisyBatch
from dedistill.objectives.endpoint import Endpoint

SIGMA = 0.25
"""At which the base looks at images: little enough that all but their finest details are seen, and a level it knows well."""


class Features(Endpoint):
    name = "features"

    def loss(self, model: Model, batch: NoisyBatch) -> Tensor:
        noise, sigma, target = (t.to(model.device) for t in (batch.noisy, batch.sigma, batch.target))
        text = batch.conditioning(model)
        v = model.velocity(noise, sigma, text)
        with model.as_base():
            made = features(model, denoised(noise, sigma, v), noise, text)
            with torch.no_grad():
                real = features(model, noise - target, noise, text)
        size = real.square().flatten(1).mean(1).clamp(min=1e-12)
        return flow_loss(v, target, self.huber) + flow_loss(made, real) / size


def features(model: Model, images: Tensor, noise: Tensor, text: Conditioning) -> Tensor:
    """Hidden states [B, N, D] of ``images``, float32: of the blocks with the fewest positions, the one in the middle."""
    sigma = torch.full((len(images),), SIGMA, device=images.device)
    with seen(model, text) as states:
        model.velocity(interpolate(images, noise, sigma), sigma, text)
    fewest = min(s.shape[1] for s in states)
    deepest = [s for s in states if s.shape[1] == fewest]
    return deepest[len(deepest) // 2].float()


@contextmanager
def seen(model: Model, text: Conditioning) -> Iterator[list[Tensor]]:
    """The image's hidden states after each block, as they come, while this lasts."""
    states: list[Tensor] = []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output) -> None:
        states.append(model.family.states(args, kwargs, output, text)["image"][1])

    hooks = [b.register_forward_hook(keep, with_kwargs=True) for b in model.family.blocks(model.components.denoiser)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
