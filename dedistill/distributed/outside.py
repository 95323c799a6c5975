"""What passes between this process and those outside it: signs of life go out, requests come in by signals and files.

The watchdog that looks at the signs is dedistill.training.watchdog. Nothing here needs torch: signals are heard before that is
loaded.
"""

import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from mmap import mmap
from pathlib import Path
from types import FrameType
from typing import TypedDict

from dedistill.errors import RUN_AGAIN

# --- signs of life ---------------------------------------------------------------------------------------------------


LAYOUT = struct.Struct("<qq?40s")
"""Signs so far, step, whether the present work may be silent for longer, its name (UTF-8, padded with zeros)."""


class Heartbeat:
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


heartbeat = Heartbeat()
"""The heartbeat of this process: there is one, as there is one main thread."""


# --- the end of the process that this one works for -----------------------------------------------------------------------


WORKS_FOR = "DEDISTILL_WORKS_FOR"
"""Environment variable: the process that started this one, or a launcher of it, and that it must not outlive."""
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the system kill this process when its parent ends, however that ends, if it works for another.

    Killed, and not asked to stop: whoever runs the parent's command again at once must find no lock held. Linux only.
    """
    if (owner := os.environ.get(WORKS_FOR)) is None or sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:  # it ended before this process could ask
        raise SystemExit(RUN_AGAIN) from None


# --- what a run can be asked for while it goes on: by signals to a process, or by files in the run directory ------------


ECHO, REPEAT = 5.0, 0.5
"""Seconds in which a launcher passes on the signal that its processes have had already, and in which other programs send one
twice; a person's second Ctrl-C comes later."""
FILES = ("stop", "save", "sample")
"""``touch RUN/stop``: save and end for good; ``RUN/save``: save and go on; ``RUN/sample``: previews now. Only what ``touch``
makes, an empty file, is a request: what somebody wrote is not ours to remove."""
BY_SIGNAL, BY_FILE = "signal", "file"


class Request(TypedDict):
    """What was asked of a process in one step."""

    stop: str
    """BY_SIGNAL (which is the larger word, and wins), BY_FILE or ""."""
    save: bool
    sample: bool


def is_request(path: Path) -> bool:
    """Whether there is an empty file of the user's at ``path``, which must have the name of a request."""
    return path.is_file() and not path.is_symlink() and not path.stat().st_size


def launched() -> bool:
    """True under ``accelerate launch`` and ``torchrun``, which say so to their children in the environment."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


class StopRequests:
    """Context manager around a whole run. Needs no torch, so that signals are heard before that is loaded.

    SIGINT, SIGTERM and SIGHUP (a terminal that is gone) end the process at once as long as there is nothing to save, and else
    after the step; a second one ends it now, whatever it does. SIGUSR1 asks for a save.
    """

    def __init__(self) -> None:
        self.signalled = self.saves = False
        self.deferred = False
        """Whether there is something to save, so that a stop waits for the end of the step."""
        self._first = 0.0
        self._launcher: int | None = None
        self._folder: Path | None = None
        self._told: set[str] = set()

    def __enter__(self) -> "StopRequests":
        self._launcher = os.getppid() if launched() else None
        self._before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._stop)
        self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._save)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def watch(self, folder: Path) -> list[str]:
        """Look for files in ``folder``, too. Those that are there already are of before: removed, with a note on each."""
        self._folder = folder
        return [f"'{folder / name}' was there before the start and is removed" for name in self._taken()]

    def poll(self) -> Request:
        """What was asked of this process since the last call. To be called once a step."""
        files = self._taken()
        stop = BY_SIGNAL if self.interrupted() else BY_FILE if "stop" in files else ""
        save, self.saves = self.saves or "save" in files, False
        return {"stop": stop, "save": save, "sample": "sample" in files}

    def interrupted(self) -> bool:
        """Whether a signal has asked for a stop.

        A launcher that is gone counts as one: it does not pass its own on.
        """
        self.signalled = self.signalled or self._launcher not in (None, os.getppid())
        return self.signalled

    def _taken(self) -> list[str]:
        """Names of the files that were there. Each is removed, so that it counts once; of others by such a name it is said
        once that they are no requests."""
        taken = []
        for path in [self._folder / name for name in FILES] if self._folder else ():
            if is_request(path):
                with suppress(OSError):  # gone, or not to be removed: then it would count again and again
                    os.unlink(path)
                    taken.append(path.name)
            elif path.name not in self._told and os.path.lexists(path):
                self._told.add(path.name)
                print(f"'{path}' is not an empty file, so it is not taken for a request; `touch` makes one", file=sys.stderr)
        return taken

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.saves = True

    def _stop(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signalled and now - self._first > (ECHO if launched() else REPEAT):
            print("stopped now; what was saved is intact", file=sys.stderr, flush=True)
            os._exit(RUN_AGAIN)  # threads that save or load may never end: nobody waits for them
        if self.signalled:
            return
        self.signalled, self._first = True, now
        if not self.deferred:
            raise KeyboardInterrupt
