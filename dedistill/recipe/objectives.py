"""Objectives as far as a recipe must know them, which is read without torch; each is a file of ``dedistill/objectives``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True)
class Traits:
    called: str
    """In messages."""
    pairs: bool = False
    """It trains on stored pairs; otherwise on data."""
    own_sigmas: bool = False
    """Its sigmas come with the samples, so that [timesteps] has no effect, and paths between them are not known."""
    caption_dropout: float = 0.0
    """Default of data.caption_dropout."""


OBJECTIVES = {
    "flow": Traits("flow matching", caption_dropout=0.1),
    "distill": Traits("distillation", pairs=True, own_sigmas=True),
    "reflow": Traits("reflow", pairs=True),
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
