"""What all commands share: a parser whose help shows defaults and an example, and failures as one message and an exit code."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from dedistill.cli.quiet import lasting_output, quiet_dependencies
from dedistill.errors import RUN_AGAIN, UserError
from dedistill.files import with_home
from dedistill.recipe import Recipe, load_recipe

INTERNAL_ERROR = 70


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says the default of every option that has one, unless its help does already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, False, [], argparse.SUPPRESS) or "default" in text:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


def command_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The parser of ``dedistill NAME``. doc: what it does in one line, then examples, as in the docstring of a module."""
    about, _, examples = doc.partition("\n\n")
    examples = "".join(f"  {line}\n" for line in examples.splitlines())
    parser = argparse.ArgumentParser(
        f"dedistill {name}", description=about, epilog=f"example:\n{examples}", formatter_class=_Help
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def recipe_parser(name: str, doc: str, recipe: str = "recipe file (TOML), or dedistill:NAME") -> argparse.ArgumentParser:
    """``command_parser`` of a command about one recipe."""
    parser = command_parser(name, doc)
    parser.add_argument("recipe", type=place, help=recipe)
    add_overrides(parser)
    return parser


def place(text: str) -> str:
    """A path whose ``~`` is the home folder, or ``dedistill:NAME`` as it is."""
    try:
        return with_home(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{e}, got '{text}'") from None


def path(text: str) -> Path:
    """A path whose ``~`` is the home folder."""
    return Path(place(text))


def add_overrides(parser: argparse.ArgumentParser) -> None:
    told = "override a key of the recipe, e.g. train.lr=2e-5; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=told)


def run_recipe(args: argparse.Namespace, action: Callable[[Recipe], int]) -> int:
    """Run ``action`` on the recipe that ``recipe_parser``'s arguments name; what it says goes on where no one listens.

    An error that begins with a key of the recipe gets its file and line.
    """

    def run() -> int:
        recipe = load_recipe(args.recipe, args.set)
        try:
            return action(recipe)
        except UserError as e:
            raise UserError(recipe.placed(str(e)), e.exit_code) from e

    with lasting_output():
        return guarded(run, debug=args.debug)


def guarded(action: Callable[[], int | None], *, debug: bool) -> int:
    """Run ``action`` with quiet libraries; turn any failure into one clear message, with the traceback only on demand."""
    quiet_dependencies()
    try:
        return action() or 0
    except UserError as e:
        if debug:
            traceback.print_exc()
        print(f"{_speaker()}error: {e}", file=sys.stderr)
        return e.exit_code
    except OSError as e:
        if debug:
            traceback.print_exc()
        print(f"{_speaker()}error: {e.filename or 'input/output'}: {e.strerror or e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was complete is kept", file=sys.stderr)
        return RUN_AGAIN
    except Exception as e:
        if debug:
            traceback.print_exc()
        print(
            f"{_speaker()}internal error: {type(e).__name__}: {e}\nRun again with --debug for the traceback.", file=sys.stderr
        )
        return INTERNAL_ERROR


def _speaker() -> str:
    """Who speaks, where several processes do."""
    return "" if os.environ.get("WORLD_SIZE", "1") == "1" else f"rank {os.environ.get('RANK', '?')}: "
