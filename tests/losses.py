"""Faults in the loss of a training step, which validation shares."""

from collections.abc import Callable

from torch import Tensor

from dedistill.models.model import Model
from dedistill.objectives.base import NoisyBatch, Objective

Loss = Callable[[Model, NoisyBatch], Tensor]


def in_training(wrong: Callable[[Loss, Model, NoisyBatch], Tensor]) -> Callable[[Objective, Model, NoisyBatch], Tensor]:
    """An ``Objective.loss`` that is ``wrong(real, model, batch)`` while training, and as it was in validation."""
    real = Objective.loss

    def loss(self: Objective, model: Model, batch: NoisyBatch) -> Tensor:
        own = lambda model, batch: real(self, model, batch)  # noqa: E731 - one line
        return wrong(own, model, batch) if model.root.training else own(model, batch)

    return loss
