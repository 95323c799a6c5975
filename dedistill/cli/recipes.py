"""The recipes that come with dedistill and what each needs, or the text of one, to copy and change.

dedistill recipes
dedistill recipes show flux_schnell_24gb > my_recipe.toml
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from dedistill.cli.command import command_parser, guarded
from dedistill.errors import UserError
from dedistill.recipe import Recipe, load_recipe
from dedistill.recipe.shipped import PREFIX, shipped_file, shipped_recipes

NEEDS = ("Hardware", "Memory")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("recipes", __doc__)
    parser.add_argument("action", nargs="?", choices=["list", "show"], default="list", help="what to do")
    parser.add_argument("name", nargs="?", help="show: recipe to print, with or without dedistill: in front")
    args: argparse.Namespace = parser.parse_args(argv)
    if (args.action == "show") != (args.name is not None):
        parser.error("show needs the NAME of a recipe" if args.action == "show" else f"list takes no name, got '{args.name}'")
    action: Callable[[], int] = (lambda: _show(args.name)) if args.action == "show" else _list
    return guarded(action, debug=args.debug)


def _list() -> int:
    for name, file in shipped_recipes().items():
        about, needs = said_of(file)
        recipe = load_recipe(f"{PREFIX}{name}")
        facts = {**needs, "Model": recipe.model.path or "a new one, random weights", "Data": _data(recipe)}
        print(f"{PREFIX}{name}\n  {about}")
        print("".join(f"  {key:10} {value}\n" for key, value in facts.items()))
    return 0


def _show(name: str) -> int:
    try:
        file = shipped_file(PREFIX + name.removeprefix(PREFIX))
    except LookupError as e:
        raise UserError(f"'{name}': {e.args[0]}", exit_code=2) from None
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file else []
    print("".join(lines[1:]), end="")  # the first is a path to the schema, as from the package's own folder
    return 0


def said_of(file: Path) -> tuple[str, dict[str, str]]:
    """The first paragraph of the comment at the head of a shipped recipe, and what stands behind the words of NEEDS."""
    comment, needs, last = [], {}, ""
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        if not line.startswith("#"):
            break
        comment.append(line[1:].strip())
        if found := re.match(r"# (\w[\w ]*?)  +(.*)", line):
            last = found[1]
            needs[last] = found[2]
        elif last:
            needs[last] += f" {line[1:].strip()}"
    about = " ".join(comment[: comment.index("")])
    return about, {key: needs[key] for key in NEEDS if key in needs}


def _data(recipe: Recipe) -> str:
    places: list[str | None] = [*(s.path for s in recipe.data.sets), recipe.data.path, recipe.data.pairs]
    where = ", ".join(place for place in places if place)
    return f"{recipe.data.source} in {where}" if where else recipe.data.source
