"""Ctrl-C and SIGTERM: finish the step, save, and say how to go on. A second one stops at once."""

import os
import signal
from types import FrameType

from dedistill.engine.launcher import launched


class StopRequest:
    """Context manager; ``signal`` is the signal that asked for a stop, or None."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self._launcher = os.getppid() if launched() else None
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether to stop after this step. A launcher that is gone counts as SIGTERM: it does not pass its own on."""
        if self.signal is None and self._launcher not in (None, os.getppid()):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
