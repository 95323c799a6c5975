"""What a model predicts on held-out samples: its flow-matching loss, and how much the caption matters to it."""

import numpy as np
import torch

from dedistill.assemble import Model
from dedistill.engine.objective import Task
from dedistill.flow.loss import flow_loss
from dedistill.sampling.meters import Reading
from dedistill.text import Text


@torch.no_grad()
def held_out_meters(model: Model, tasks: list[Task], bins: int) -> dict[str, Reading]:
    """Meters of fixed held-out tasks, over all and (``_by_sigma``) in ``bins`` equal bins of sigma.

    loss: flow-matching loss of the captioned samples. guidance: |velocity with caption - without|^2 per element, by
    which one unit of CFG moves a velocity. A distilled guidance embedding is fed what it is fed in training.
    """
    training = model.root.training
    model.root.eval()
    try:
        numbers = np.concatenate([held_out_numbers(model, task) for task in tasks])
    finally:
        model.root.train(training)
    sigma, *columns = numbers[numbers[:, 0].argsort()].T  # every model's samples in one order, however they were batched
    place = np.minimum((sigma * bins).astype(int), bins - 1)
    member = np.eye(bins)[place]
    found = {}
    for key, column in zip(("loss", "guidance"), columns):
        found[key] = Reading(column[:, None], np.ones((len(column), 1)), place)
        found[f"{key}_by_sigma"] = Reading(column[:, None] * member, member, place)
    return found


def held_out_numbers(model: Model, task: Task) -> np.ndarray:
    """sigma, loss and squared difference between the two branches of each sample [B, 3]."""
    text = text_of(model, task)
    noisy, sigma = task.noisy.to(model.device), task.sigma.to(model.device)
    own = model.velocity(noisy, sigma, text)
    other = model.velocity(noisy, sigma, model.encode([model.negative]).expand(len(text)))
    columns = (sigma, flow_loss(own, task.target.to(model.device)), flow_loss(own, other))
    return torch.stack(columns, 1).double().cpu().numpy()


def text_of(model: Model, task: Task) -> Text:
    """The captions of ``task``, none of them dropped."""
    return model.encode(task.captions) if task.text is None else task.text.to(model.device)
