"""Back to before steps that could not be applied."""

import sys
from typing import TYPE_CHECKING

from dedistill.engine.checkpoint import drop_after, newest_until

if TYPE_CHECKING:
    from dedistill.engine.loop import Trainer


def go_back(trainer: "Trainer", since: int) -> None:
    """Back to the newest good checkpoint of at most ``since`` steps, without those after it, with today's quarantine.

    Without such a one: to ``since`` itself, which is saved; its weights are the present ones, since nothing was applied
    after it. Either way the same steps come of it: no sample is left out before ``since``.
    """
    folder, judged = trainer.run.checkpoints, trainer.guard.state()
    trainer.saver.wait()
    found = newest_until(folder, since) if trainer.world.main else None
    name = trainer.world.from_main(found.name if found else None)
    if trainer.world.main:
        drop_after(folder, since, keep=0 if name else 1)  # at any instant there is one to go on from
    trainer.update.drop()
    trainer.step, trainer.skipped = since, trainer.skipped - (trainer.step - since)
    if name is not None:
        trainer.read(folder / name)
    trainer.guard.load({key: judged[key] for key in ("quarantine", "returned")})
    trainer.source.since = trainer.guard.since()
    trainer.unfinished = None  # its row was written since
    if name is None:
        trainer.checkpoint(wait=True)
    if trainer.world.main:
        drop_after(folder, since)
        left_out = [name for name, entry in trainer.guard.quarantine.items() if entry["since"] == since]
        said = f"step {since + 1} and those after it: {len(left_out)} samples stand out and are left out from there on"
        print(f"{said}, e.g. {left_out[0]}; trained again from step {trainer.step + 1} on", file=sys.stderr)
