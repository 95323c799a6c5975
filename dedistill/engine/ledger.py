"""Whether training has an effect: weights that were to change have changed since the last look."""

from collections.abc import Callable

from dedistill.errors import UserError

EVERY = 100
"""Steps between looks where nothing else is due."""
ENOUGH = 3
"""Applied steps that every module has moved after: behind an output that starts at zero the first gradients are zero."""


class Ledger:
    """Looks at the trained weights now and then.

    ``modules``: names of the weights that belong together, which only as a whole must move: at the start of a LoKr or a
    LoRA one factor has no gradient. A whole network is one module.
    """

    def __init__(self, bit_sums: Callable[[], dict[str, int]], modules: list[list[str]]):
        """bit_sums: gives a number of each trained weight that changes with its bits."""
        self.bit_sums, self.modules = bit_sums, modules
        self.start()

    def start(self) -> None:
        """Begin anew with the weights as they are."""
        self.applied = 0
        """Steps applied since the last look."""
        self.last = self.bit_sums()

    def check(self, step: int) -> None:
        """Raises UserError, naming weights, if a module is bit for bit as it was at the last look, ENOUGH applied steps ago."""
        if self.applied < ENOUGH:
            return
        now = self.bit_sums()
        still = {name for name, total in now.items() if total == self.last[name]}
        dead = [names for names in self.modules if still.issuperset(names)]
        if dead:
            raise UserError(
                f"after step {step}: {self.applied} steps were applied, but nothing has changed in {len(dead)} of "
                f"{len(self.modules)} modules, e.g. {', '.join(dead[0][:3])}. Their gradient or learning rate is zero, or they "
                "are frozen. Training on would be in vain; leave them out of the targets if they cannot learn."
            )
        self.last, self.applied = now, 0
