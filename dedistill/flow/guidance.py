"""Guiders: which branches of the network a step of the solver evaluates, and the one velocity they make.

Recipes and commands read names of guiders without torch, which is imported here for types alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """A way of asking the network."""

    prompt: bool = True
    """With the prompt, or with the negative prompt."""
    adapter: float = 1.0
    """Strength of what was trained; 0 is the base alone."""
    step: int = 0
    """The run's snapshot whose weights take the place of the model's; 0: none does."""
    without: tuple[int, ...] = ()
    """Blocks that are left out, by number from 0."""


CONDITIONAL, UNCONDITIONAL = Branch(), Branch(prompt=False)


@dataclass(frozen=True)
class Evaluation:
    """Where a velocity is asked for: ``noisy`` [B, ...] at ``sigma``, in step ``i`` of the path along ``sigmas``."""

    noisy: Tensor
    sigma: float
    sigmas: np.ndarray
    i: int
    memory: dict[int, Tensor]
    """What a guider keeps of this path's steps, by step: it is a value itself, and serves many paths."""


class Guider(Protocol):
    """A frozen value, asked at every step ``i`` (from 0) of the path along ``sigmas``, which fall from 1 to 0.

    A step has the same branches however often its solver evaluates the velocity.
    """

    @property
    def neutral(self) -> bool:
        """Whether it is the conditional velocity at every step."""

    @property
    def label(self) -> str:
        """What people read, e.g. "CFG 3"."""

    @property
    def facts(self) -> dict[str, float | str]:
        """What files keep of it: "cfg", its scale, where 1 is none; "skip", its first steps without; and "method", if that
        is not all there is to say."""

    def branches(self, sigmas: np.ndarray, i: int) -> tuple[Branch, ...]:
        """The branches that the step needs."""

    def combine(self, outputs: Mapping[Branch, Tensor], at: Evaluation) -> Tensor:
        """The velocity [B, ...] of those of its ``branches``."""


@dataclass(frozen=True)
class ClassifierFree:
    """v = v_uncond + cfg (v_cond - v_uncond) (Ho & Salimans 2022, arXiv 2207.12598). cfg = 1 is the conditional velocity.

    skip: the first steps that run without guidance, counted in steps, not in sigma. Other guiders have both as well.
    """

    cfg: float = 1.0
    skip: int = 0
    called: ClassVar[str] = ""

    @property
    def neutral(self) -> bool:
        return self.cfg == 1

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (f"CFG {self.cfg:g}", f"skip {self.skip}" if self.skip else "", self._method)))

    @property
    def facts(self) -> dict[str, float | str]:
        return {"cfg": self.cfg, "skip": self.skip} | ({"method": self._method} if self._method else {})

    @property
    def _method(self) -> str:
        own = [f"{name} {_written(getattr(self, name))}" for name in parameters(type(self))]
        return "" if self.neutral else " ".join([self.called, *own])

    def _guided(self, sigmas: np.ndarray, i: int) -> bool:
        return self.cfg != 1 and i >= self.skip

    def branches(self, sigmas: np.ndarray, i: int) -> tuple[Branch, ...]:
        return (CONDITIONAL, UNCONDITIONAL) if self._guided(sigmas, i) else (CONDITIONAL,)

    def combine(self, outputs: Mapping[Branch, Tensor], at: Evaluation) -> Tensor:
        if UNCONDITIONAL not in outputs:
            return outputs[CONDITIONAL]
        return self._guide(outputs[CONDITIONAL], outputs[UNCONDITIONAL], at)

    def _guide(self, cond: Tensor, uncond: Tensor, at: Evaluation) -> Tensor:
        return uncond + self.cfg * (cond - uncond)


@dataclass(frozen=True)
class Interval(ClassifierFree):
    """CFG in steps that begin at low <= sigma <= high only (Kynkäänniemi et al. 2024, arXiv 2404.07724; its 0.28 to 2.9 for
    EDM2-S are 0.22 to 0.74 here). 0 to 1: plain CFG. The default burnt least for three training seeds (docs/sampling.md)."""

    low: float = 0.4
    high: float = 0.8
    called: ClassVar[str] = "interval"

    def __post_init__(self) -> None:
        _require(0 <= self.low <= self.high <= 1, "0 <= low <= high <= 1")

    def _guided(self, sigmas: np.ndarray, i: int) -> bool:
        return super()._guided(sigmas, i) and self.low <= sigmas[i] <= self.high


