"""Which programs load an adapter file, and how many of its tensors; exit code 1 when none does.

dedistill check exports/digits-lokr.safetensors --model runs/digits/student/model
"""

import argparse
from pathlib import Path

from dedistill.cli.command import command_parser, guarded


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("check", __doc__)
    parser.add_argument("file", type=Path, help="adapter file (safetensors)")
    parser.add_argument("--model", type=Path, help="folder of the base, where the file does not say")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from dedistill.release.adapter import check_file

    verdicts = check_file(args.file, args.model)
    table = Table("program", "loads", "ignores", "what it ignores, or why it refuses")
    for v in verdicts:
        shown = v.why or ", ".join(v.ignored[:2]) + (" ..." if len(v.ignored) > 2 else "")
        table.add_row(v.program, f"{len(v.loaded):,}", f"{len(v.ignored):,}", shown)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
    return 0 if any(v.loaded for v in verdicts) else 1
