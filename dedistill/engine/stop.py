"""Ctrl-C and SIGTERM: finish the step, save, and say how to go on. A second one stops at once."""

import os
import signal
import time
from types import FrameType

from dedistill.engine.launcher import launched, ranks

ECHO = 5.0
"""Seconds in which a launcher of several processes passes on the Ctrl-C that they have had already."""


class StopRequest:
    """Context manager; ``signal`` is the signal that asked for a stop, or None."""

    def __init__(self):
        self.signal: int | None = None
        self._first = 0.0

    def __enter__(self) -> "StopRequest":
        self._launcher = os.getppid() if launched() else None
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> int:
        """The signal by which to stop after this step, 0 to go on.

        A launcher that is gone counts as SIGTERM: it does not pass its own on.
        """
        if self.signal is None and self._launcher not in (None, os.getppid()):
            self.signal = signal.SIGTERM
        return int(self.signal or 0)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first = number, now
        elif now - self._first > (ECHO if ranks() > 1 else 0):
            raise KeyboardInterrupt
