"""Reflow (arXiv 2209.03003): flow matching on stored pairs of noise and image, which straightens the paths between them."""

from dedistill.objectives.base import Objective


class Reflow(Objective):
    name, needs = "reflow", ("noise",)
