"""How distilled the model still is while it trains: a few meters on a small fixed set, so that one can see it change."""

import numpy as np
import torch
from torch import Tensor

from dedistill.assemble import Model
from dedistill.engine.held_out import held_out_numbers, text_of
from dedistill.engine.objective import Objective, Task
from dedistill.engine.validate import fixed_share
from dedistill.flow.path import implied_noise
from dedistill.flow.solvers import euler, sigma_grid
from dedistill.pulse import pulse
from dedistill.sampling.meters import path_numbers
from dedistill.sampling.sampler import guided
from dedistill.world import World

FEW = 4


class Meters:
    """Guidance gap, straightness and few-step gap of fixed held-out captions and noise, at CFG 1.

    Draws nothing from the training's keys. See ``dedistill.sampling.meters`` for what the numbers are.
    """

    def __init__(self, objective: Objective, samples: int, steps: int, size: int, world: World | None = None):
        """samples: held-out samples, at most ``size`` at once, shared by the processes of ``world``; steps: of a path."""
        self.steps, self.world = steps, world or World()
        self.tasks, self.company = fixed_share(objective, samples, size, self.world)

    @torch.no_grad()
    def __call__(self, model: Model) -> dict[str, float]:
        """{"guidance_gap", "straightness", "few_step_gap"} in evaluation mode, the same on every process."""
        training = model.root.training
        model.root.eval()
        for task in self.company:
            self._ask(model, task)
        own = [row for task in self.tasks for row in self._ask(model, task)]
        model.root.train(training)
        rows = sorted(row for rows in self.world.gather(own) for row in rows)  # by sigma, of which each sample has its own
        _, gap, bend, few, chord = np.array(rows).sum(0).tolist()
        return {"guidance_gap": gap / len(rows), "straightness": bend / chord, "few_step_gap": few / chord}

    def _ask(self, model: Model, task: Task) -> list[list[float]]:
        """sigma, guidance gap, bend, few-step gap and chord of each sample."""
        sigma, _, gap = held_out_numbers(model, task).T
        noise = implied_noise(task.noisy, task.sigma, task.target)
        chord, bend, _, end = path_numbers(self._path(model, task, noise, self.steps), sigma_grid(self.steps, model.grid_shift))
        short = self._path(model, task, noise, FEW)[-1].flatten(1).double().numpy()
        widths = -np.diff(sigma_grid(self.steps, model.grid_shift))
        return np.stack([sigma, gap, bend @ widths, np.square(short - end).mean(1), chord], 1).tolist()

    def _path(self, model: Model, task: Task, noise: Tensor, steps: int) -> list[Tensor]:
        text = text_of(model, task)
        velocity = guided(model, text, text, 1.0, 0)
        states = []
        for state in euler(velocity, noise.to(model.device), sigma_grid(steps, model.grid_shift)):
            pulse.beat("measuring")
            states.append(state.float().cpu())
        return states
