"""Flow matching on data (arXiv 2210.02747): every sample with fresh noise, at a sigma of the recipe's density."""

from dedistill.objectives.base import Objective


class Flow(Objective):
    name = "flow"
