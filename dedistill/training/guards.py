"""What must not pass in silence: bad gradients, samples that keep causing them, and training without an effect.

A step that is not applied changes nothing. After ``PATIENCE`` of them in a row, or when a sample stands out for the
``PATIENCE``-th time, the samples that stand out are quarantined and the run goes back to before the first of these steps; where
none stands out, or going back did not help, it stops, as it does when more than half of its steps are bad. Everything
here is a function of losses, sigmas and gradient norms, which are the same on every process.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from statistics import median
from typing import Any, TypedDict

from torch import Tensor

from dedistill.errors import UserError, amount

# --- no optimizer step on a gradient that is not finite or far above its history -------------------------------------


PATIENCE = 3
WINDOW = 64
"""Gradient norms of applied steps that a new one is compared with."""
WARM_UP = 32
"""Fewer of them say nothing yet about what is usual."""
BINS = 16
"""Equal bins of sigma in which the usual loss is known."""
MEMORY = 0.98
"""Weight of what was known against a new loss, once a bin has seen 50."""
SUSPECT = 4.0
"""A loss so many times the usual one of its sigma stands out."""
RETURNS = 3
"""Times a run goes back without getting further than the last time."""
LIMIT = 256
"""Quarantined samples beyond which samples are not what is wrong."""


class BadSteps(UserError):
    """The run was stopped by :class:`Guard`; the weights are those of the last good step."""


class Rollback(Exception):
    """To train again from ``step`` on, without the samples that are now quarantined."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class Suspect(TypedDict):
    """A sample that stood out in a step that was not applied."""

    sample: str
    sigma: float
    loss: str
    """A number, or what JSON has none for."""


class LeftOut(TypedDict):
    """A sample in quarantine: since which step, and what it was found by."""

    since: int
    """The step from which on it is not drawn."""
    sigma: float
    loss: str


