"""What all commands share: a parser whose help shows defaults and an example, types of arguments, failures as one message."""

import argparse
import errno
import logging
import math
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar, get_args

from dedistill.distributed.launcher import hide_gpus
from dedistill.errors import RUN_AGAIN, UserError, is_out_of_memory, printable, say
from dedistill.flow.guidance import guider_of
from dedistill.io.atomic import with_home
from dedistill.io.ownership import drop_beginnings
from dedistill.recipe import Recipe, RecipeError, load_recipe
from dedistill.recipe.schema import SolverName
from dedistill.recipe.shipped import PREFIX

# --- what is said on the terminal ------------------------------------------------------------------------------------


def quiet_dependencies() -> None:
    """Silence messages of libraries that a user can do nothing about. Call before importing them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # its level is set when it is imported


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class BrokenPipeTolerant:
    """A text stream whose reader may go away, or whose disk may fill: what cannot be written is lost, and nothing else is."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # a terminal or file that takes ASCII alone
                known = self._stream.encoding or "ascii"
                self._stream.write(text.encode(known, "backslashreplace").decode(known))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def broken_pipes_tolerated() -> Iterator[None]:
    """What is said on the terminal never ends what is done meanwhile."""
    with redirect_stdout(BrokenPipeTolerant(sys.stdout)), redirect_stderr(BrokenPipeTolerant(sys.stderr)):
        yield


# --- what all commands share -----------------------------------------------------------------------------------------


INTERNAL_ERROR = 70
SOLVERS = get_args(SolverName)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Says the default of every option with a value and of places that have one, unless the help does; or what is required."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "default" in text or action.nargs == 0 or default is argparse.SUPPRESS or not (action.option_strings or default):
            return text
        if action.required:
            return f"{text} (required)"
        shown = " ".join(map(str, default)) if isinstance(default, list) else "none" if default is None else str(default)
        return f"{text} (default: {(shown or 'none').replace('%', '%%')})"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        setting = message.startswith("unrecognized arguments") and re.search(r"\b\w+\.\w+=", message)
        super().error(f"{message} (--set takes one KEY=VALUE; repeat it for more)" if setting else message)


def command_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """The parser of ``dedistill NAME``. doc: what it does in one line, then examples, as in the docstring of a module."""
    about, _, examples = doc.partition("\n\n")
    examples = "".join(f"  {line}\n" for line in examples.splitlines())
    parser = _Parser(f"dedistill {name}", description=about, epilog=f"example:\n{examples}", formatter_class=_Help)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def recipe_parser(name: str, doc: str, recipe: str = "recipe file (TOML), or dedistill:NAME") -> argparse.ArgumentParser:
    """``command_parser`` of a command about one recipe."""
    parser = command_parser(name, doc)
    parser.add_argument("recipe", type=place, help=recipe)
    add_overrides(parser)
    add_cpu(parser)
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


class _Cpu(argparse.Action):
    def __call__(self, *_: object) -> None:
        hide_gpus()


def add_cpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpu", action=_Cpu, nargs=0, help="use the CPU, also for a large network or where there is a GPU")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    text = "override a key of the recipe, e.g. train.lr=2e-5; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)


def run_recipe(args: argparse.Namespace, action: Callable[[Recipe], int]) -> int:
    """Run ``action`` on the recipe that ``recipe_parser``'s arguments name; what it says goes on where no one listens.

    An error that begins with a key of the recipe gets its file and line.
    """

    def run() -> int:
        recipe = load_recipe(args.recipe, args.set)
        for note in recipe.notes if os.environ.get("RANK", "0") == "0" else ():
            say(f"note: {note}")
        try:
            return action(recipe)
        except RecipeError:
            raise
        except UserError as e:
            raise UserError(recipe.placed(str(e)), e.exit_code) from e

    with broken_pipes_tolerated():
        return guarded(run, debug=args.debug)


def guarded(action: Callable[[], int | None], *, debug: bool) -> int:
    """Run ``action`` with quiet libraries; turn any failure into one clear message, with the traceback only on demand."""
    quiet_dependencies()
    drop_beginnings(failed=False)  # what was made before is not this command's
    code = 1
    try:
        code = _exit_code_of(action, debug=debug)
    finally:
        drop_beginnings(failed=bool(code))
    return code


def _exit_code_of(action: Callable[[], int | None], *, debug: bool) -> int:
    try:
        return action() or 0
    except UserError as e:
        if debug:
            traceback.print_exc()
        for line in e.errors if isinstance(e, RecipeError) else [e]:
            print(f"{_speaker()}error: {line}{_way_out(e)}", file=sys.stderr)
        return RUN_AGAIN if is_out_of_memory(e) else e.exit_code
    except BrokenPipeError:  # main() ends quietly: who reads has seen enough
        raise
    except OSError as e:
        if debug:
            traceback.print_exc()
        place = printable(str(e.filename or "input/output"))
        print(f"{_speaker()}error: {place}: {e.strerror or e}{_way_out(e)}", file=sys.stderr)
        return RUN_AGAIN if is_out_of_memory(e) else 1
    except KeyboardInterrupt:
        return _stopped()
    except Exception as e:
        if _is_interrupt(e):
            return _stopped()
        if debug:
            traceback.print_exc()
        if is_out_of_memory(e):
            print(f"{_speaker()}error: out of memory; what was complete is kept ({printable(str(e))[:200]})", file=sys.stderr)
            return RUN_AGAIN
        what = f"{type(e).__name__}: {printable(str(e))}"
        if not _has_temporary_folder():  # libraries need one, and fail in ways of their own
            print(f"{_speaker()}error: {what}{_way_out(e)}", file=sys.stderr)
            return 1
        print(f"{_speaker()}internal error: {what}\nRun again with --debug for the traceback.", file=sys.stderr)
        return INTERNAL_ERROR


