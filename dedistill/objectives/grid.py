"""Flow matching at the noise levels of the recipe's own sampler alone: on pairs, distillation to a fixed number of steps.

sample.steps = 1 is the regression to the end point (``objectives/endpoint.py``), and many steps are reflow.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
from torch import Tensor

from dedistill.data.source import Batch, Source
from dedistill.flow.schedule import Schedule
from dedistill.flow.solvers import sigma_grid
from dedistill.objectives.base import Draws, Objective
from dedistill.recipe import Recipe
from dedistill.recipe.schema import shift_in_numbers


class OnGrid(Objective):
    """Each sample at one of the ``steps`` sigmas that images are made at (sample.steps, sample.shift), all alike."""

    def __init__(
        self, recipe: Recipe, source: Source, shift_of: Callable[[tuple[int, ...]], float], schedule: Schedule | None = None
    ):
        super().__init__(recipe, source, shift_of, schedule)
        self.steps = recipe.sample.steps
        self.grid = cache(
            lambda shape, steps: sigma_grid(steps, shift_in_numbers(recipe.sample.shift, lambda: shift_of(shape)))
        )

    def sample(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        places = np.minimum((draws.p * self.steps).astype(int), self.steps - 1)
        return super().sample(batch, replace(draws, sigma=lambda shape: self.grid(shape, self.steps)[places]))


class Grid(OnGrid):
    name, needs = "grid", ("noise",)