def of_renamed_sets(state: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    """A guard's state whose samples are of image sets that have other titles now: old title -> new."""

    def now(sample: str) -> str:
        title, slash, rest = sample.partition("/")
        return f"{titles.get(title, title)}{slash}{rest}"

    tables = {key: {now(name): entry for name, entry in state[key].items()} for key in ("hits", "suspects", "quarantine")}
    tables["suspects"] = {name: {**entry, "sample": name} for name, entry in tables["suspects"].items()}
    return {**state, **tables}


class Guard:
    """Judges steps. ``factor``: how many times the median of its history a gradient norm may be; 0 for any."""

    def __init__(self, factor: float):
        self.factor = factor
        self.norms: list[float] = []
        self.usual: list[list[float]] = [[0.0, 0] for _ in range(BINS)]
        """[mean loss, losses seen] of applied steps, per bin of sigma."""
        self.consecutive_bad = 0
        self.refused: list[int] = []
        """Steps among the last WINDOW that were not applied."""
        self.hits: dict[str, list[int]] = {}
        """Sample -> steps in which it stood out; of those that are not quarantined."""
        self.suspects: dict[str, Suspect] = {}
        """Samples that stood out in the steps that were not applied, since the last one that was."""
        self.quarantine: dict[str, LeftOut] = {}
        self.returned = [-1, 0]
        """The furthest step the run has gone back to, and how often it did so without getting beyond."""

    def state(self) -> dict[str, Any]:
        """Everything that later judgements depend on, as plain data."""
        return deepcopy({key: value for key, value in vars(self).items() if key != "factor"})

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        vars(self).update(state)

    def quarantined_from(self) -> dict[str, int]:
        """The quarantine as ``QuarantineSource`` takes it."""
        return {name: entry["since"] for name, entry in self.quarantine.items()}

    def judge(
        self, step: int, losses: Tensor, sigmas: Tensor, norm: float, names: Callable[[list[int]], list[str]]
    ) -> dict[str, list[Suspect]]:
        """What speaks against applying ``step``: {"not_finite" or "spike": samples that stand out}; empty when nothing does.

        losses, sigmas: [B] in the order of positions; names: of the samples at given positions. Raises BadSteps or Rollback at
        the last step that patience is had with.
        """
        finite = math.isfinite(norm) and bool(losses.isfinite().all())
        usual = [self.usual[place] for place in (sigmas * BINS).long().clamp(max=BINS - 1).tolist()]  # at each one's sigma
        # the median: a few large norms among those that were applied do not move it
        spike = self.factor and len(self.norms) >= WARM_UP and norm > self.factor * median(self.norms)
        if finite and not spike:
            self._learn(losses, usual, norm)
            return {}
        stand_out = [p for p, ok in enumerate(losses.isfinite().tolist()) if not ok]
        if finite:  # large, then: against what is usual at its sigma, since losses differ by far more between sigmas
            stand_out = [p for p, (x, (mean, seen)) in enumerate(zip(losses.tolist(), usual)) if seen and x > SUSPECT * mean]
        found: list[Suspect] = [
            {"sample": name, "sigma": float(sigmas[p]), "loss": str(float(losses[p]))}
            for p, name in zip(stand_out, names(stand_out) if stand_out else [])
        ]
        if len(stand_out) <= len(losses) / 2:  # where most of a batch is off, it is not for the samples
            self.suspects |= {entry["sample"]: entry for entry in found}
            for entry in found:
                self.hits.setdefault(entry["sample"], []).append(step)
        self.consecutive_bad += 1
        self.refused = [s for s in self.refused if step - WINDOW < s < step] + [step]
        again = any(len(self.hits.get(entry["sample"], [])) >= PATIENCE for entry in found)
        if self.consecutive_bad >= PATIENCE or again or len(self.refused) > WINDOW / 2:
            self._on_too_many_bad_steps(step, float(losses.mean()), norm, "a spike" if finite else "not finite", found)
        return {"spike" if finite else "not_finite": found}

    def _learn(self, losses: Tensor, usual: list[list[float]], norm: float) -> None:
        self.consecutive_bad, self.suspects = 0, {}
        self.norms = [*self.norms[1 - WINDOW :], norm]
        for loss, entry in zip(losses.tolist(), usual):
            keep = min(MEMORY, entry[1] / (entry[1] + 1))  # a plain mean of the first 50, then a running one
            entry[:] = [keep * entry[0] + (1 - keep) * loss, entry[1] + 1]

    def _on_too_many_bad_steps(self, step: int, loss: float, norm: float, what: str, found: list[Suspect]) -> None:
        """Quarantine what stood out and raise Rollback, or raise BadSteps.

        Neither where nothing but a sample that cannot be quarantined any more has brought it here.
        """
        since = step + 1 - self.consecutive_bad
        new = {name: entry for name, entry in self.suspects.items() if name not in self.quarantine}
        times = self.returned[1] + 1 if since <= self.returned[0] else 1
        if new and times <= RETURNS and len(self.quarantine) + len(new) <= LIMIT:
            # forget what was judged from ``since`` on: those steps come again, with other samples
            self.quarantine |= {name: {"since": since, "sigma": e["sigma"], "loss": e["loss"]} for name, e in new.items()}
            self.returned = [max(since, self.returned[0]), times]
            self.consecutive_bad, self.suspects = 0, {}
            self.refused = [step for step in self.refused if step < since]
            left = {name: [s for s in steps if s < since] for name, steps in self.hits.items()}
            self.hits = {name: steps for name, steps in left.items() if steps and name not in self.quarantine}
            raise Rollback(since)
        why = f"; samples: {found[:4]}" if found else " in the gradient"
        tried = f" {amount(len(self.quarantine), 'sample was', 'samples were')} quarantined before." if self.quarantine else ""
        if self.consecutive_bad < PATIENCE and len(self.refused) <= WINDOW / 2:
            return
        often = f" {self.consecutive_bad} times in a row"
        if self.consecutive_bad < PATIENCE:
            often = f", one of {len(self.refused)} bad steps among the last {WINDOW}"
        raise BadSteps(
            f"step {step + 1}: loss {loss}, gradient norm {norm}: {what}{often}{why}.{tried} "
            f"No such step was applied; the weights of step {step} are saved. Lower train.lr or set train.max_grad_norm."
        )


# --- whether training has an effect ----------------------------------------------------------------------------------


EVERY = 100
"""Steps between looks where nothing else is due."""
ENOUGH = 3
"""Applied steps that every module has moved after: behind an output that starts at zero the first gradients are zero."""


class ParameterChangeCheck:
    """Looks at the trained weights now and then.

    ``modules``: names of the weights that belong together, which only as a whole must move: at the start of a LoKr or a
    LoRA one factor has no gradient. A whole network is one module.
    """

    def __init__(self, bit_sums: Callable[[], dict[str, int]], modules: list[list[str]]):
        """bit_sums: gives a number of each trained weight that changes with its bits."""
        self.bit_sums, self.modules = bit_sums, modules
        self.start()

    def start(self) -> None:
        """Begin anew with the weights as they are."""
        self.applied = 0
        """Steps applied since the last look."""
        self.last = self.bit_sums()

    def check(self, step: int) -> None:
        """Raises UserError, naming weights, if a module is bit for bit as it was at the last look, ENOUGH applied steps ago."""
        if self.applied < ENOUGH:
            return
        now = self.bit_sums()
        still = {name for name, total in now.items() if total == self.last[name]}
        dead = [names for names in self.modules if still.issuperset(names)]
        if dead:
            raise UserError(
                f"after step {step}: {self.applied} steps were applied, but nothing has changed in {len(dead)} of "
                f"{amount(len(self.modules), 'module')}, e.g. {', '.join(dead[0][:3])}. Their gradient or learning rate is "
                "zero, or they are frozen. More training changes nothing; leave them out of the targets if they cannot learn."
            )
        self.last, self.applied = now, 0
