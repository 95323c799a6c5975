"""What is said to the user: the one exception that carries a message for them, and how messages count."""

import errno
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RUN_AGAIN = 75
"""Exit code of a run that is not finished: the same command goes on with it (EX_TEMPFAIL of sysexits.h)."""


def printable(text: str) -> str:
    """``text`` for a terminal: what names, captions and files of others could control it with, or turn its order round, is
    spelt out."""
    return _CONTROLS.sub(lambda found: f"\\x{n:02x}" if (n := ord(found[0])) < 0x100 else f"\\u{n:04x}", text)


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""All but tabs and line feeds; marks of direction, too, Unicode's own ends of lines, and bytes of names that are no UTF-8."""


def say(line: str) -> None:
    """A line about work that goes on, at once."""
    print(printable(line), file=sys.stderr, flush=True)


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and the way out.

    The command line prints the message alone (the traceback only with ``--debug``) and exits with ``exit_code``:
    2 for a recipe or an argument, RUN_AGAIN where the same command may well succeed, 1 for everything else.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(printable(message))
        self.exit_code = exit_code


def amount(number: int, one: str, many: str = "") -> str:
    """1 image, 1,234 images. many: what several are called, verb included where it follows; default ``one`` with an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or what it was raised from, says that memory ran out: the system's, torch's or a GPU's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    # torch and the libraries below it, on a CPU as on a GPU, raise one like any other; safetensors has a kind of its own
    worded = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    if worded and any(words in str(error).lower() for words in _NO_MEMORY):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed", "bad_alloc")


@contextmanager
def enough_memory(doing: str | Callable[[], str]) -> Iterator[None]:
    """Names what was going on when memory ran out. That may be for another process: the same command may well succeed.

    doing: or a function that says it then, of work that changes.
    """
    try:
        yield
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        what = doing if isinstance(doing, str) else doing()
        raise UserError(f"out of memory while {what}; what was complete is kept", RUN_AGAIN) from e
