"""From a TOML file to a ``Recipe``: every mistake is reported at once, each with file, line, key and the nearest valid key."""

import os.path
import re
import tomllib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dedistill.errors import UserError, amount
from dedistill.io.atomic import with_home
from dedistill.recipe.draft import Draft
from dedistill.recipe.explain import any_of, explain, quote, shown
from dedistill.recipe.fields import OVERRIDES, KeySource, Table
from dedistill.recipe.foreign import answer_to
from dedistill.recipe.resolve import resolve
from dedistill.recipe.rules import contradictions
from dedistill.recipe.schema import Recipe
from dedistill.recipe.shipped import near_shipped, shipped_file
from dedistill.recipe.toml import MAX_BYTES, check_size, dotted, fields_of, json_schema, locate, table_in, to_toml

__all__ = ["RESOLVED", "RecipeError", "json_schema", "load_recipe", "to_toml"]

RESOLVED = "recipe.resolved.toml"
"""In a run whose recipe.toml is the user's own: the recipe with all that it extends."""

# Whole words only: text_length is no text token.
_SECRET = re.compile(r"(?<![a-z0-9])(api[_-]?key|token|password|secret)(?![a-z0-9])", re.IGNORECASE)

_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|sk-(?:proj-)?\w{20,}|AKIA[0-9A-Z]{16})\b"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
"""What services call their tokens, and a name with its password in a URL."""


class RecipeError(UserError):
    """Everything that is wrong with a recipe; ``errors`` holds one line for each mistake, in the order of the file."""

    def __init__(self, errors: list[str]):
        super().__init__("\n".join(errors), exit_code=2)
        self.errors = errors


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and overrides like ``train.lr=1e-4``; an override replaces the whole value.

    path: a file, or ``dedistill:NAME``. Defaults that depend on other keys or on the family are values in what is returned
    (``recipe.resolve``). Raises RecipeError with all mistakes at once.
    """
    draft, files = _read_chain(str(path))
    for i, text in enumerate(overrides):
        _override(draft, text, KeySource(OVERRIDES + i, "--set"))
    _drop_other_revision(draft)
    for key in dict.fromkeys(
        [*filter(lambda key: _SECRET.search(key.rpartition(".")[2]), draft.places), *_holding_tokens(draft.data)]
    ):
        draft.blame(key, "looks like a secret, and recipes are copied and shared; set an environment variable instead")
    dropped = _check_keys(draft, Recipe, draft.data, ())
    recipe = _check_values(draft)
    if recipe and not dropped:
        while any(draft.drop_idle(clash) for clash in contradictions(recipe)):
            recipe = Recipe.model_validate(draft.data, strict=True)
        for clash in contradictions(recipe):
            draft.blame_clash(clash)
    if draft.errors or recipe is None:
        lines = [line for _, line in sorted(draft.errors, key=lambda found: found[0])]
        raise RecipeError([_TOKEN.sub("***", line) for line in lines])
    recipe._places.update(draft.places)
    recipe._files, recipe._notes = tuple(file.absolute() for file in files), tuple(draft.notes)
    return _of_fold(resolve(recipe))


def fold_ending(fold: Sequence[int]) -> str:
    return "-fold{}of{}".format(*fold)


def _of_fold(recipe: Recipe) -> Recipe:
    """The run of a fold has a folder and a name of its own, so that all of one recipe stand side by side."""
    if recipe.data.fold:
        ending = fold_ending(recipe.data.fold)
        own = {key: getattr(recipe.run, key).removesuffix(ending) + ending for key in ("out", "name")}
        return recipe.model_copy(update={"run": recipe.run.model_copy(update=own)})
    return recipe


# --- files -----------------------------------------------------------------------------------------------------------


def _read_chain(name: str) -> tuple[Draft, list[Path]]:
    """The recipe called ``name`` laid over the one it extends, and so on; and the files of all."""
    path, file = _find(name, Path(), "")
    draft, via = Draft(file), ""
    layers: list[tuple[dict[str, Any], dict[str, KeySource]]] = []
    seen: list[tuple[Path, str]] = []
    while True:
        data, places = _read(path, file, len(layers), via)
        if path.resolve() in [p.resolve() for p, _ in seen]:
            circle = " -> ".join(called for _, called in [*seen, (path, file)])
            raise RecipeError([f"{via}leads round in a circle: {circle}"])
        layers.append((data, places))
        seen.append((path, file))
        if "extends" not in data:
            break
        base, place = data.pop("extends"), places.pop("extends")
        if not isinstance(base, str):
            raise RecipeError([f"{place}: extends: expects a string, the path of another recipe, got {shown(base)}"])
        via = f"{place}: extends: "
        path, file = _find(base, path.parent, via)
    own = layers[0][0]
    for data, places in reversed(layers):
        draft.lay(data, places)
    if len(layers) > 1:
        _take_own_places(draft, own, seen[0][0])
    return draft, [p for p, _ in seen]


def _find(name: str, folder: Path, via: str) -> tuple[Path, str]:
    """The file that ``name`` means in a recipe that lies in ``folder``, and what errors call it."""
    try:
        packaged = shipped_file(name)
    except LookupError as exc:
        raise RecipeError([f"{via}{name}: {exc.args[0]}"]) from None
    if packaged:
        return packaged, name.removesuffix(".toml")
    try:
        path = folder / with_home(name)
    except ValueError as exc:
        raise RecipeError([f"{via}{exc}, got {quote(name)}"]) from None
    return path, os.path.normpath(path)


def _take_own_places(draft: Draft, own: dict[str, Any], file: Path) -> None:
    """A recipe that extends another and names no folder writes where its own name says, never into the other's folders."""
    run, data = draft.data.get("run"), draft.data.get("data")
    if "out" in _table(own, "run") or not isinstance(run, dict):
        return
    name = re.sub(r"[^A-Za-z0-9._ -]", "-", file.stem).lstrip("._ -")[:100] or "run"
    places = {"run.out": f"runs/{file.stem}"}
    if "name" not in _table(own, "run"):
        places["run.name"] = name
    # one that trains on something else now encodes nothing: the inherited key is dropped as others without effect are
    if isinstance(data, dict) and data.get("source") == "pictures" and "cache" in data and "cache" not in _table(own, "data"):
        places["data.cache"] = f"cache/{file.stem}"
    for key, value in places.items():
        table, _, last = key.partition(".")
        draft.data[table][last] = value
        draft.places[key] = KeySource(0, draft.file)


