"""What a recipe will need, known before it starts: memory, work and the cards it fits, with its settings and with others."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import nn

from dedistill.data.images.buckets import buckets_for
from dedistill.forecast.cards import CARDS, CONTEXT, FITS, GIB, NO, Card, fit, room_on
from dedistill.forecast.depth import GRANULE, Estimate, estimate
from dedistill.forecast.meter import AVERAGES, BASE, OPTIMIZER, TEMPORARY, TRAINED, Meter, Peak, Work
from dedistill.forecast.paper import BACKWARD, FORWARD, NORM, UPDATE, Case, on_paper, shapes_alone
from dedistill.models.family import CAPTIONS, DECODING, Components, Family
from dedistill.models.prompts import blocks_of
from dedistill.models.swap import fewest, saved
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import chosen, filled, make_plan
from dedistill.training.online import planned

MICRO_BATCHES = (1, 2, 4)


@dataclass(frozen=True)
class Setting:
    """Of the keys that decide about memory and time, and about nothing that is learned."""

    quant: str
    checkpointing: bool | int
    micro_batch: int
    swap: int = 0
    matmul: str = "float"

    def __str__(self) -> str:
        quant = "unquantized" if self.quant == "none" else self.quant
        quant += " products" if self.matmul != "float" else ""
        again = "checkpointing" if self.checkpointing is True else f"{int(self.checkpointing)} blocks checkpointed"
        parts = [quant, again if self.checkpointing else "", f"{self.swap} blocks swapped" if self.swap else ""]
        return ", ".join([*filter(None, parts), f"micro-batch {self.micro_batch}"])


@dataclass(frozen=True)
class Outlook:
    """What comes of one setting."""

    setting: Setting
    estimate: Estimate
    micro_steps: int
    """Micro-batches in a step."""

    @property
    def peak(self) -> int:
        return self.estimate.highest[1].bytes

    @property
    def step(self) -> Work:
        """Of a whole step."""
        return self.estimate.total(FORWARD, BACKWARD) * self.micro_steps + self.estimate.total(NORM, UPDATE)


def case_of(recipe: Recipe, family: Family, components: Components) -> Case:
    """The largest sample of ``recipe``, with captions as long as they can be."""
    height, width = largest_image(recipe)
    image = family.latent_shape(components, height, width) if height else components.sample_shape
    preview, sample = None, recipe.sample
    if recipe.preview.every and sample.height and sample.width and sample.height * sample.width > height * width:
        preview = family.latent_shape(components, sample.height, sample.width)
    return Case(recipe, family, image, filled(recipe.model.text_length, "model.text_length"), preview=preview)


def largest_image(recipe: Recipe) -> tuple[int, int]:
    """Height and width in pixels; 0, 0 where the network or the data decide."""
    if recipe.data.source == "pictures":
        sizes = buckets_for(filled(recipe.data.resolutions, "data.resolutions"))
        if recipe.data.pairs and recipe.sample.height and recipe.sample.width:
            sizes = [*sizes, (recipe.sample.height, recipe.sample.width)]
        return max(sizes, key=lambda sides: sides[0] * sides[1])
    return (0, 0)


def setting_of(recipe: Recipe) -> Setting:
    base = recipe.base
    again, swap = chosen(recipe.train.gradient_checkpointing, "train.gradient_checkpointing"), chosen(base.swap, "base.swap")
    return Setting(base.quant, again, make_plan(recipe).micro_batch, swap, base.matmul)


class Outlooks:
    """What comes of a recipe in one setting or another. Each step is measured once, which takes seconds."""

    def __init__(self, case: Case):
        self.case = case
        self._found: dict[str, Estimate] = {}

    @cached_property
    def decoding(self) -> int:
        """Bytes for the image of a preview, in tiles; 0 without previews."""
        recipe = self.case.recipe
        return beside(recipe, self.case.family, [DECODING])[DECODING].least if recipe.preview.every else 0

    def of(self, recipe: Recipe, *, whole: bool = False) -> Outlook:
        """recipe: the case's own, or one of other settings. whole: with what the allocator would hold."""
        here = recipe.model_copy(update={"base": recipe.base.model_copy(update={"swap": 0})})
        key = on_paper(here).model_dump_json()
        if key not in self._found or (whole and not self._found[key].reserved):
            self._found[key] = decoding(estimate(replace(self.case, recipe=here), whole=whole), self.decoding)
        setting = setting_of(recipe)
        return Outlook(setting, self._found[key].swapped(setting.swap), make_plan(recipe).micro_steps)

    def others(self, recipe: Recipe, *, all_of_them: bool) -> Iterator[Outlook]:
        """With other settings, of which a step is the same step, and ``recipe``'s own among them, where no block waits. Those
        that differ in one key, or ``all_of_them``."""
        own = setting_of(recipe)
        own = replace(own, quant={"int8-quanto": "int8"}.get(own.quant, own.quant), swap=0)
        sizes = {n for n in MICRO_BATCHES if recipe.train.batch % n == 0} if not recipe.train.exact else set()
        others = (("int8", "float"), ("int8", "int8"), ("none", "float")) if recipe.adapter else ()
        bases = dict.fromkeys(((own.quant, own.matmul), *others))
        for (quant, matmul), again, micro in product(bases, (True, False), sorted(sizes | {own.micro_batch})):
            setting = Setting(quant, again, micro, matmul=matmul)
            unlike = [(quant, matmul) != (own.quant, own.matmul), again != own.checkpointing, micro != own.micro_batch]
            if all_of_them or sum(unlike) < 2:
                yield self.of(changed(recipe, setting))


