"""Loss on held-out samples, on fixed noise and fixed sigmas: the same question at every step of every run."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dedistill.assemble import Model
from dedistill.engine.objective import Objective, Task, task_loss
from dedistill.pulse import pulse
from dedistill.world import World


class Validator:
    """Held-out loss with its standard error. Draws nothing from the training's keys."""

    def __init__(self, objective: Objective, samples: int, size: int, world: World | None = None):
        """samples: held-out samples asked each time, at most ``size`` of them at once, shared by the processes of ``world``."""
        self.samples, self.world = samples, world or World()
        self.tasks, self.company = fixed_share(objective, samples, size, self.world)

    @torch.no_grad()
    def __call__(self, model: Model, interrupted: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """{"val_loss", "val_loss_se"} in evaluation mode, the same on every process.

        None as soon as any process was ``interrupted``: a validation may take longer than a stop may.
        """
        training = model.root.training
        model.root.eval()
        for task in self.company:
            task_loss(model, task)
        own = []
        for task in self.tasks:
            if interrupted():
                break
            pulse.beat("validating")
            own += zip(task.sigma.tolist(), task_loss(model, task).tolist())
        model.root.train(training)
        heard = self.world.gather({"losses": own, "interrupted": interrupted()})
        if any(h["interrupted"] for h in heard):
            return None
        by_sigma = np.array([loss for _, loss in sorted(pair for h in heard for pair in h["losses"])])
        return {"val_loss": float(by_sigma.mean()), "val_loss_se": stratified_error(by_sigma)}


def fixed_share(objective: Objective, samples: int, size: int, world: World) -> tuple[list[Task], list[Task]]:
    """Held-out tasks of this process, and what it runs for nothing where all must run equally many passes."""
    tasks = objective.held_out(samples, size, world)
    passes = max(world.gather(len(tasks))) if world.lockstep else 0
    return tasks, objective.held_out(1, 1) * (passes - len(tasks))


def stratified_error(losses: np.ndarray) -> float:
    """Standard error of the mean of one draw per stratum, in stratum order (collapsed strata, Cochran 1977, sec. 5A.12).

    Neighbouring strata are paired; what differs between sigmas does not count as uncertainty. 0 for fewer than 2.
    """
    pairs = losses[: len(losses) // 2 * 2].reshape(-1, 2)
    return math.sqrt(float(np.square(pairs[:, 0] - pairs[:, 1]).sum())) / max(len(losses), 1)


def sigma_bins(losses: Tensor, sigmas: Tensor, bins: int) -> list[float | None]:
    """Mean loss in ``bins`` equal bins of sigma; None where no sample fell."""
    place = (sigmas * bins).long().clamp(0, bins - 1)
    return [float(losses[place == b].mean()) if (place == b).any() else None for b in range(bins)]