def _drop_other_revision(draft: Draft) -> None:
    """The commit of one model says nothing of another: it goes where only ``model.path`` was replaced."""
    path, revision = (draft.places.get(f"model.{key}") for key in ("path", "revision"))
    if path and revision and path.weight > revision.weight:
        del draft.data["model"]["revision"]
        draft.forget("model.revision")


def _table(data: dict[str, Any], name: str) -> dict[str, Any]:
    return data[name] if isinstance(data.get(name), dict) else {}


WINDOWS = "; a path of Windows is written with / in place of \\, or in single quotes"
MAX_KEYS = 5000


def _read(path: Path, file: str, order: int, via: str) -> tuple[dict[str, Any], dict[str, KeySource]]:
    """Data of one file, called ``file`` in errors, and where it stands; ``via`` opens the message when another named it."""
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise ValueError("not a regular file")  # to read a pipe or a device might never end
        if path.is_file() and (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size:,} bytes, more than a recipe has ({MAX_BYTES:,})")
        text = path.read_bytes().decode("utf-8-sig")
        check_size(text)
    except UnicodeDecodeError as exc:
        raise RecipeError([f"{via}{file}: not a text file in UTF-8 (byte {exc.start})"]) from None
    except (OSError, ValueError) as exc:
        reasons: dict[type[Exception], str] = {
            FileNotFoundError: f"no such file{near_shipped(path)}",
            IsADirectoryError: "a folder, not a recipe",
        }
        reason = reasons.get(type(exc), getattr(exc, "strerror", None) or str(exc))
        raise RecipeError([f"{via}{file}: {reason}"]) from None
    try:
        data = tomllib.loads(text)
        places = {key: KeySource(order, file, line) for key, line in locate(text).items()}
        if len(places) > MAX_KEYS:
            raise RecipeError([f"{file}: {len(places):,} keys, more than a recipe has ({MAX_KEYS:,})"])
    except RecursionError:
        raise RecipeError([f"{file}: nested too deeply"]) from None
    except ValueError as exc:
        what, _, where = str(exc).partition(" (at ")
        line = re.match(r"line (\d+)", where)
        at = line[1] if line else text.count("\n") + 1
        hint = WINDOWS if "\\" in text.split("\n")[int(at) - 1] else ""
        raise RecipeError([f"{file}:{at}: not valid TOML: {what[:1].lower()}{what[1:]}{hint}"]) from None
    for name, value in data.items():
        # Read on, and every key of the file that was to be extended would seem to be missing.
        if isinstance(value, str) and name != "extends" and get_close_matches(name, ["extends"], cutoff=0.8):
            raise RecipeError([f"{places[name]}: {name}: unknown key, did you mean 'extends'?"])
    return data, places


# --- overrides -------------------------------------------------------------------------------------------------------


def _holding_tokens(value: object, key: str = "") -> Iterator[str]:
    """Keys of texts in plain data in which a secret stands, whatever they are called."""
    if isinstance(value, str) and _TOKEN.search(value):
        yield key
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from _holding_tokens(part, f"{key}.{name}" if key else str(name))


def _override(draft: Draft, text: str, place: KeySource) -> None:
    """Set one ``table.key=value``; the value is TOML, or else a plain string."""
    name, equals, source = text.partition("=")
    parts = tuple(part.strip() for part in name.split("."))
    if not equals or not all(parts):
        draft.errors.append((place, f"--set: {quote(text)}: expects table.key=value"))
        return
    key = dotted(parts)
    if parts[0] == "extends":
        draft.errors.append((place, f"--set: {key}: can only be said in a file"))
        return
    try:
        table, last = _descend(draft.data, parts)
    except LookupError as exc:
        draft.errors.append((place, f"--set: {key}: {exc.args[0]}"))
        return
    value, inside = _parse(source)
    table[last] = value
    draft.forget(key)
    for n in range(1, len(parts)):
        draft.places.setdefault(dotted(parts[:n]), place)
    draft.places |= {key + path: place for path in inside}


