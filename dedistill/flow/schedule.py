"""The noise schedule of a network that was trained by diffusion, seen on the straight path: which of its levels the network
knows, how they are told to it, and what its own loss makes of them.

At step s of the schedule a sample is a x0 + b e with a^2 + b^2 = 1; on the straight path its sigma is b / (a + b).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dedistill.flow.parameterization import Prediction

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}
"""As diffusers' schedulers call them."""


ABOVE = "data as seen at the highest sigma"
"""What stands for a velocity above the range (flow.parameterization.diffusion_velocity)."""


@dataclass(frozen=True)
class Schedule:
    """prediction: what the network predicts; sigmas [T]: of the straight path at each of its steps, rising."""

    prediction: Prediction
    sigmas: tuple[float, ...]

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest sigma that the network knows."""
        return self.sigmas[0], self.sigmas[-1]

    @property
    def facts(self) -> dict[str, Any]:
        """What whoever uses the weights, or trains on what they made, must know."""
        return {"prediction": self.prediction, "sigma_range": list(self.range), "above_range": ABOVE}

    @property
    def shift(self) -> float:
        """At which half of a sampler's steps lie above the sigma that half of the schedule's lie above."""
        middle = self.sigmas[len(self.sigmas) // 2]
        return middle / (1 - middle)

    def steps(self, sigma: Tensor) -> Tensor:
        """The step of the schedule, float32 [B] with fractions, that a network is told for ``sigma`` [B]: between two steps
        straight in ln(sigma / (1 - sigma)), as k-diffusion and diffusers' Euler do; outside of the range its end."""
        levels = torch.tensor(self.sigmas, dtype=torch.float64, device=sigma.device).logit()
        wanted = sigma.double().clamp(*self.range).logit()
        low = (torch.searchsorted(levels, wanted) - 1).clamp(0, len(levels) - 2)
        share = (wanted - levels[low]) / (levels[low + 1] - levels[low])
        return (low + share.clamp(0, 1)).float()

    def at(self, p: np.ndarray) -> np.ndarray:
        """sigma of the step at each share ``p`` [B] in (0, 1) of the schedule, all steps alike."""
        count = len(self.sigmas)
        return np.array(self.sigmas)[np.minimum((np.asarray(p) * count).astype(int), count - 1)]


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler_config.json of diffusers is for networks that predict velocity."""
    kind = str(scheduler.get("_class_name", ""))
    return scheduler.get("prediction_type") == "flow_prediction" or kind.startswith("FlowMatch")


def schedule_of(scheduler: Mapping[str, Any]) -> Schedule:
    """As a scheduler_config.json of diffusers says it, whatever solver it is for. Raises ValueError for one that is not known,
    or that ends in noise alone, where a network that predicts it says nothing."""
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction_type '{prediction}' is not known; known: {', '.join(PREDICTIONS)}")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr: schedules that end in noise alone are not supported")
    if scheduler.get("trained_betas") is not None:
        raise ValueError("trained_betas are not supported")
    betas = _betas(scheduler)
    kept = np.cumprod(1 - betas)
    a, b = np.sqrt(kept), np.sqrt(1 - kept)
    return Schedule(PREDICTIONS[prediction], tuple((b / (a + b)).tolist()))


def _betas(scheduler: Mapping[str, Any]) -> np.ndarray:
    kind, count = scheduler.get("beta_schedule", "linear"), int(scheduler.get("num_train_timesteps", 1000))
    first, last = float(scheduler.get("beta_start", 1e-4)), float(scheduler.get("beta_end", 0.02))
    if not (0 < first <= last < 1 and 2 <= count <= 100_000):
        raise ValueError(f"betas from {first:g} to {last:g} in {count} steps are no schedule")
    if kind == "scaled_linear":
        return np.linspace(first**0.5, last**0.5, count) ** 2
    if kind == "linear":
        return np.linspace(first, last, count)
    raise ValueError(f"beta_schedule '{kind}' is not known; known: scaled_linear, linear")
