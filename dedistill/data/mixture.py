"""Pairs and images in one run: which of them stands at a place, by their shares, and which of its samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dedistill.data.pairs import PairSource
from dedistill.data.source import Batch, Source
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.recipe import Recipe
from dedistill.recipe.objectives import IMAGES, PAIRS
from dedistill.recipe.resolve import filled


def beside_pairs(recipe: Recipe, images: Source, network: tuple[int, int, int]) -> Source:
    """``images`` with the pairs among them that ``recipe`` names. network: shape of what it samples. Raises UserError for pairs
    of another shape, or of other channels where images are of several shapes."""
    if recipe.data.pairs is None:
        return images
    pairs, share = PairSource(Path(recipe.data.pairs), "data.pairs"), filled(recipe.data.pairs_share, "data.pairs_share")
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


@dataclass(frozen=True)
class _Stretch:
    """``positions`` of a step, and what they would be in which step of their part if that stood alone."""

    part: Part
    positions: list[int]
    step: int
    own: list[int]


class Mixture:
    """A source of several. Each walks through its own samples as it would alone: all once before any comes again.

    The part at a place depends on (seed, step, position) alone, of the run's ``seed``: a substitute of a sample (see
    QuarantineSource) is one of the same part. Groups are of one part.
    """

    def __init__(self, seed: int, parts: Sequence[Part]):
        self.seed, self.parts = seed, list(parts)
        self.name = " and ".join(part.name for part in parts)
        shapes = {part.source.image for part in parts}
        self.image = shapes.pop() if len(shapes) == 1 else None

    def groups(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[np.ndarray]:
        found = []
        for at in self._stretches(step, positions, batch, held_out):
            back = dict(zip(at.own, at.positions))
            groups = at.part.source.groups(seed, at.step, np.array(at.own), batch, held_out=held_out)
            found += [np.array([back[int(p)] for p in group]) for group in groups]
        return sorted(found, key=lambda group: int(group[0]))

    def work(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> int:
        at = self._one(step, positions, batch, held_out)
        return at.part.work * at.part.source.work(seed, at.step, np.array(at.own), batch, held_out=held_out)

    def draw(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> Batch:
        """``positions`` must be of one of the ``groups``."""
        at = self._one(step, positions, batch, held_out)
        return replace(at.part.source.draw(seed, at.step, np.array(at.own), batch, held_out=held_out), part=at.part.name)

    def names(self, seed: int, step: int, positions: np.ndarray, batch: int, *, held_out: bool = False) -> list[str]:
        found: dict[int, str] = {}
        for at in self._stretches(step, positions, batch, held_out):
            own = at.part.source.names(seed, at.step, np.array(at.own), batch, held_out=held_out)
            found |= zip(at.positions, own)
        return [found[int(p)] for p in positions]

    def prompts(self, seed: int, count: int) -> list[str]:
        return self.parts[-1].source.prompts(seed, count)

    def _stretches(self, step: int, positions: np.ndarray, batch: int, held_out: bool) -> Iterator[_Stretch]:
        positions = np.asarray(positions)
        purpose = "mix/held-out" if held_out else "mix/train"
        parts, nth = keyed.divide(self.seed, purpose, step * batch + positions, [part.share for part in self.parts])
        steps, own = np.divmod(nth, batch)
        for i, one in sorted(set(zip(parts.tolist(), steps.tolist()))):
            here = (parts == i) & (steps == one)
            yield _Stretch(self.parts[i], positions[here].tolist(), one, own[here].tolist())

    def _one(self, step: int, positions: np.ndarray, batch: int, held_out: bool) -> _Stretch:
        found = list(self._stretches(step, positions, batch, held_out))
        if len(found) != 1:
            raise ValueError(f"positions {list(positions)} of step {step} are not of one group")
        return found[0]
