"""How much each block changes what flows through it, and LoKr sizes shared out accordingly.

The angular distance between hidden states is that of Gromov et al. 2024 (arXiv 2403.17887), who used it to find
blocks that can be left out; here it finds blocks worth more trained parameters.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dedistill.adapters.targets import Resolved, Shape, count_parameters, matching
from dedistill.errors import UserError
from dedistill.flow.solvers import sigma_grid, solve
from dedistill.models.conditioning import Conditioning
from dedistill.models.family import Family, Output
from dedistill.models.model import Model
from dedistill.sampling.sampler import start_noise

# --- how much a block changes what flows through it, and LoKr sizes shared out accordingly ---------------------------


FACTORS = (16, 8, 4, 2, 1)
USUAL = 600_000_000


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """arccos(cos(before, after)) / pi of the last dimension, float64 in [0, 1]: [..., D] and [..., D] -> [...].

    0: same direction, .5: orthogonal, 1: opposite. The half-angle form is exact at both ends, where arccos loses half
    of its digits.
    """
    u, v = F.normalize(before.double(), dim=-1), F.normalize(after.double(), dim=-1)
    return torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) * (2 / torch.pi)


def share_out(influence: dict[str, float], shapes: Mapping[str, Shape], budget: int) -> tuple[dict[str, int], int]:
    """A LoKr factor for each block within ``budget`` trained parameters, and how many that takes.

    influence: block name -> distance; shapes: of the weights of the network's layers. All blocks start at factor 16;
    then the block with the most influence per trained number takes the next smaller factor that still fits, until none
    fits: sizes follow influence. Raises UserError when not even factor 16 everywhere fits.
    """
    sizes = _sizes(influence, shapes)
    level = dict.fromkeys(influence, 0)
    used = sum(size[0] for size in sizes.values())
    if used > budget:
        raise UserError(f"--budget: {budget:,} is too small: factor {FACTORS[0]} on every block takes {used:,}", exit_code=2)

    def cost(block: str) -> int:
        return sizes[block][level[block] + 1] - sizes[block][level[block]]

    while True:
        open_ = [b for b in influence if level[b] + 1 < len(FACTORS) and used + cost(b) <= budget]
        if not open_:
            return {block: FACTORS[level[block]] for block in influence}, used
        best = max(open_, key=lambda b: influence[b] / sizes[b][level[b]])
        used += cost(best)
        level[best] += 1


def usual_budget(blocks: Iterable[str], shapes: Mapping[str, Shape]) -> int:
    """600 million trained parameters; of a small network half of what the smallest factor takes on all blocks, since a budget
    that is enough for all tells no block from another."""
    return min(USUAL, sum(sizes[-1] for sizes in _sizes(blocks, shapes).values()) // 2)


def _sizes(blocks: Iterable[str], shapes: Mapping[str, Shape]) -> dict[str, list[int]]:
    """Trained parameters of each block at each of FACTORS."""
    layers = {block: [(n, shapes[n]) for n in matching(_pattern(block), shapes)] for block in blocks}
    return {block: [_size(rows, factor) for factor in FACTORS] for block, rows in layers.items()}


def recipe_fragment(factors: dict[str, int], extends: str, note: str) -> str:
    """The recipe at ``extends`` with ``factors`` as its adapter's targets, as TOML; ``note`` becomes a comment."""
    lines = [f"# {note}", f"extends = {json.dumps(extends)}", "", "[adapter]", 'kind = "lokr"']
    for block, factor in factors.items():
        lines += ["", "[[adapter.targets]]", f"pattern = {json.dumps(_pattern(block))}", f"factor = {factor}"]
    return "\n".join(lines) + "\n"


def _pattern(block: str) -> str:
    return f"{block}.**"


def _size(rows: list[tuple[str, Shape]], factor: int) -> int:
    return count_parameters([Resolved(name, shape, factor, None, name) for name, shape in rows], "lokr")


# --- how far each block of a network turns the hidden states that pass through it while it makes images ------------


@dataclass(frozen=True)
class Influence:
    """distance [blocks, streams, sigmas], float64: the mean over prompts of the mean over what counts in a stream."""

    blocks: list[str]
    streams: list[str]
    """Kinds of hidden states, e.g. image and text."""
    sigmas: list[float]
    distance: Tensor
    prompts: int

    def per_block(self) -> dict[str, float]:
        """Mean over sigmas and all streams."""
        return dict(zip(self.blocks, self.distance.mean((1, 2)).tolist()))


class Meter:
    """Sums the angular distance between what goes into each of the blocks and what comes out, over samples."""

    def __init__(self, family: Family, blocks: list[nn.Module], sigmas: int):
        self.family, self.blocks, self.sigmas = family, blocks, sigmas
        self.sums: dict[str, Tensor] = {}
        """Stream -> [blocks, sigmas]."""
        self.samples = torch.zeros(sigmas, dtype=torch.float64)

    @contextmanager
    def watch(self, sigma: int, text: Conditioning) -> Iterator[None]:
        """Count one call of the network at the sigma of that index."""
        hooks = [
            block.register_forward_hook(partial(self._record, i, sigma, text), with_kwargs=True)
            for i, block in enumerate(self.blocks)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.samples[sigma] += len(text)

    def _record(
        self,
        block: int,
        sigma: int,
        text: Conditioning,
        _block: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Output,
    ) -> None:
        for stream, (before, after, counts) in self.family.states(args, kwargs, output, text).items():
            turned = angular_distance(before, after)
            weights = torch.ones_like(turned) if counts is None else counts.to(turned)
            found = (turned * weights).sum(1) / weights.sum(1)
            sums = self.sums.setdefault(stream, torch.zeros(len(self.blocks), self.sigmas, dtype=torch.float64))
            sums[block, sigma] += found.sum().cpu()

    def distance(self) -> Tensor:
        return torch.stack(list(self.sums.values()), 1) / self.samples


@torch.no_grad()
def measure(model: Model, prompts: list[str], *, sigmas: int, batch: int, seed: int = 0) -> Influence:
    """Influence of the model's blocks along its own Euler trajectories of ``sigmas`` steps without guidance.

    Every prompt has the noise of its place in the list, and weighs the same whatever its length; ``batch`` is only how
    many run at once. Raises UserError when states are not finite.
    """
    names = {module: name for name, module in model.components.denoiser.named_modules()}
    blocks = model.family.blocks(model.components.denoiser)
    grid, meter = sigma_grid(sigmas), Meter(model.family, blocks, sigmas)
    noise = start_noise(seed, len(prompts), model.components.sample_shape)
    with model.evaluating():
        for start in range(0, len(prompts), batch):
            text = model.encode(prompts[start : start + batch])

            def velocity(noisy: Tensor, sigma: float, index: int, text: Conditioning = text) -> Tensor:
                with meter.watch(index, text):
                    return model.velocity(noisy, torch.full((len(noisy),), sigma, device=noisy.device), text)

            for _ in solve("euler", velocity, noise[start : start + batch].to(model.device), grid):
                pass
    distance = meter.distance()
    if not distance.isfinite().all():
        block, _, sigma = (~distance.isfinite()).nonzero()[0].tolist()
        raise UserError(f"hidden states of {names[blocks[block]]} are not finite at sigma {grid[sigma]:.3g}")
    return Influence([names[b] for b in blocks], list(meter.sums), grid[:-1].tolist(), distance, len(prompts))
