"""No optimizer step on a number that is not finite."""

import math
from typing import Any

from dedistill.errors import UserError

PATIENCE = 3


class NotFinite(UserError):
    """The run was stopped by :class:`FiniteGuard`; the weights are those of the last good step."""


class FiniteGuard:
    """Skips a step whose loss or gradient is not finite, remembers it, and stops the run at the third in a row."""

    def __init__(self):
        self.in_a_row = 0

    def allows(self, step: int, loss: float, grad_norm: float, culprits: list[dict[str, Any]]) -> bool:
        """True when the step may be applied. ``culprits``: name, sigma and loss of samples whose loss is not finite."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        if self.in_a_row >= PATIENCE:
            worst = f"; samples: {culprits[:4]}" if culprits else " in the gradient"
            raise NotFinite(
                f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: not finite {PATIENCE} times in a row{worst}. "
                f"No such step was applied; the weights of step {step} are saved. Lower train.lr or set train.max_grad_norm."
            )
        return False
