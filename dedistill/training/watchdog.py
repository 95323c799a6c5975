"""A process beside each process of a run: where that gives no sign of life for too long, its stacks are written and it ends."""

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
from mmap import mmap
from pathlib import Path
from types import FrameType

from dedistill.distributed.outside import LAYOUT, heartbeat
from dedistill.errors import RUN_AGAIN
from dedistill.training import watchdog_process

PATIENCE = 6
"""Times the limit that loading, and waiting for other processes, may take: those that are stuck have ended by then."""


class Watchdog:
    """Context manager. ``seconds`` without a sign of life make this process end with RUN_AGAIN; 0: never.

    Where the interpreter cannot run any more (a lock held in C, a driver that hangs) it is killed instead. A process of its
    own looks on, on the monotonic clock: a thread could not while another one holds the interpreter. Stacks of all threads
    go to ``folder``/stacks-rank-N.txt; ``kill -USR2`` asks for the same by hand.
    """

    def __init__(self, seconds: float, folder: Path):
        self.seconds, self.folder = seconds, folder

    def __enter__(self) -> "Watchdog":
        if not self.seconds:
            return self
        self._files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        memory, stacks = (file.fileno() for file in self._files)
        os.ftruncate(memory, LAYOUT.size)
        heartbeat.memory = mmap(memory, LAYOUT.size)
        heartbeat.beat("starting", patient=True)
        self._before = signal.signal(signal.SIGUSR2, self._end)  # while the interpreter runs, which is the safe way
        faulthandler.register(signal.SIGVTALRM, file=stacks, all_threads=True)  # if it does not
        rank = os.environ.get("RANK", "0")
        file = self.folder.absolute() / f"stacks-rank-{rank}.txt"
        watching, self._alive = os.pipe()
        facts = [os.getpid(), memory, stacks, self.seconds, PATIENCE, file, rank]
        command = [sys.executable, "-I", "-S", watchdog_process.__file__, *map(str, facts)]
        self._process = subprocess.Popen(command, stdin=watching, pass_fds=(memory, stacks), start_new_session=True)
        os.close(watching)
        return self

    def __exit__(self, *_: object) -> None:
        if not self.seconds:
            return
        self._process.kill()
        self._process.wait()
        os.close(self._alive)
        faulthandler.unregister(signal.SIGVTALRM)
        signal.signal(signal.SIGUSR2, self._before)
        heartbeat.memory = None
        for file in self._files:
            file.close()

    def _end(self, number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(self._files[1].fileno(), all_threads=True)
        os._exit(RUN_AGAIN)
