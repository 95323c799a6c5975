"""How much loss and gradient vary from batch to batch at fixed weights."""

import numpy as np
import torch

from dedistill.data.source import Source
from dedistill.models.model import Model
from dedistill.objectives.base import objective_for
from dedistill.recipe import Recipe


def gradient_variances(model: Model, recipe: Recipe, source: Source, batches: int) -> dict[str, float]:
    """Variances over batches of the loss and of the gradient's norm, and the gradient's total variance E|g - E g|^2."""
    objective, parameters = objective_for(recipe, source, model.shift), [*model.trainable().values()]
    losses, gradients = [], []
    model.root.train()
    for step in range(batches):
        loss = objective.loss(model, objective.noisy_batch(step, np.arange(recipe.train.batch))).mean()
        parts = torch.autograd.grad(loss, parameters)
        losses.append(float(loss.detach()))
        gradients.append(torch.cat([part.flatten() for part in parts]).double())
    g = torch.stack(gradients)
    return {
        "loss": float(np.var(losses, ddof=1)),
        "norm": float(g.norm(dim=1).var()),
        "gradient": float(g.var(dim=0).sum()),
    }
