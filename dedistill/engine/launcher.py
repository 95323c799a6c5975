"""Whether ``accelerate launch`` started this process, and the command that starts it again the same way."""

import os
import shlex
from pathlib import Path


def launched() -> bool:
    """True under ``accelerate launch``, which says so to its children in the environment."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def resume_command(argv: list[str]) -> str:
    """What to type to continue, with the launcher and its options if there was one. argv: the arguments of training."""
    if not launched():
        return shlex.join(["python", "-m", "dedistill.train", *argv])
    return shlex.join(["accelerate", "launch", *_launch_options(os.getppid()), "-m", "dedistill.train", *argv])


def _launch_options(process: int) -> list[str]:
    """The launcher's own options, where the system shows them (Linux)."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        return words[words.index("launch") + 1 : words.index("dedistill.train") - 1]
    except (OSError, ValueError):
        return []