def changed(recipe: Recipe, setting: Setting) -> Recipe:
    """``recipe`` with ``setting``."""
    exclude = recipe.base.exclude if setting.quant != "none" else []
    base = recipe.base.model_copy(
        update={"quant": setting.quant, "swap": setting.swap, "exclude": exclude, "matmul": setting.matmul}
    )
    as_it_is = setting.micro_batch == make_plan(recipe).micro_batch
    micro = recipe.train.micro_batch if as_it_is else setting.micro_batch
    train = recipe.train.model_copy(update={"gradient_checkpointing": setting.checkpointing, "micro_batch": micro})
    return recipe.model_copy(update={"base": base, "train": train})


def swapped(found: Outlook, count: int) -> Outlook:
    """``found``, of which nothing waits yet, with ``count`` blocks waiting on the CPU."""
    return replace(found, setting=replace(found.setting, swap=count), estimate=found.estimate.swapped(count))


def swapped_to_fit(found: Outlook, room: float) -> Outlook | None:
    """``found`` with the fewest blocks waiting on the CPU that lets it fit ``room``, where it does not say how many; None
    where none does."""
    if found.setting.swap:
        return found if fit(found.peak, room) == FITS else None
    if found.setting.checkpointing is not True or found.setting.quant == "int8-quanto" or not found.estimate.blocks:
        return None
    count = fewest(found.estimate.blocks, lambda less: fit(found.peak - less, room) == FITS)
    return None if count is None else swapped(found, count)


def fitting(own: Outlook, found: Iterable[Outlook], gb: float) -> list[Outlook]:
    """What of all settings fits a card of ``gb``, if need be with blocks that wait on the CPU; what a card takes the least
    time for first."""
    card = min(CARDS, key=lambda card: (abs(card.gb - gb), card.gb))
    room = room_on(gb)
    fits = (swapped_to_fit(o, room) or (o if fit(o.peak, room) != NO else None) for o in [own, *found])
    distinct = {o.setting: o for o in fits if o}
    return sorted(distinct.values(), key=lambda o: (bool(o.setting.swap), card.seconds(o.step), o.peak))


def decoding(found: Estimate, size: int) -> Estimate:
    """``found``, and an image of a preview that takes ``size`` bytes beside what a step leaves in place."""
    if not size:
        return found
    kinds = _resident(found)
    peak = Peak(sum(kinds.values()) + size, kinds | {TEMPORARY: size})
    held = max(found.reserved, peak.bytes) if found.reserved else 0
    return replace(found, peaks=found.peaks | {(DECODING, ""): peak}, reserved=held)


def _resident(found: Estimate) -> dict[str, int]:
    """Bytes by category of what is there all the time."""
    kinds = found.highest[1].by_category
    return {kind: kinds[kind] for kind in (BASE, TRAINED, OPTIMIZER, AVERAGES) if kind in kinds}


@dataclass(frozen=True)
class Beside:
    """Bytes of what runs before training, or beside it."""

    peak: int
    least: int
    """Where the device has no room for more: with blocks that wait in the memory of the CPU, or in tiles."""


NOTHING = Beside(0, 0)


def beside(recipe: Recipe, family: Family, names: Collection[str] = ()) -> Mapping[str, Beside]:
    """What encoders and codec take while they run, by what they do. names: of these alone."""
    sample = recipe.sample
    height, width = largest_image(recipe)
    height, width = max(height, sample.height or 0), max(width, sample.width or 0)
    found: dict[str, Beside] = defaultdict(lambda: NOTHING)
    if not height:
        return found
    with torch.device("meta"), shapes_alone(card=True), torch.no_grad():
        for name, task in family.passes(
            recipe.model, height, width, filled(recipe.model.text_length, "model.text_length")
        ).items():
            if name in names or not names:
                peak = _highest_of(task.modules, task.call)
                less = sum(map(_saved_at_most, task.modules if name == CAPTIONS else ()))
                found[name] = Beside(peak, min(peak - less, _highest_of(task.modules, task.smaller or task.call)))
    return found


