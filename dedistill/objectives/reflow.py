"""Reflow (arXiv 2209.03003): flow matching on stored pairs of noise and image, which straightens the paths between them."""

from torch import Tensor

from dedistill.data.source import Batch, needed
from dedistill.objectives.base import Draws
from dedistill.objectives.flow import Flow


class Reflow(Flow):
    name, needs = "reflow", ("noise",)

    def noise(self, batch: Batch, draws: Draws) -> Tensor:
        return needed(batch.noise)  # the image belongs to this very noise; another one would teach nothing
