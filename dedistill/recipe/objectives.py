"""Objectives as far as a recipe must know them, which is read without torch; each is a file of ``dedistill/objectives``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Traits:
    called: str
    """In messages."""
    pairs: bool = False
    """It trains on stored pairs; otherwise on data."""
    mixes: bool = False
    """It also trains on images, which have no noise of their own, among the pairs."""
    lpips: bool = False
    """Its loss is that of the image which one step reaches, and so can have LPIPS added (train.lpips)."""
    own_sigmas: str = ""
    """Where its sigmas come from, where that is not [timesteps], which then has no effect."""
    points: bool = False
    """It knows paths at a few points only."""
    diffusion: bool = False
    """It is for models that were trained by diffusion."""
    teacher: bool = False
    """The network before training is asked as well: the base beneath an adapter, or a copy."""
    fed: bool = False
    """The network is fed scales of guidance, and so must have an embedding for them."""
    caption_dropout: float = 0.0
    """Default of data.caption_dropout."""


PARTS = PAIRS, IMAGES = "pairs", "images"
"""Of what an objective that mixes trains on, as metrics call them."""
OBJECTIVES = {
    "flow": Traits("flow matching", caption_dropout=0.1),
    "distill": Traits("distillation", pairs=True, own_sigmas="the stored points", points=True),
    "reflow": Traits("reflow", pairs=True, mixes=True, lpips=True),
    "grid": Traits(
        "distillation at the sampler's levels", pairs=True, lpips=True, own_sigmas="the sampler's own levels", points=True
    ),
    "features": Traits(
        "regression to the end point by features", pairs=True, own_sigmas="pure noise alone", points=True, teacher=True
    ),
    "halve": Traits("progressive halving", own_sigmas="the sampler's own levels", points=True, teacher=True),
    "guidance": Traits("guidance distillation", teacher=True, fed=True),
    "endpoint": Traits("regression to the end point", pairs=True, lpips=True, own_sigmas="pure noise alone", points=True),
    "rectified_diffusion": Traits(
        "rectified diffusion", pairs=True, mixes=True, own_sigmas="the model's own schedule", diffusion=True
    ),
    "diffusion": Traits("its own diffusion", own_sigmas="the model's own schedule", caption_dropout=0.1, diffusion=True),
}
"""By the names that recipes use."""
if TYPE_CHECKING:
    ObjectiveName = str
else:  # one of them; type checkers know only lists that are written out
    ObjectiveName = Literal[tuple(OBJECTIVES)]
DROPOUTS = {
    rate: tuple(name for name, o in OBJECTIVES.items() if o.caption_dropout == rate)
    for rate in dict.fromkeys(o.caption_dropout for o in OBJECTIVES.values())
}
"""Defaults of data.caption_dropout, and the objectives that have them."""
