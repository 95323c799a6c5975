"""Ctrl-C and SIGTERM: finish the step, save, and say how to go on. A second one stops at once."""

import signal
from types import FrameType


class StopRequest:
    """Context manager; ``signal`` is the signal that asked for a stop, or None."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
