"""Check a recipe; or see which programs load an adapter file, and what to export for the others. Exit code 1 when none does.

dedistill check my_recipe.toml
dedistill check exports/digits-lokr.safetensors --model runs/digits/student/model
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dedistill.cli.command import command_parser, guarded, path, place
from dedistill.errors import amount, printable
from dedistill.recipe import load_recipe
from dedistill.recipe.resolve import make_plan
from dedistill.recipe.shipped import PREFIX

if TYPE_CHECKING:
    from dedistill.adapters.compatibility import Verdict


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("check", __doc__)
    parser.add_argument("file", type=place, help="recipe (TOML, or dedistill:NAME) or adapter file (safetensors)")
    parser.add_argument("--model", type=path, help="adapters: folder of the base, where the file does not say")
    parser.add_argument("--json", action="store_true", help="adapters: everything as JSON, with the names of all tensors")
    args: argparse.Namespace = parser.parse_args(argv)
    recipe = args.file.startswith(PREFIX) or Path(args.file).suffix.lower() == ".toml"
    if recipe and (args.model or args.json):
        name = "--model" if args.model else "--json"
        parser.error(f"argument {name}: belongs to adapter files, and this is a recipe")
    return guarded(lambda: _recipe(args.file) if recipe else _adapter(Path(args.file), args), debug=args.debug)


def _recipe(file: str) -> int:
    recipe = load_recipe(file)
    plan = make_plan(recipe)
    print(f"{file} is a valid recipe: {amount(plan.steps, 'step')}, batch {plan.batch}, into {recipe.run.out}/")
    return 0


def _adapter(file: Path, args: argparse.Namespace) -> int:
    from dedistill.release.export import check_file
    from dedistill.release.rounding import UNKNOWN

    checked = check_file(file, args.model)
    if args.json:
        programs = [asdict(v) | {"whole": v.whole} for v in checked.verdicts]
        print(json.dumps({"file": str(file)} | asdict(checked) | {"verdicts": programs}, indent=1))
    else:
        whole = [v.program for v in checked.verdicts if v.whole]
        what = (
            f"{checked.kind} of {amount(checked.layers, 'layer')}; " if checked.kind else "by the names of its tensors alone, "
        )
        loaders = f"{len(whole)} of {amount(len(checked.verdicts), 'program')} load it whole: {'; '.join(whole) or 'none'}"
        print(printable(f"{file}: {what}{loaders}"))
        print(checked.fault or checked.size or UNKNOWN, end="\n\n")
        for line in _table(checked.verdicts):
            print(printable(line))
    return 0 if any(v.loaded for v in checked.verdicts) else 1


def _table(verdicts: "Sequence[Verdict]") -> Iterator[str]:
    """A line for each program, best first, and one below with what is to be known of it. Names are never cut."""
    width = max(len(v.program) for v in verdicts)
    yield f"{'program':{width}}  {'loads':>13}  use instead"
    for v in verdicts:
        yield f"{v.program:{width}}  {f'{len(v.loaded):,} of {len(v.loaded) + len(v.ignored):,}':>13}  {v.use}".rstrip()
        left = (
            f"ignores {v.ignored[0]}" + (f" and {len(v.ignored) - 1:,} more" if len(v.ignored) > 1 else "") if v.ignored else ""
        )
        if said := "; ".join(filter(None, (v.note, v.strength, v.why or left))):
            yield f"    {said}"
