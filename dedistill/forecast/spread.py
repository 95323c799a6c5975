"""Memory of each of several processes by engine: forecast of one that holds everything, less what the others hold of it.

What travels in one piece is counted. What NCCL keeps for itself is not: it lies beside torch's memory.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from dedistill.distributed.world import World
from dedistill.errors import UserError
from dedistill.forecast.depth import Estimate, estimate
from dedistill.forecast.meter import BASE, GATHERED, GRADIENTS, OPTIMIZER, TRAINED, Peak
from dedistill.forecast.paper import BACKWARD, FORWARD, SAMPLING, UPDATE, VALIDATION, Case
from dedistill.recipe.resolve import make_plan
from dedistill.training.engine import Engine
from dedistill.training.fsdp import Fsdp2
from dedistill.training.zero import Zero2, Zero3

ELEMENTS = 50_000_000
"""That travel at once under launch/zero2.json: DeepSpeed keeps a buffer for them."""


UNKNOWN = (
    "not forecast: beside parts of base, adapter and optimizer lies what DeepSpeed has put together, by its own sizes "
    "(launch/zero3.json), and what gradients keep of that"
)


@dataclass(frozen=True)
class Held:
    """What one process needs under ``engine``."""

    engine: type[Engine]
    estimate: Estimate | None
    refused: str = ""
    """Why the recipe cannot be trained so."""
    unknown: str = ""
    """Why it can, and nothing is forecast."""


def held(engine: type[Engine], case: Case, processes: int) -> Held:
    """By each of ``processes`` that train the case's recipe, in which nothing is "auto". engine: one of ``ENGINES``."""
    try:
        engine(case.recipe, World()).check()
    except UserError as e:
        return Held(engine, None, str(e))
    if engine not in PARTS:
        return Held(engine, None, unknown=UNKNOWN)
    accumulates = make_plan(case.recipe).micro_steps > processes
    found = estimate(replace(case, processes=processes))
    return Held(engine, PARTS[engine](found, processes, accumulates))


Change = Callable[[str, str, Peak], dict[str, int]]
"""Phase, place and its peak -> bytes of the categories that are not as where one process holds everything."""


def _each(found: Estimate, change: Change) -> Estimate:
    peaks = {}
    for (phase, place), peak in found.peaks.items():
        kinds = peak.by_category | change(phase, place, peak)
        grown = sum(kinds.values()) - sum(peak.by_category.values())
        peaks[phase, place] = Peak(peak.bytes + grown, {kind: n for kind, n in kinds.items() if n})
    return replace(found, peaks=peaks)


def _whole_bases(found: Estimate, processes: int, accumulates: bool) -> Estimate:
    return found


def _base_in_parts(found: Estimate, processes: int, accumulates: bool) -> Estimate:
    """A part of every tensor of the base. While the network runs also what is around its blocks, the block that computes, and
    the piece in which one travels: its own, which FSDP2 keeps until the next is there, or going back that of the one before."""

    def change(phase: str, place: str, peak: Peak) -> dict[str, int]:
        base = peak.by_category.get(BASE, 0)
        runs = phase in (FORWARD, BACKWARD, VALIDATION, SAMPLING)
        return {
            BASE: -(-base // processes),
            GATHERED: base - sum(found.blocks) + found.in_hand.get(place, 0) if runs else 0,
        }

    return _each(found, change)


def _optimizer_in_parts(found: Estimate, processes: int, accumulates: bool) -> Estimate:
    """A part of the gradient, of the moments, and of the weights in float32 once more, which is what is stepped."""

    def change(phase: str, place: str, peak: Peak) -> dict[str, int]:
        part = -(-peak.by_category[TRAINED] // processes)
        buffer = 4 * ELEMENTS if phase == BACKWARD else 0
        gradients = 2 * part if phase == UPDATE else part if phase != FORWARD or accumulates else 0
        return {OPTIMIZER: -(-peak.by_category.get(OPTIMIZER, 0) // processes) + part, GRADIENTS: gradients + buffer}

    return _each(found, change)


PARTS: dict[type[Engine], Callable[[Estimate, int, bool], Estimate]] = {
    Engine: _whole_bases,
    Fsdp2: _base_in_parts,
    Zero2: _optimizer_in_parts,
}
ENGINES: tuple[type[Engine], ...] = (*PARTS, Zero3)
"""All that spread work over GPUs; of the last one nothing is forecast."""
