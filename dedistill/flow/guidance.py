"""Guiders: which branches of the network a step of the solver evaluates, and the one velocity they make."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"
"""Branches: the velocity with the prompt, and that with the negative prompt."""


class Guider(Protocol):
    """A frozen value, asked at every step ``i`` (from 0) of the path along ``sigmas``, which fall from 1 to 0.

    A step has one answer, however often its solver evaluates the velocity.
    """

    @property
    def label(self) -> str:
        """What people read, e.g. "CFG 3"."""

    @property
    def facts(self) -> dict[str, float | str]:
        """What files keep of it: "cfg", its scale, where 1 is none; "skip", its first steps without; and "method", if that
        is not all there is to say."""

    def branches(self, sigmas: np.ndarray, i: int) -> tuple[str, ...]:
        """The branches that the step needs."""

    def combine(self, outputs: Mapping[str, Tensor], sigmas: np.ndarray, i: int) -> Tensor:
        """The velocity [B, ...] of those of its ``branches``."""


@dataclass(frozen=True)
class ClassifierFree:
    """v = v_uncond + cfg (v_cond - v_uncond) (Ho & Salimans 2022, arXiv 2207.12598). cfg = 1 is the conditional velocity.

    skip: the first steps that run without guidance, counted in steps, not in sigma.
    """

    cfg: float = 1.0
    skip: int = 0

    @property
    def label(self) -> str:
        return f"CFG {self.cfg:g}" + (f", skip {self.skip}" if self.skip else "")

    @property
    def facts(self) -> dict[str, float | str]:
        return {"cfg": self.cfg, "skip": self.skip}

    def branches(self, sigmas: np.ndarray, i: int) -> tuple[str, ...]:
        return (CONDITIONAL,) if self.cfg == 1 or i < self.skip else (CONDITIONAL, UNCONDITIONAL)

    def combine(self, outputs: Mapping[str, Tensor], sigmas: np.ndarray, i: int) -> Tensor:
        if UNCONDITIONAL not in outputs:
            return outputs[CONDITIONAL]
        unconditional = outputs[UNCONDITIONAL]
        return unconditional + self.cfg * (outputs[CONDITIONAL] - unconditional)
