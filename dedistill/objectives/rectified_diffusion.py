"""Rectified Diffusion (arXiv 2410.07303): the model's own loss, at its own noise levels, on stored pairs of noise and image."""

from dedistill.objectives.diffusion import Diffusion


class RectifiedDiffusion(Diffusion):
    """What reflow (``objectives/reflow.py``) is to flow matching. The network stays what it was: no bridge above its levels."""

    name, needs = "rectified_diffusion", ("noise",)
