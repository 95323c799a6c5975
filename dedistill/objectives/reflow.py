"""Reflow (arXiv 2209.03003): flow matching on stored pairs of noise and image, which straightens the paths between them."""

from dedistill.objectives.flow import Flow


class Reflow(Flow):
    name, needs = "reflow", ("noise",)
