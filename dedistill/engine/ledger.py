"""Whether training has an effect: weights that were to change have changed since the last look."""

import torch
from torch import Tensor, nn

from dedistill.errors import UserError

EVERY = 100
"""Steps between looks where nothing else is due."""
ENOUGH = 3
"""Applied steps that every module has moved after: behind an output that starts at zero the first gradients are zero."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the integers that have its bits."""


class Ledger:
    """Looks at the trained weights now and then. What rounding keeps from a bf16 weight for a while (KahanAdamW) counts, too.

    ``modules``: names of the weights that belong together, which only as a whole must move: at the start of a LoKr or a
    LoRA one factor has no gradient. A whole network is one module.
    """

    def __init__(self, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, modules: list[list[str]]):
        self.trainable, self.optimizer, self.modules = trainable, optimizer, modules
        self.start()

    def start(self) -> None:
        """Begin anew with the weights as they are."""
        self.applied = 0
        """Steps applied since the last look."""
        self.last = self._sums()

    def check(self, step: int) -> None:
        """Raises UserError, naming weights, if a module is bit for bit as it was at the last look, ENOUGH applied steps ago."""
        if self.applied < ENOUGH:
            return
        now = self._sums()
        still = {name for name, total in now.items() if total == self.last[name]}
        dead = [names for names in self.modules if still.issuperset(names)]
        if dead:
            raise UserError(
                f"after step {step}: {self.applied} steps were applied, but nothing has changed in {len(dead)} of "
                f"{len(self.modules)} modules, e.g. {', '.join(dead[0][:3])}. Their gradient or learning rate is zero, or they "
                "are frozen. Training on would be in vain; leave them out of the targets if they cannot learn."
            )
        self.last, self.applied = now, 0

    @torch.no_grad()
    def _sums(self) -> dict[str, int]:
        """The sum of each weight's bits, read as integers: exact, of one number per weight, and made where the weights are."""
        sums = []
        for parameter in self.trainable.values():
            rest = self.optimizer.state.get(parameter, {}).get("kahan_comp")
            sums.append(_bits(parameter) + (_bits(rest) if rest is not None else 0))
        return dict(zip(self.trainable, torch.stack(sums).tolist())) if sums else {}


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
