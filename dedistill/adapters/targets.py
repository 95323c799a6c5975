"""Which linears and convolutions get an adapter: exact name patterns, resolved and listed before anything is built.

``transformer_blocks.1.*`` never takes block 10, and ``*.norm1`` never takes ``a.b.norm1``: no prefixes, no surprises.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from torch import nn

from dedistill.errors import UserError

# --- exact name patterns ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = pattern.split(".")
    if any("**" in part and part != "**" for part in parts):
        raise ValueError(f"pattern {pattern!r}: ** stands alone between dots")
    regex = ""
    for i, part in enumerate(parts):
        if part == "**":
            regex += r"(?:[^.]+\.)*" if i < len(parts) - 1 else r"[^.]+(?:\.[^.]+)*"
        else:
            regex += "[^.]*".join(re.escape(piece) for piece in part.split("*"))
            regex += r"\." if i < len(parts) - 1 else ""
    return re.compile(regex)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that ``pattern`` matches whole, in their order. Raises ValueError for a malformed pattern."""
    compiled = _compiled(pattern)
    return [name for name in names if compiled.fullmatch(name)]


# --- which layers get an adapter -------------------------------------------------------------------------------------


Shape = tuple[int, ...]
"""Of a layer's weight: (out, in) of a linear, (out, in, height, width) of a convolution."""


class Target(Protocol):
    """Layers that shall get an adapter of one shape, as in a recipe's [[adapter.targets]]."""

    @property
    def pattern(self) -> str | None: ...

    @property
    def preset(self) -> str | None: ...

    @property
    def factor(self) -> int | None: ...

    @property
    def rank(self) -> int | str | None: ...


class Table(Protocol):
    """A recipe's [adapter] table, as far as it says which linears."""

    @property
    def kind(self) -> str: ...

    @property
    def targets(self) -> Sequence[Target]: ...


@dataclass(frozen=True)
class Resolved:
    """One layer that gets an adapter. rank None: the large LoKr factor is a full matrix."""

    name: str
    shape: Shape
    factor: int | None
    rank: int | None
    pattern: str


def resolve_targets(
    adapter: Table,
    shapes: Mapping[str, Shape],
    presets: Mapping[str, list[str]],
    where: Callable[[str], str] = str,
) -> list[Resolved]:
    """The layers that ``adapter`` (a recipe's [adapter] table) names, in the network's order.

    shapes: of the weight of every linear and convolution. The first target that matches a name wins. Raises UserError when a
    target matches nothing, or only layers that earlier targets already took.
    """
    chosen: dict[str, Resolved] = {}
    for i, target in enumerate(adapter.targets):
        place = where(f"adapter.targets.{i}.{'preset' if target.preset else 'pattern'}")
        found = _names(target, list(shapes), presets, place)
        new = [name for name in found if name not in chosen]
        label = target.preset or target.pattern or ""
        if not new:
            raise UserError(
                f"{place}: '{label}' adds nothing: earlier targets took all {len(found)} of its layers", exit_code=2
            )
        for name in new:
            factor, rank = _form(adapter.kind, target, shapes[name], where(f"adapter.targets.{i}.rank"), name)
            chosen[name] = Resolved(name, shapes[name], factor, rank, pattern=label)
    return [chosen[name] for name in shapes if name in chosen]


def count_parameters(resolved: list[Resolved], kind: str) -> int:
    """Trained numbers of an adapter of ``kind`` on those layers, without building it."""
    return sum(_parameters(target, kind) for target in resolved)


def _parameters(target: Resolved, kind: str) -> int:
    out, in_, *kernel = target.shape
    window = math.prod(kernel)
    if kind == "lora":
        return (target.rank or 1) * (out + in_ * window)
    (small_out, large_out), (small_in, large_in) = (factor_sides(side, target.factor or -1) for side in (out, in_))
    columns = large_in * window
    large = large_out * columns if target.rank is None else target.rank * (large_out + columns)
    return small_out * small_in + large


def factor_sides(size: int, factor: int) -> tuple[int, int]:
    """What LoKr cuts a side of a weight into, the smaller number first, as LyCORIS does: ``factor`` times the rest, or
    where it does not divide ``size``, the largest divisor below it; -1: what is nearest to a square."""
    one = factor
    if factor <= 0 or size % factor:
        below = range(1, math.isqrt(size) + 1)
        one = max((d for d in below if size % d == 0 and (factor < 0 or d <= factor)), default=1)
    return min(one, size // one), max(one, size // one)


def _form(kind: str, target: Target, shape: Shape, where: str, name: str) -> tuple[int | None, int | None]:
    """(factor, rank) of one layer."""
    rank = target.rank if isinstance(target.rank, int) else None  # or in full
    if kind == "lora":
        rows, columns = shape[0], math.prod(shape[1:])
        if rank and rank > min(rows, columns):
            most = f"{rows} x {columns}: at most {min(rows, columns)}"
            raise UserError(f"{where}: {rank} is more than '{name}' has, {most}", 2)
        return None, rank
    factor = target.factor
    large = max(factor_sides(size, factor or -1)[1] for size in shape[:2])
    # from half the larger side on a decomposition saves nothing, and LyCORIS makes the factor full; so say it is
    return factor, rank if rank and rank < large / 2 else None


def _names(target: Target, names: list[str], presets: Mapping[str, list[str]], where: str) -> list[str]:
    if target.preset is not None and target.preset not in presets:
        raise UserError(f"{where}: unknown preset '{target.preset}'; this family has {', '.join(presets)}", exit_code=2)
    patterns = presets[target.preset] if target.preset else [target.pattern or ""]
    try:
        found = {name for pattern in patterns for name in matching(pattern, names)}
    except ValueError as e:
        raise UserError(f"{where}: {e}", exit_code=2) from e
    if not found:
        raise UserError(
            f"{where}: '{target.preset or target.pattern}' matches no linear or convolution of the network; some names: "
            f"{', '.join(names[:: max(1, len(names) // 4)][:4])}",
            exit_code=2,
        )
    return [name for name in names if name in found]


def adaptable(denoiser: nn.Module) -> dict[str, Shape]:
    """name -> shape of its dense weight, of every layer that can have an adapter, in the network's order: linears, quantized
    or not, and convolutions whose channels all see each other."""
    found: dict[str, Shape] = {}
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear):
            found[name] = (layer.out_features, layer.in_features)
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
            found[name] = (layer.out_channels, layer.in_channels, *layer.kernel_size)
    return found
