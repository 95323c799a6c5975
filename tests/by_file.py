"""Commands called by the name of their file, as scripts do."""

import runpy
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "tools"


def tool(name: str, *arguments: object) -> int:
    """The exit code of ``python tools/NAME.py ARGUMENTS``, or of ``python -m NAME`` where that has a dot."""
    before, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        if "." in name:
            runpy.run_module(name, run_name="__main__")
        else:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
    except SystemExit as e:
        return e.code or 0
    finally:
        sys.argv = before
    return 0
