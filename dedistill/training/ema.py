"""Power-law averages of the trained weights, tracked while training, from which any other is made afterwards."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dedistill.adapters.attach import compare_tensors
from dedistill.errors import UserError
from dedistill.posthoc.profiles import exponent, profile_folder, share_of_new
from dedistill.posthoc.snapshots import write_snapshot

TIME = "time"
"""Name of the step of the last update among the tensors of a checkpoint."""


class Averages:
    """One running mean of every trained tensor for each of ``widths`` (sigma_rel): float32, where the tensor is.

    Updates are a function of the weights and the step alone, so every process that holds the same weights holds the same
    means. A step that was not applied makes none, but counts as time that has passed.
    """

    def __init__(self, widths: Sequence[float], trained: Mapping[str, Tensor]):
        self._trained, self._time = trained, 0
        self._gammas = {sigma: exponent(sigma) for sigma in widths}
        self._means = {s: {n: torch.zeros_like(t, dtype=torch.float32).detach() for n, t in trained.items()} for s in widths}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights in as they are after ``step``, with the weight of all the steps since the last update."""
        for sigma, means in self._means.items():
            share = share_of_new(self._gammas[sigma], self._time, step)
            for name, mean in means.items():
                # at the first update the share is 1, so the zeros that means start from never count
                mean.lerp_(self._trained[name].float(), share)
        self._time = step

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps, by file; nothing when nothing is tracked."""
        return {"ema": {**dict(self._named()), TIME: torch.tensor(self._time)}} if self._means else {}

    def load(self, groups: Mapping[str, dict[str, Tensor]], source: str) -> None:
        """The inverse of :meth:`state`. Raises UserError naming ``source``, changing nothing, unless it holds these very
        means."""
        saved = groups.get("ema", {})
        if problems := compare_tensors(self.state().get("ema", {}), saved):
            raise UserError(f"the averages in '{source}' do not fit snapshot.ema: {problems}")
        for name, mean in self._named():
            mean.copy_(saved[name])
        self._time = int(saved[TIME]) if saved else 0

    def write(self, snapshots: Path, step: int, whole: Mapping[str, Tensor], header: dict[str, str]) -> None:
        """Write each average, as of ``step``, beside the snapshot of ``whole``, of which the trained tensors are replaced."""
        for sigma, means in self._means.items():
            made_by = {"dedistill.ema": f"power sigma_rel={sigma:g}"}
            if self._time < step:  # the last steps were not applied
                share = share_of_new(self._gammas[sigma], self._time, step)
                means = {name: mean.lerp(self._trained[name].detach().float(), share) for name, mean in means.items()}
            write_snapshot(snapshots / profile_folder(sigma), step, {**whole, **means}, header | made_by)

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(f"{sigma:g}/{name}", mean) for sigma, means in self._means.items() for name, mean in means.items()]
