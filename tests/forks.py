"""``python -m dedistill ...`` as forks of the process that tests: what takes five seconds to import is there already.

A fork finds what a new process would: its signals, environment, streams, and nothing of what the tests did with accelerate. It
cannot show what happens while libraries are imported; cli/test_interrupted.py and cli/test_installed.py start new processes.
"""

import os
import runpy
import signal
import stat
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import partial

from accelerate.state import AcceleratorState, PartialState

MODULES = ("dedistill", "dedistill.train")


class ForkedPython(subprocess.Popen):
    """In the place of ``subprocess.Popen``: forks for commands of ours, also those that a fork starts; the rest as ever."""

    def __init__(self, args: Sequence[str], *more: object, env: Mapping[str, str] | None = None, **options: object) -> None:
        words = [] if isinstance(args, str) else [str(word) for word in args]
        if words[:1] == [sys.executable] and "-m" in words[:3] and (rest := words[words.index("-m") + 1 :])[0] in MODULES:
            options["preexec_fn"] = partial(_become, *rest, env=env)
        super().__init__(args, *more, env=env, **options)


def _become(module: str, *words: str, env: Mapping[str, str] | None) -> None:
    """Run the module as ``python -m`` would. Never returns, and so nothing is executed."""
    code = 1
    try:
        _begin_anew(env)
        sys.argv = [module, *words]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as e:
            code = int(e.code or 0)
        threading._shutdown()  # other threads are waited for
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _begin_anew(env: Mapping[str, str] | None) -> None:
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for number in range(3, 1024):  # ends of pipes of other processes, and that by which Popen waits for an exec
        try:
            if stat.S_ISFIFO(os.fstat(number).st_mode):
                os.close(number)
        except OSError:
            continue
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
