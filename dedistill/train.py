"""``python -m dedistill.train RECIPE`` and ``accelerate launch -m dedistill.train RECIPE``: the same as ``dedistill train``."""

import sys

from dedistill.cli.main import main as command_line


def main(argv: list[str] | None = None) -> int:
    """``dedistill train`` with these arguments; returns its exit code."""
    return command_line(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