def _parse(source: str) -> tuple[Any, list[str]]:
    """A value and the paths inside it, each with a leading dot; the value itself is ``""``."""
    text = f"v = {source}"
    try:
        data = tomllib.loads(text)
        if list(data) == ["v"]:
            return data["v"], [path[1:] for path in locate(text)]
    except (ValueError, RecursionError):
        pass
    return source, [""]


def _descend(data: dict[str, Any], parts: tuple[str, ...]) -> tuple[Any, Any]:
    """The table or array that holds the last part, and that part as its index; LookupError says what is in the way."""
    here: Any = data
    for n, part in enumerate(parts):
        so_far, last = dotted(parts[:n]), n == len(parts) - 1
        if isinstance(here, list):
            if not re.fullmatch(r"[0-9]{1,9}", part) or int(part) >= len(here):
                raise LookupError(f"'{so_far}' has {amount(len(here), 'entry', 'entries')}, numbered from 0")
            index: Any = int(part)
        elif isinstance(here, dict):
            index = part
            if not last and part not in here:
                if parts[n + 1].isdecimal():
                    raise LookupError(f"'{dotted(parts[: n + 1])}' is not set, so it has no entry {parts[n + 1]}")
                here[part] = {}
        else:
            raise LookupError(f"'{so_far}' is {shown(here)}, not a table")
        if last:
            return here, index
        here = here[index]
    raise AssertionError("a key has at least one part")


# --- keys ------------------------------------------------------------------------------------------------------------


def _check_keys(draft: Draft, model: type[Table], table: dict[str, Any], path: tuple[str | int, ...]) -> bool:
    """Report unknown keys; True if one had to be dropped.

    A misspelt key goes on under the name that was meant: so its value is checked too, and is not called missing.
    """
    dropped = False
    known = fields_of(model)
    for name in [name for name in table if name not in known]:
        value, key = table.pop(name), dotted((*path, name))
        dropped |= not _SECRET.search(name) and not _report_unknown(draft, table, path, name, value, known)
        draft.forget(key)
    for name, field in known.items():
        inner = table_in(field.annotation)
        if field.annotation is inner and field.is_required():
            table.setdefault(name, {})  # its own required keys are then reported one by one
        rows = table.get(name)
        for at, row in enumerate(rows) if isinstance(rows, list) else [(None, rows)]:
            if inner and isinstance(row, dict):
                dropped |= _check_keys(draft, inner, row, (*path, name) if at is None else (*path, name, at))
    return dropped


def _report_unknown(
    draft: Draft, table: dict[str, Any], path: tuple[str | int, ...], name: str, value: object, known: dict[str, FieldInfo]
) -> bool:
    """Report one unknown key and put its value where it seems to belong; False if that is unclear."""
    key, kind = dotted((*path, name)), "table" if isinstance(value, dict) else "key"
    if not get_close_matches(name, known, cutoff=0.9) and (answer := answer_to(name)):
        draft.blame(key, f"unknown {kind}; {answer}")
        return False
    elsewhere = [dotted(p) for p in _all_keys() if p[-1] == name]
    cutoff = 0.8 if elsewhere else 0.6 if len(name) > 3 else 0.5  # one slip of the pen in "lr" leaves half of it
    near = get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=cutoff)
    if not near + elsewhere:
        draft.blame(key, f"unknown {kind}, known here: {', '.join(known)}")
        return False
    guesses = any_of([f"'{k}'" for k in near + elsewhere])
    draft.blame(key, f"unknown {kind}, did you mean {guesses}?")
    if not near or elsewhere or near[0] in table:
        return False
    table[near[0]] = value
    draft.rename(key, dotted((*path, near[0])))
    return True


@cache
def _all_keys() -> list[tuple[str, ...]]:
    def walk(model: type[Table], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, field in fields_of(model).items():
            yield (*path, name)
            if inner := table_in(field.annotation):
                yield from walk(inner, (*path, name))

    return list(walk(Recipe, ()))


# --- values ------------------------------------------------------------------------------------------------------------


def _check_values(draft: Draft) -> Recipe | None:
    """The recipe, or None with every bad or missing value reported, one line for each key."""
    try:
        return Recipe.model_validate(draft.data, strict=True)
    except ValidationError as exc:
        found: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
        for error in exc.errors(include_url=False):
            found.setdefault(_path(draft.data, error), []).append(error)
        for path, errors in found.items():
            draft.blame(dotted(path), explain(errors, dotted(path)))
        return None


def _path(data: dict[str, Any], error: ErrorDetails) -> tuple[str | int, ...]:
    """Where in ``data`` an error of pydantic is; what it adds for the alternatives of a field is cut off."""
    path: tuple[str | int, ...] = ()
    at: Any = data
    for part in error["loc"]:
        if error["type"] != "missing":
            try:
                at = at[part]
            except (LookupError, TypeError):
                break
        path += (part,)
    return path
