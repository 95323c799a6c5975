"""How much a block changes what flows through it, and LoKr sizes shared out accordingly.

The angular distance between hidden states is that of Gromov et al. 2024 (arXiv 2403.17887), who used it to find
blocks that can be left out; here it finds blocks worth more trained numbers.
"""

import json

import torch
from torch import Tensor
from torch.nn import functional as F

from dedistill.adapters.targets import Resolved, count_parameters
from dedistill.errors import UserError
from dedistill.patterns import matching

FACTORS = (16, 8, 4, 2, 1)


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """arccos(cos(before, after)) / pi of the last dimension, float64 in [0, 1]: [..., D] and [..., D] -> [...].

    0: same direction, .5: orthogonal, 1: opposite. The half-angle form is exact at both ends, where arccos loses half
    of its digits.
    """
    u, v = F.normalize(before.double(), dim=-1), F.normalize(after.double(), dim=-1)
    return torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1)) * (2 / torch.pi)


def share_out(influence: dict[str, float], shapes: dict[str, tuple[int, int]], budget: int) -> tuple[dict[str, int], int]:
    """A LoKr factor for each block within ``budget`` trained numbers, and how many that takes.

    influence: block name -> distance; shapes: name -> (out, in) of the network's linears. All blocks start at factor 16;
    then the block with the most influence per trained number takes the next smaller factor that still fits, until none
    fits: sizes follow influence. Raises UserError when not even factor 16 everywhere fits.
    """
    layers = {block: [(n, shapes[n]) for n in matching(_pattern(block), shapes)] for block in influence}
    sizes = {block: [_size(rows, factor) for factor in FACTORS] for block, rows in layers.items()}
    level = dict.fromkeys(influence, 0)
    used = sum(size[0] for size in sizes.values())
    if used > budget:
        raise UserError(f"--budget: {budget:,} is too little: factor {FACTORS[0]} on every block takes {used:,}", exit_code=2)

    def cost(block: str) -> int:
        return sizes[block][level[block] + 1] - sizes[block][level[block]]

    while True:
        open_ = [b for b in influence if level[b] + 1 < len(FACTORS) and used + cost(b) <= budget]
        if not open_:
            return {block: FACTORS[level[block]] for block in influence}, used
        best = max(open_, key=lambda b: influence[b] / sizes[b][level[b]])
        used += cost(best)
        level[best] += 1


def recipe_fragment(factors: dict[str, int], extends: str, note: str) -> str:
    """The recipe at ``extends`` with ``factors`` as its adapter's targets, as TOML; ``note`` becomes a comment."""
    lines = [f"# {note}", f"extends = {json.dumps(extends)}", "", "[adapter]", 'kind = "lokr"']
    for block, factor in factors.items():
        lines += ["", "[[adapter.targets]]", f"pattern = {json.dumps(_pattern(block))}", f"factor = {factor}"]
    return "\n".join(lines) + "\n"


def _pattern(block: str) -> str:
    return f"{block}.**"


def _size(rows: list[tuple[str, tuple[int, int]]], factor: int) -> int:
    return count_parameters([Resolved(name, shape, factor, None, name) for name, shape in rows], "lokr")
