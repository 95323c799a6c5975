"""Check a recipe; or see which programs load an adapter file, and how many of its tensors. Exit code 1 when none does.

dedistill check my_recipe.toml
dedistill check exports/digits-lokr.safetensors --model runs/digits/student/model
"""

import argparse
from pathlib import Path

from dedistill.cli.command import command_parser, guarded, path, place
from dedistill.errors import amount
from dedistill.recipe import load_recipe
from dedistill.recipe.resolve import make_plan
from dedistill.recipe.shipped import PREFIX


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("check", __doc__)
    parser.add_argument("file", type=place, help="recipe (TOML, or dedistill:NAME) or adapter file (safetensors)")
    parser.add_argument("--model", type=path, help="adapters: folder of the base, where the file does not say")
    args: argparse.Namespace = parser.parse_args(argv)
    recipe = args.file.startswith(PREFIX) or Path(args.file).suffix.lower() == ".toml"
    if recipe and args.model:
        parser.error("argument --model: belongs to adapter files, and this is a recipe")
    return guarded(lambda: _recipe(args.file) if recipe else _adapter(Path(args.file), args.model), debug=args.debug)


def _recipe(file: str) -> int:
    recipe = load_recipe(file)
    plan = make_plan(recipe)
    print(f"{file} is a valid recipe: {amount(plan.steps, 'step')}, batch {plan.batch}, into {recipe.run.out}/")
    return 0


def _adapter(file: Path, model: Path | None) -> int:
    from rich.console import Console
    from rich.table import Table

    from dedistill.release.export import check_file

    verdicts = check_file(file, model)
    table = Table("program", "loads", "ignores", "what it ignores, or why it refuses")
    for v in verdicts:
        shown = v.why or ", ".join(v.ignored[:2]) + (" ..." if len(v.ignored) > 2 else "")
        table.add_row(v.program, f"{len(v.loaded):,}", f"{len(v.ignored):,}", shown)
    Console(soft_wrap=True, highlight=False, markup=False).print(table)
    return 0 if any(v.loaded for v in verdicts) else 1