@dataclass(frozen=True)
class Rescaled(ClassifierFree):
    """CFG scaled to the deviation of the conditional velocity, by a share phi (Lin et al. 2023, arXiv 2305.08891, eq. 15 and
    16). 0: plain CFG."""

    phi: float = 0.7
    called: ClassVar[str] = "rescaled"

    def __post_init__(self) -> None:
        _require(0 <= self.phi <= 1, "0 <= phi <= 1")

    def _guide(self, cond: Tensor, uncond: Tensor, at: Evaluation) -> Tensor:
        plain = super()._guide(cond, uncond, at)
        own, wanted = (v - v.mean(_dims(v), keepdim=True) for v in (plain, cond))
        ratio = (_dot(wanted, wanted) / _dot(own, own).clamp(min=TINY)).sqrt().to(plain.dtype)
        return plain * (1 + self.phi * (ratio - 1))


@dataclass(frozen=True)
class AdaptiveProjected(ClassifierFree):
    """APG: the data move across what the conditional branch sees rather than along it, which is what burns (Sadat et al. 2024,
    arXiv 2410.02416, algorithm 1).

    eta: share of the part along it that stays. rms: most root mean square of a change of the data at one unit of scale; the
    paper's r over the root of their number of elements (SDXL's 15 is 0.06). momentum: of the change, from step to step;
    negative ones push away from where it went. eta = 1, rms = inf, momentum = 0: plain CFG.
    """

    eta: float = 0.0
    rms: float = math.inf
    momentum: float = -0.5
    called: ClassVar[str] = "APG"

    def __post_init__(self) -> None:
        _require(self.rms > 0 and -1 < self.momentum < 1 and 0 <= self.eta <= 1, "0 <= eta <= 1, rms > 0, -1 < momentum < 1")

    def _guide(self, cond: Tensor, uncond: Tensor, at: Evaluation) -> Tensor:
        # the paper's differences of data are ours of velocities times -sigma
        difference = update = cond - uncond
        if (before := at.memory.get(at.i - 1)) is not None and self.momentum:
            update = difference + self.momentum / at.sigma * before
        at.memory[at.i] = at.sigma * update
        at.memory.pop(at.i - 2, None)
        size = at.sigma * (_dot(update, update) / update[0].numel()).sqrt()
        update = update * (self.rms / size).clamp(max=1).to(update.dtype)
        data = at.noisy - at.sigma * cond
        along = (_dot(update, data) / _dot(data, data).clamp(min=TINY)).to(data.dtype) * data
        update = update + (self.eta - 1) * along
        return super()._guide(cond, uncond, at) + (self.cfg - 1) * (update - difference)


@dataclass(frozen=True)
class ZeroStar(ClassifierFree):
    """CFG-Zero*: CFG against the unconditional velocity scaled to be nearest to the conditional one (Fan et al. 2025, arXiv
    2503.18886).

    zero: the first steps whose velocity is 0, for which the network is not asked.
    """

    zero: int = 1
    called: ClassVar[str] = "CFG-Zero*"

    def __post_init__(self) -> None:
        _require(self.zero >= 0, "zero >= 0")

    def branches(self, sigmas: np.ndarray, i: int) -> tuple[Branch, ...]:
        return () if i < self.zero and not self.neutral else super().branches(sigmas, i)

    def combine(self, outputs: Mapping[Branch, Tensor], at: Evaluation) -> Tensor:
        return super().combine(outputs, at) if outputs else at.noisy * 0

    def _guide(self, cond: Tensor, uncond: Tensor, at: Evaluation) -> Tensor:
        nearest = (_dot(cond, uncond) / _dot(uncond, uncond).clamp(min=TINY)).to(uncond.dtype) * uncond
        return super()._guide(cond, nearest, at)


