"""What a command that compares models asks them: prompts of the data or of a file, chosen before anything heavy is loaded."""

import csv
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dedistill.data.images.caption_files import LINE_END, READERS, BadCaption, as_captions, choose_columns, cleaned
from dedistill.data.images.types import ImageSet
from dedistill.data.split import LEAST_UNITS, Split, captions_of
from dedistill.data.usable import Usable, look
from dedistill.errors import UserError, amount
from dedistill.io.atomic import with_home
from dedistill.recipe import Recipe, load_recipe

MOST_PROMPTS = 100_000


@dataclass(frozen=True)
class Prompts:
    """trained: those of the texts that are captions which were trained on, and no held-out image has as well."""

    texts: tuple[str, ...]
    trained: frozenset[str] = frozenset()


@dataclass(frozen=True)
class EvalSettings:
    """What is compared. data: the recipe whose data is asked about; usable: its images; prompts: None where they are made up
    by its source."""

    recipes: list[Recipe]
    data: Recipe
    usable: Usable | None
    prompts: Prompts | None


class HasPrompts(Protocol):
    def prompts(self, seed: int, count: int) -> list[str]: ...


def ask(args: Namespace, say: Callable[[str], None], *, least: int = 1) -> EvalSettings:
    """What the arguments of ``dedistill.cli.command.of_candidates`` ask for, in a second and without torch.

    Says how many different prompts there are, and where they are from. least: different ones that are needed. Raises
    UserError where there are fewer.
    """
    recipes = [load_recipe(path, args.set) for path in args.recipes]
    own = next((r for r in recipes if r.data.source != "pairs"), recipes[0])
    data = load_recipe(args.data, args.set) if args.data else own
    count, usable = _number(args.prompts), None
    if count is None:
        prompts = Prompts(read_prompts(args.prompts, None))
        say(f"prompts: {distinct(prompts.texts)}, of '{args.prompts}'")
    elif data.data.source == "pictures":
        usable = look(data, say)
        prompts = of_images(usable.split, count, data.preview.prompts, say)
    else:
        if count < least:
            check_prompts([str(i) for i in range(count)], least)
        return EvalSettings(recipes, data, None, None)
    check_prompts(prompts.texts, least)
    return EvalSettings(recipes, data, usable, prompts)


def of_images(split: Split, count: int, own: Sequence[str], say: Callable[[str], None]) -> Prompts:
    """``count`` prompts for a model of these images, and where they are from. own: prompts of the user's."""
    texts = split.prompts(0, count, own)
    held = captions_of(split.held)
    different = set(texts)
    trained = frozenset(different & captions_of(split.train) - held - set(own))
    parts = [
        (len(different & held), "of held-out images"),
        (len(different & set(own) - held), "of preview.prompts"),
        (len(trained), "of captions that were trained on: what they show says less of other prompts"),
    ]
    said = f"prompts: {distinct(texts)}: " + ", ".join(f"{n:,} {what}" for n, what in parts if n)
    again = "; each comes several times, from other noise" if len(different) < count else ""
    say(said + again)
    return Prompts(tuple(texts), trained)


def _number(value: str) -> int | None:
    """How many prompts of the data ``--prompts`` asks for; None where it names a file. Raises UserError for too many."""
    if value.isdecimal() and (len(value) > 9 or int(value) > MOST_PROMPTS):
        raise UserError(f"--prompts: {value[:20]} are more than the {MOST_PROMPTS:,} that are asked at most", 2)
    return int(value) if value.isdecimal() and int(value) > 0 else None


def read_prompts(value: str, source: Callable[[], HasPrompts] | None) -> tuple[str, ...]:
    """``value`` is a number of prompts to take from the data, which is opened for it; or a text file, a prompt per line; or a
    table (parquet, csv, jsonl) with a column of prompts or captions."""
    if source and (count := _number(value)):
        return tuple(source().prompts(0, count))
    if Path(value).suffix.lower() in READERS:
        return _prompts_of_table(Path(with_home(value)))
    try:
        text = Path(with_home(value)).read_bytes().decode("utf-8-sig")
        lines = [line.strip() for line in LINE_END.split(text)]
    except (OSError, ValueError) as e:
        raise UserError(f"--prompts: '{value}' is neither a number nor a readable text file: {e}", exit_code=2) from e
    if not (prompts := tuple(line for line in lines if line)):
        raise UserError(f"--prompts: '{value}' holds no prompts", exit_code=2)
    return prompts


_TABLE = ImageSet("prompts", missing_captions="empty")


def _prompts_of_table(path: Path) -> tuple[str, ...]:
    """Those of its columns that hold captions, row by row."""
    name = f"--prompts: '{path}'"
    try:
        rows = [row for _, row in READERS[path.suffix.lower()](path) if isinstance(row, dict)]
        columns = choose_columns(_TABLE, path, list(dict.fromkeys(key for row in rows for key in row)), rows)
        texts = [c for row in rows for column in columns for c in cleaned(as_captions(row.get(column), column))]
    except (OSError, ValueError, csv.Error, BadCaption) as e:
        raise UserError(f"{name} cannot be read: {e}", exit_code=2) from e
    except UserError as e:
        raise UserError(f"{name}: {e}", exit_code=2) from e
    if not texts:
        raise UserError(f"{name} holds no prompts", exit_code=2)
    return tuple(texts)


@dataclass(frozen=True)
class ListedPrompts:
    """Those of a file, over and over."""

    name: str
    texts: tuple[str, ...]

    def prompts(self, seed: int, count: int) -> list[str]:
        return [self.texts[i % len(self.texts)] for i in range(count)]


def distinct(prompts: Sequence[str], trained: Collection[str] = ()) -> int | str:
    """How many there are, how many different ones where that is less, and how many of these were trained on."""
    count, different, known = len(prompts), len(set(prompts)), len(set(trained))
    if different == count and not known:
        return count
    said = f"{count:,}" if different == count else f"{count:,}, {different:,} of them different"
    return said + (f", {known:,} of these trained on" if known else "")


def say_repeated(prompts: Sequence[str], say: Callable[[str], None]) -> None:
    """Say so where there are fewer different prompts than were asked for."""
    if len(set(prompts)) < len(prompts):
        say(f"prompts: {distinct(prompts)}; those that come again do so from other noise")


def check_prompts(prompts: Sequence[str], least: int = LEAST_UNITS) -> None:
    """Raise UserError for too few different prompts to choose by."""
    if (count := len(set(prompts))) < least:
        some = amount(count, "different prompt is", "different prompts are")
        raise UserError(
            f"--prompts: {some} too few to choose by; at least {least} are needed. Give a text file with a prompt per line "
            "(--prompts prompts.txt), or more preview.prompts or captions in the recipe; dedistill sweep makes images of any "
            "number, and chooses nothing",
            2,
        )
