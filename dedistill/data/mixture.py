"""Pairs and images in one run: which of them stands at a place, by their shares, and which of its samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dedistill.data.pairs import PairSource
from dedistill.data.source import Batch, Slot, Source
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.recipe import Recipe
from dedistill.recipe.objectives import IMAGES, PAIRS
from dedistill.recipe.resolve import filled


def beside_pairs(recipe: Recipe, images: Source, network: tuple[int, int, int], online: PairSource | None = None) -> Source:
    """``images`` with the pairs among them that ``recipe`` names, or those made ``online``. network: shape of what it samples.
    Raises UserError for pairs of another shape, or of other channels where images are of several shapes."""
    pairs = PairSource(Path(recipe.data.pairs), "data.pairs") if recipe.data.pairs else online
    if pairs is None:
        return images
    share = filled(recipe.data.pairs_share, "data.pairs_share")
    if pairs.image != network and (images.image or pairs.image[0] != network[0]):
        raise UserError(
            f"{recipe.where('data.pairs')}: pairs are {' x '.join(map(str, pairs.image))} (channels, height, width), "
            f"the network takes {' x '.join(map(str, network))}",
            2,
        )
    # of images of several sizes work is told in pixels, of a pair in pairs
    pixels = 1 if images.image else filled(recipe.sample.height, "sample.height") * filled(recipe.sample.width, "sample.width")
    return Mixture(recipe.run.seed, [Part(PAIRS, pairs, share, pixels), Part(IMAGES, images, 1 - share)])


@dataclass(frozen=True)
class Part:
    """``share`` of all samples are of ``source``, whatever its size; ``work`` is how much one of its units of work is."""

    name: str
    source: Source
    share: float
    work: int = 1


class Mixture:
    """A source of several. Each walks through its own samples as it would alone: all once before any comes again.

    The part at a place depends on (seed, step, position) alone, of the run's ``seed``: a substitute of a sample (see
    QuarantineSource) is one of the same part.
    """

    def __init__(self, seed: int, parts: Sequence[Part]):
        self.seed, self.parts = seed, list(parts)
        self.name = " and ".join(part.name for part in parts)
        shapes = {part.source.image for part in parts}
        self.image = shapes.pop() if len(shapes) == 1 else None

    def slots(self, seed: int, step: int, batch: int, *, held_out: bool = False) -> list[Slot]:
        purpose, places = "mix/held-out" if held_out else "mix/train", np.arange(step * batch, (step + 1) * batch)
        parts, nth = keyed.divide(self.seed, purpose, places, [part.share for part in self.parts])
        # the step and position at which its part would have it if that stood alone
        at = list(zip(parts.tolist(), (nth // batch).tolist(), (nth % batch).tolist()))
        alone = {(i, s): self.parts[i].source.slots(seed, s, batch, held_out=held_out) for i, s in {(i, s) for i, s, _ in at}}
        slots = []
        for i, s, position in at:
            part, slot = self.parts[i], alone[i, s][position]
            slots.append(replace(slot, part=part.name, cost=part.work * slot.cost))
        return slots

    def draw(self, slots: Sequence[Slot]) -> Batch:
        (source,) = (part.source for part in self.parts if part.name == slots[0].part)
        return source.draw(slots)

    def prompts(self, seed: int, count: int) -> list[str]:
        return self.parts[-1].source.prompts(seed, count)