@dataclass(frozen=True)
class SkipLayers(ClassifierFree):
    """Skip-layer guidance: CFG, and away from the conditional velocity without some blocks, + scale (v_cond - v_without).

    Only in steps i of N with start < i / N < stop. blocks: their numbers, as in 7+8+9. scale = 0: plain CFG.
    """

    blocks: tuple[int, ...] = ()
    scale: float = 2.5
    start: float = 0.01
    stop: float = 0.2
    called: ClassVar[str] = "skipped layers"

    def __post_init__(self) -> None:
        _require(len(self.blocks) > 0 and min(self.blocks) >= 0, "blocks, e.g. blocks=7+8+9")
        _require(self.scale >= 0 and 0 <= self.start <= self.stop <= 1, "scale >= 0, 0 <= start <= stop <= 1")

    @property
    def neutral(self) -> bool:
        return super().neutral and self.scale == 0

    @property
    def _without(self) -> Branch:
        return Branch(without=self.blocks)

    def branches(self, sigmas: np.ndarray, i: int) -> tuple[Branch, ...]:
        inside = self.scale != 0 and self.start < i / (len(sigmas) - 1) < self.stop
        return (*super().branches(sigmas, i), *((self._without,) if inside else ()))

    def combine(self, outputs: Mapping[Branch, Tensor], at: Evaluation) -> Tensor:
        guided = super().combine(outputs, at)
        if self._without not in outputs:
            return guided
        return guided + self.scale * (outputs[CONDITIONAL] - outputs[self._without])


@dataclass(frozen=True)
class Autoguidance(ClassifierFree):
    """v = v_weak + cfg (v - v_weak): away from a weaker version of the model, asked the same (Karras et al. 2024, arXiv
    2406.02507). That is the run's snapshot of ``step``; or, where it is 0, the base with the adapter at strength ``weak``, of
    which 0 is the base alone, and 1 changes nothing.
    """

    weak: float = 0.0
    step: int = 0
    called: ClassVar[str] = "autoguidance"

    def __post_init__(self) -> None:
        _require(0 <= self.weak <= 1 and self.step >= 0, "0 <= weak <= 1, step >= 0")
        _require(not (self.weak and self.step), "one of weak and step")

    @property
    def _weaker(self) -> Branch:
        return Branch(step=self.step) if self.step else Branch(adapter=self.weak)

    def branches(self, sigmas: np.ndarray, i: int) -> tuple[Branch, ...]:
        return tuple(dict.fromkeys((CONDITIONAL, self._weaker))) if self._guided(sigmas, i) else (CONDITIONAL,)

    def combine(self, outputs: Mapping[Branch, Tensor], at: Evaluation) -> Tensor:
        if len(outputs) == 1:
            return outputs[CONDITIONAL]
        return self._guide(outputs[CONDITIONAL], outputs[self._weaker], at)


TINY = 1e-30
"""The least that is divided by."""


def _dims(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each sample: [B, ...] -> [B, 1, ...], float64."""
    return (a.double() * b.double()).sum(_dims(a), keepdim=True)


# --- guiders by name -------------------------------------------------------------------------------------------------


GUIDERS: dict[str, type[Any]] = {
    "cfg": ClassifierFree,
    "interval": Interval,
    "rescale": Rescaled,
    "apg": AdaptiveProjected,
    "zero_star": ZeroStar,
    "skip_layers": SkipLayers,
    "auto": Autoguidance,
}
"""By the names that recipes and commands use; dataclasses with cfg, skip, and parameters that have defaults."""


def parameters(guider: type[Any]) -> dict[str, Any]:
    """The parameters of a guider beside cfg and skip, with their defaults."""
    return {field.name: field.default for field in fields(guider) if field.name not in ("cfg", "skip")}


def guider_of(text: str, cfg: float = 1.0, skip: int = 0) -> Guider:
    """The guider that ``text`` names, as in "apg" or "apg:eta=0.2,momentum=0". Raises ValueError, saying what there is."""
    name, _, rest = text.partition(":")
    if name not in GUIDERS:
        raise ValueError(f"no guider is called '{name}'; there are {', '.join(GUIDERS)}")
    known, given = parameters(GUIDERS[name]), {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"guider '{name}' has no parameter '{key}'; {has}")
        given[key] = _read(f"{name}:{part}", value, _KINDS[type(known[key])])
    try:
        guider: Guider = GUIDERS[name](cfg, skip, **given)
    except ValueError as e:
        raise ValueError(f"guider '{text}': {e}") from e
    return guider


def _read(place: str, value: str, kind: Callable[[str], object]) -> object:
    try:
        found = kind(value)
        if found == found:  # NaN is not
            return found
    except ValueError:
        pass
    raise ValueError(f"guider '{place}': '{value}' is not what it takes")


def _blocks(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split("+"))


_KINDS: dict[type, Callable[[str], object]] = {int: int, float: float, tuple: _blocks}


def _written(value: float | tuple[int, ...]) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"it needs {what}")
