"""How far each block of a network turns the hidden states that pass through it while it makes pictures."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dedistill.adapters.influence import angular_distance
from dedistill.assemble import Model
from dedistill.errors import UserError
from dedistill.flow.solvers import euler, sigma_grid
from dedistill.sampling.sampler import start_noise

STREAMS = ("picture", "text")


@dataclass(frozen=True)
class Influence:
    """distance [blocks, 2, sigmas], float64: the mean over prompts of the mean over real tokens, picture and text."""

    blocks: list[str]
    sigmas: list[float]
    distance: Tensor
    prompts: int

    def per_block(self) -> dict[str, float]:
        """Mean over sigmas and both streams."""
        return dict(zip(self.blocks, self.distance.mean((1, 2)).tolist()))


class Meter:
    """Sums the angular distance between what goes into each of ``blocks`` and what comes out, over samples.

    Blocks take ``hidden_states`` [B, I, D] and ``encoder_hidden_states`` [B, T, D] by name and return (text, picture),
    as diffusers' joint-attention blocks do.
    """

    def __init__(self, blocks: list[nn.Module], sigmas: int):
        self.blocks = blocks
        self.sums = torch.zeros(len(blocks), len(STREAMS), sigmas, dtype=torch.float64)
        self.samples = torch.zeros(sigmas, dtype=torch.float64)

    @contextmanager
    def watch(self, sigma: int, mask: Tensor) -> Iterator[None]:
        """Count one call of the network at the sigma of that index; mask [B, T]: real text tokens, first in each row."""
        hooks = [b.register_forward_hook(self._hook(i, sigma, mask), with_kwargs=True) for i, b in enumerate(self.blocks)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.samples[sigma] += len(mask)

    def _hook(self, block: int, sigma: int, mask: Tensor) -> Callable[..., None]:
        return partial(self._record, self.sums[block, :, sigma], mask)

    @staticmethod
    def _record(sums: Tensor, mask: Tensor, _block: nn.Module, _args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
        text, picture = output
        real = mask[:, : text.shape[1]].double()
        turned = angular_distance(kwargs["encoder_hidden_states"], text) * real
        sums[0] += angular_distance(kwargs["hidden_states"], picture).mean(1).sum().cpu()
        sums[1] += (turned.sum(1) / real.sum(1)).sum().cpu()


@torch.no_grad()
def measure(model: Model, prompts: list[str], *, sigmas: int, batch: int, seed: int = 0) -> Influence:
    """Influence of the model's blocks along its own Euler trajectories of ``sigmas`` steps without guidance.

    Every prompt has the noise of its place in the list, and weighs the same whatever its length; ``batch`` is only how
    many run at once. Raises UserError when states are not finite.
    """
    names = {module: name for name, module in model.parts.net.named_modules()}
    blocks = model.family.blocks(model.parts.net)
    grid, meter = sigma_grid(sigmas), Meter(blocks, sigmas)
    noise = start_noise(seed, len(prompts), model.parts.picture)
    training = model.root.training
    model.root.eval()
    for start in range(0, len(prompts), batch):
        text = model.encode(prompts[start : start + batch])

        def velocity(noisy: Tensor, sigma: float, index: int, text=text) -> Tensor:
            with meter.watch(index, text.mask):
                return model.velocity(noisy, torch.full((len(noisy),), sigma, device=noisy.device), text)

        for _ in euler(velocity, noise[start : start + batch].to(model.device), grid):
            pass
    model.root.train(training)
    distance = meter.sums / meter.samples
    if not distance.isfinite().all():
        block, _, sigma = (~distance.isfinite()).nonzero()[0].tolist()
        raise UserError(f"hidden states of {names[blocks[block]]} are not finite at sigma {grid[sigma]:.3g}")
    return Influence([names[b] for b in blocks], grid[:-1].tolist(), distance, len(prompts))
