"""Signs of life of this process, for the watchdog that looks at them from outside (dedistill.training.watchdog)."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap

LAYOUT = struct.Struct("<qq?40s")
"""Signs so far, step, whether the present work may be silent for longer, its name (UTF-8, padded with zeros)."""


class Pulse:
    """``memory``: LAYOUT.size bytes shared with the watchdog; None without one."""

    def __init__(self) -> None:
        self.memory: mmap | None = None
        self.signs, self.step, self.phase, self.patient = 0, 0, "starting", True

    def beat(self, phase: str | None = None, *, patient: bool = False) -> None:
        """The process is alive, and begins with ``phase``. patient: it may stay silent for as long as others are waited for.

        Without a phase: another sign in the same one, for threads that the main one may be waiting for.
        """
        if phase is not None:
            self.phase, self.patient = phase, patient
        self.signs += 1
        if self.memory:
            LAYOUT.pack_into(self.memory, 0, self.signs, self.step, self.patient, self.phase.encode())

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The block is patient work called ``phase``; what was before it goes on after it."""
        before = self.phase, self.patient
        self.beat(phase, patient=True)
        try:
            yield
        finally:
            self.beat(before[0], patient=before[1])


heartbeat = Pulse()
"""The heartbeat of this process: there is one, as there is one main thread."""