def _way_out(error: BaseException | None) -> str:
    """A second line where ``error`` comes of too many open files, or where no folder takes temporary ones."""
    if not _has_temporary_folder():
        return "\nNo folder for temporary files can be written to: set TMPDIR to one."
    while error is not None and getattr(error, "errno", None) not in (errno.EMFILE, errno.ENFILE):
        error = error.__cause__
    return "\nA process may have more files open after: ulimit -n 65536" if error else ""


def _has_temporary_folder() -> bool:
    try:
        return bool(tempfile.gettempdir())
    except FileNotFoundError:
        return False


def _stopped() -> int:
    print("stopped; what was complete is kept", file=sys.stderr)
    return RUN_AGAIN


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an interrupt is behind ``error``: what is imported meanwhile may make another of it."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _speaker() -> str:
    """Who speaks, where several processes do."""
    return "" if os.environ.get("WORLD_SIZE", "1") == "1" else f"rank {os.environ.get('RANK', '?')}: "


def run_folder(named: str, overrides: Sequence[str] = ()) -> Path:
    """The folder of a run that is named itself or by its recipe. Raises UserError where there is none."""
    folder = Path(named)
    if folder.is_file() or named.startswith(PREFIX):
        folder = Path(load_recipe(named, overrides).run.out)
    if not folder.is_dir():
        raise UserError(f"'{folder}': no such run; dedistill train makes it", 2)
    return folder


# --- types for command lines -----------------------------------------------------------------------------------------


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, lambda n: n >= 1, "a whole number of at least 1")


def whole(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, lambda n: n >= 0, "a whole number of at least 0")


def count(text: str) -> int:
    """A whole number of at least 1, which may end in K, M or B: 600M, 3.2B."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper())
    wanted = "a whole number of at least 1, or one such as 600M or 3.2B"
    if scale is None:
        return _number(text, int, lambda n: n >= 1, wanted)
    return round(scale * _number(text[:-1], float, lambda n: 1 <= n * scale < math.inf, wanted))


def positive_number(text: str) -> float:
    """A number above 0."""
    return _number(text, float, lambda n: 0 < n < math.inf, "a number above 0")


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN."""
    return _number(text, float, math.isfinite, "a finite number")


def guider(text: str) -> str:
    """A guider of ``flow.guidance`` by name."""
    try:
        guider_of(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    return text


def of_candidates(name: str, doc: str, folder: str) -> argparse.ArgumentParser:
    """The parser of commands that compare finished runs; ``evaluation.candidates.compared`` reads its result."""
    parser = command_parser(name, doc)
    parser.add_argument(
        "recipes", type=place, nargs="+", help="recipes whose finished runs are compared: files, or dedistill:NAME"
    )
    add_overrides(parser)
    add_cpu(parser)
    parser.add_argument(
        "--candidates", nargs="+", help="of each run: base, last, posthoc, or names of posthoc files; default all"
    )
    parser.add_argument(
        "--data", type=place, help="recipe for prompts and held-out samples; default the first that has data of its own"
    )
    parser.add_argument("--prompts", default="64", help="a number of prompts from the data, or a text file, one per line")
    parser.add_argument("--out", type=path, help=f"output folder; default RUN/{folder} of the last recipe")
    return parser


def of_sweep(name: str, doc: str, folder: str, cfgs: list[float]) -> argparse.ArgumentParser:
    """``of_candidates`` for commands that make images; ``evaluation.candidates.sweep_grid`` and ``clip_judge`` read it."""
    parser = of_candidates(name, doc, folder)
    parser.add_argument("--cfg", type=finite, nargs="+", default=cfgs, help="guidance scales")
    parser.add_argument(
        "--guider",
        type=guider,
        nargs="+",
        default=[],
        metavar="NAME",
        help="ways of guiding at these scales, as in apg:eta=0 (docs/sampling.md); default the recipes' sample.guider",
    )
    parser.add_argument("--skip", type=whole, nargs="+", default=[0], help="first steps without guidance")
    parser.add_argument(
        "--solver",
        choices=SOLVERS,
        nargs="+",
        default=[],
        help="ways from noise to images; default the recipes' sample.solver",
    )
    parser.add_argument("--steps", type=positive, nargs="+", default=[], help="their steps; default each recipe's sample.steps")
    parser.add_argument("--seeds", type=whole, nargs="+", default=[0], help="seeds of the starting noise")
    parser.add_argument("--clip", type=path, metavar="FOLDER", help="CLIPModel of transformers that scores images and prompts")
    parser.add_argument("--real", type=path, metavar="FOLDER", help="real images to compare with in CLIP's space")
    return parser


Number = TypeVar("Number", int, float)


def _number(text: str, kind: type[Number], fits: Callable[[Number], bool], wanted: str) -> Number:
    with suppress(ValueError):
        value = kind(text)
        if value == value and fits(value):  # NaN is not
            return value
    raise argparse.ArgumentTypeError(f"expects {wanted}, got '{text}'")