def _highest_of(modules: Iterable[nn.Module], call: Callable[[], object]) -> int:
    meter = Meter("meta", GRANULE)
    with meter:
        for parameter in (p for module in modules for p in module.parameters()):
            meter.follow(parameter, BASE)
        call()
    return max(peak.bytes for peak in meter.peaks("").values())


def online_facts(recipe: Recipe, found: Outlook, image: tuple[int, ...]) -> dict[str, float]:
    """What the pairs cost that a run makes while it trains: how many, calls of the network for each, operations as a share of
    those of all steps, and gigabytes on the disk."""
    pairs, how = planned(recipe)
    micro, steps = make_plan(recipe).micro_batch, recipe.train.steps
    calls = pairs * how.nfe() * found.estimate.total(FORWARD).operations / micro
    return {
        "pairs": pairs,
        "nfe": how.nfe(),
        "share_of_steps": calls / (found.step.operations * steps),
        "disk_gb": pairs * 2 * 2 * math.prod(image) / 1e9,
    }


def _saved_at_most(network: nn.Module) -> int:
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(network)]
    return max(0, saved(sizes, len(sizes)))


# --- as data ---------------------------------------------------------------------------------------------------------


def memory_facts(found: Outlook, passes: Mapping[str, Beside], *, previews: bool) -> dict[str, object]:
    """In GiB, of a whole run: training, and what runs before it or beside."""
    resident = sum(_resident(found.estimate).values())
    there = {n: resident if n == DECODING else 0 for n in passes if n != DECODING or previews}
    return {
        **_highest(found.estimate),
        "reserved_gib": _gib(found.estimate.reserved),
        "context_gib": _gib(CONTEXT),
        "other_gib": {name: _gib(n + passes[name].peak) for name, n in there.items()},
        "at_least_gib": {n: _gib(b + passes[n].least) for n, b in there.items() if passes[n].least < passes[n].peak},
    }


def _highest(found: Estimate) -> dict[str, object]:
    (phase, place), peak = found.highest
    return {
        "peak_gib": _gib(peak.bytes),
        "where": f"{phase}, {place}" if place else phase,
        "by_category_gib": {name: _gib(n) for name, n in peak.by_category.items()},
    }


def peak_facts(found: Estimate) -> dict[str, Any]:
    """Of a step, and whether it fits cards, by their GB."""
    return {**_highest(found), "cards": {card.gb: fit(found.highest[1].bytes, room_on(card.gb)) for card in CARDS}}


def step_facts(found: Outlook, useful: int) -> dict[str, object]:
    """useful: operations of a step without recomputation."""
    step = found.step
    return {
        "tflop": _rounded(step.operations / 1e12),
        "useful_tflop": _rounded(useful / 1e12),
        "gigabytes": _rounded(step.bytes / 1e9),
        "kernels": step.kernels,
    }


def card_facts(on: Callable[[Card], Outlook]) -> list[dict[str, object]]:
    """on: what comes of the recipe on a card."""
    return [
        {
            "card": card.name,
            "gb": card.gb,
            "fit": fit(o.peak, room_on(card.gb)) if card.does(o.step) else NO,
            "seconds": _seconds(card, o),
            "gradient_checkpointing": o.setting.checkpointing,
            "swap": o.setting.swap,
        }
        for card, o in ((card, on(card)) for card in CARDS)
    ]


def other_facts(found: Iterable[Outlook]) -> list[dict[str, object]]:
    return [
        {
            "quant": o.setting.quant,
            "matmul": o.setting.matmul,
            "gradient_checkpointing": o.setting.checkpointing,
            "micro_batch": o.setting.micro_batch,
            "swap": o.setting.swap,
            "peak_gib": _gib(o.peak),
            "tflop": _rounded(o.step.operations / 1e12),
            "seconds": {card.name: _seconds(card, o) for card in CARDS},
        }
        for o in found
    ]


def _seconds(card: Card, found: Outlook) -> float | None:
    """A step takes at least; None where the card has not what it takes."""
    return _rounded(card.seconds(found.step)) if card.does(found.step) else None


def _rounded(number: float) -> float:
    """To four digits."""
    return float(f"{number:.4g}")


def _gib(size: float) -> float:
    return round(size / GIB, 6)
