"""From a TOML file to a ``Recipe``: every mistake is reported at once, each with file, line, key and the nearest valid key."""

import json
import os.path
import re
import tomllib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dedistill.errors import UserError
from dedistill.recipe.locate import dotted, locate
from dedistill.recipe.schema import Recipe, Table, contradictions

# Whole words only: text_length is no text token.
_SECRET = re.compile(r"(?<![a-z0-9])(api[_-]?key|token|password|secret)(?![a-z0-9])", re.IGNORECASE)


class RecipeError(UserError):
    """Everything that is wrong with a recipe; ``errors`` holds one line for each mistake, in the order of the file."""

    def __init__(self, errors: list[str]):
        super().__init__("\n".join(errors), exit_code=2)
        self.errors = errors


class _Place(NamedTuple):
    """Where a key was set. Sorts in the order of reading: the file itself, what it extends, then ``--set``."""

    order: int
    file: str
    line: int = 0  # 0: the file as a whole, or --set

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


class _Draft:
    """Plain data on its way to a Recipe, with the place of every key and the mistakes found so far."""

    def __init__(self, file: str):
        self.file = file
        self.data: dict[str, Any] = {}
        self.places: dict[str, _Place] = {}
        self.errors: list[tuple[_Place, str]] = []

    def blame(self, key: str, message: str) -> None:
        """Note a mistake at the line of ``key``, or of the table it belongs to, or at the file."""
        at = key
        while at and at not in self.places:
            at = at.rpartition(".")[0]
        place = self.places.get(at, _Place(0, self.file))
        self.errors.append((place, f"{place}: {key}: {message}"))

    def below(self, key: str) -> list[str]:
        """``key`` and all located keys inside it."""
        return [k for k in self.places if k == key or k.startswith(key + ".")]

    def lay(self, data: dict[str, Any], places: dict[str, _Place]) -> None:
        """Put ``data`` over what is there: tables merge, everything else is replaced whole."""
        self._lay(self.data, data, ())
        self.places |= places

    def _lay(self, under: dict[str, Any], over: dict[str, Any], path: tuple[str, ...]) -> None:
        for name, value in over.items():
            if isinstance(value, dict) and isinstance(under.get(name), dict):
                self._lay(under[name], value, (*path, name))
            else:
                self.forget(dotted((*path, name)))
                under[name] = value

    def forget(self, key: str) -> None:
        for old in self.below(key):
            del self.places[old]

    def rename(self, old: str, new: str) -> None:
        for key in self.below(old):
            self.places[new + key[len(old) :]] = self.places[key]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and overrides like ``train.lr=1e-4``; an override replaces the whole value.

    Raises RecipeError with all mistakes at once.
    """
    draft = _read_chain(Path(path))
    for i, text in enumerate(overrides):
        _override(draft, text, _Place(1000 + i, "--set"))
    for key in draft.places:
        if _SECRET.search(key.rpartition(".")[2]):
            draft.blame(key, "looks like a secret, and recipes are copied and shared; set an environment variable instead")
    dropped = _check_keys(draft, Recipe, draft.data, ())
    recipe = _check_values(draft)
    if recipe and not dropped:
        for key, message in contradictions(recipe):
            draft.blame(key, message)
    if draft.errors or recipe is None:
        raise RecipeError([line for _, line in sorted(draft.errors, key=lambda found: found[0])])
    recipe._places.update({key: str(place) for key, place in draft.places.items()})
    return recipe


# --- files -----------------------------------------------------------------------------------------------------------


def _read_chain(path: Path) -> _Draft:
    """The file at ``path`` laid over the one it extends, and so on."""
    draft, layers, seen, via = _Draft(os.path.normpath(path)), [], [], ""
    while True:
        data, places = _read(path, len(layers), via)
        layers.append((data, places))
        seen.append(path)
        if "extends" not in data:
            break
        base, place = data.pop("extends"), places.pop("extends")
        if not isinstance(base, str):
            raise RecipeError([f"{place}: extends: expects a string, the path of another recipe, got {_shown(base)}"])
        path, via = path.parent / base, f"{place}: extends: "
        if path.resolve() in [p.resolve() for p in seen]:
            raise RecipeError([f"{via}leads round in a circle: {' -> '.join(os.path.normpath(p) for p in [*seen, path])}"])
    for data, places in reversed(layers):
        draft.lay(data, places)
    return draft


def _read(path: Path, order: int, via: str) -> tuple[dict[str, Any], dict[str, _Place]]:
    """Data of one file and where it stands; ``via`` opens the message when the file was named by another."""
    file = os.path.normpath(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise RecipeError([f"{via}{file}: not a text file in UTF-8 (byte {exc.start})"]) from None
    except (OSError, ValueError) as exc:
        reasons = {FileNotFoundError: "no such file", IsADirectoryError: "a folder, not a recipe"}
        reason = reasons.get(type(exc), getattr(exc, "strerror", None) or str(exc))
        raise RecipeError([f"{via}{file}: {reason}"]) from None
    try:
        data = tomllib.loads(text)
        places = {key: _Place(order, file, line) for key, line in locate(text).items()}
    except RecursionError:
        raise RecipeError([f"{file}: nested too deeply"]) from None
    except ValueError as exc:
        what, _, where = str(exc).partition(" (at ")
        line = re.match(r"line (\d+)", where)
        at = line[1] if line else text.count("\n") + 1
        raise RecipeError([f"{file}:{at}: not valid TOML: {what[:1].lower()}{what[1:]}"]) from None
    for name, value in data.items():
        # Read on, and every key of the file that was to be extended would seem to be missing.
        if isinstance(value, str) and name != "extends" and get_close_matches(name, ["extends"], cutoff=0.8):
            raise RecipeError([f"{places[name]}: {name}: unknown key, did you mean 'extends'?"])
    return data, places


# --- overrides -------------------------------------------------------------------------------------------------------


def _override(draft: _Draft, text: str, place: _Place) -> None:
    """Set one ``table.key=value``; the value is TOML, or else a plain string."""
    name, equals, source = text.partition("=")
    parts = tuple(part.strip() for part in name.split("."))
    if not equals or not all(parts):
        draft.errors.append((place, f"--set: {_quote(text)}: expects table.key=value"))
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
                raise LookupError(f"'{so_far}' has {_entries(len(here))}, numbered from 0")
            index: Any = int(part)
        elif isinstance(here, dict):
            index = part
            if not last and part not in here:
                if parts[n + 1].isdecimal():
                    raise LookupError(f"'{dotted(parts[: n + 1])}' is not set, so it has no entry {parts[n + 1]}")
                here[part] = {}
        else:
            raise LookupError(f"'{so_far}' is {_shown(here)}, not a table")
        if last:
            return here, index
        here = here[index]
    raise AssertionError("a key has at least one part")


# --- keys ------------------------------------------------------------------------------------------------------------


def _check_keys(draft: _Draft, model: type[Table], table: dict[str, Any], path: tuple[str | int, ...]) -> bool:
    """Report unknown keys; True if one had to be dropped.

    A misspelt key goes on under the name that was meant: so its value is checked too, and is not called missing.
    """
    dropped = False
    known = _fields(model)
    for name in [name for name in table if name not in known]:
        value, key = table.pop(name), dotted((*path, name))
        dropped |= not _SECRET.search(name) and not _report_unknown(draft, table, path, name, value, known)
        draft.forget(key)
    for name, field in known.items():
        inner = _model_in(field.annotation)
        if field.annotation is inner and field.is_required():
            table.setdefault(name, {})  # its own required keys are then reported one by one
        rows = table.get(name)
        for at, row in enumerate(rows) if isinstance(rows, list) else [(None, rows)]:
            if inner and isinstance(row, dict):
                dropped |= _check_keys(draft, inner, row, (*path, name) if at is None else (*path, name, at))
    return dropped


def _report_unknown(
    draft: _Draft, table: dict[str, Any], path: tuple[str | int, ...], name: str, value: Any, known: dict[str, FieldInfo]
) -> bool:
    """Report one unknown key and put its value where it seems to belong; False if that is unclear."""
    key, kind = dotted((*path, name)), "table" if isinstance(value, dict) else "key"
    elsewhere = [dotted(p) for p in _all_keys() if p[-1] == name]
    cutoff = 0.8 if elsewhere else 0.6 if len(name) > 3 else 0.5  # one slip of the pen in "lr" leaves half of it
    near = get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=cutoff)
    if not near + elsewhere:
        draft.blame(key, f"unknown {kind}, known here: {', '.join(known)}")
        return False
    guesses = _any_of([f"'{k}'" for k in near + elsewhere])
    draft.blame(key, f"unknown {kind}, did you mean {guesses}?")
    if not near or elsewhere or near[0] in table:
        return False
    table[near[0]] = value
    draft.rename(key, dotted((*path, near[0])))
    return True


def _fields(model: type[Table]) -> dict[str, FieldInfo]:
    """Keys of a table as TOML spells them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _model_in(annotation: Any) -> type[Table] | None:
    """The model of a field that is a table or an array of tables."""
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    return next((model for arg in get_args(annotation) if (model := _model_in(arg))), None)


@cache
def _all_keys() -> list[tuple[str, ...]]:
    def walk(model: type[Table], path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for name, field in _fields(model).items():
            yield (*path, name)
            if inner := _model_in(field.annotation):
                yield from walk(inner, (*path, name))

    return list(walk(Recipe, ()))


# --- values ----------------------------------------------------------------------------------------------------------

_KINDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "an array",
    "model_type": "a table",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def _check_values(draft: _Draft) -> Recipe | None:
    """The recipe, or None with every bad or missing value reported, one line for each key."""
    try:
        return Recipe.model_validate(draft.data, strict=True)
    except ValidationError as exc:
        found: dict[tuple[str | int, ...], list[Any]] = {}
        for error in exc.errors(include_url=False):
            found.setdefault(_path(draft.data, error), []).append(error)
        for path, errors in found.items():
            draft.blame(dotted(path), _explain(errors, dotted(path)))
        return None


def _path(data: Any, error: Any) -> tuple[str | int, ...]:
    """Where in ``data`` an error of pydantic is; what it adds for the alternatives of a field is cut off."""
    path: tuple[str | int, ...] = ()
    for part in error["loc"]:
        if error["type"] != "missing":
            try:
                data = data[part]
            except (LookupError, TypeError):
                break
        path += (part,)
    return path


def _explain(errors: list[Any], key: str) -> str:
    """One readable line from the errors of one key; there are several where a field has alternatives."""
    if errors[0]["type"] == "missing":
        return "required, not set"
    value, words = errors[0]["input"], []
    for error in errors:
        if error["type"] == "literal_error":
            words += re.findall(r"'([^']*)'", error["ctx"]["expected"])
    quoted = [f"'{word}'" for word in words]
    near = get_close_matches(value, words, n=1) if isinstance(value, str) else []
    hint = f"; did you mean '{near[0]}'?" if near else ""
    for error in errors:
        if error["type"] != "literal_error" and error["type"] not in _KINDS:
            return f"must be {_any_of([_limit(error), *quoted])}, got {_bare(value)}"
    kinds = [_KINDS[error["type"]] for error in errors if error["type"] in _KINDS]
    if isinstance(value, str) and not kinds:
        return f"{_quote(value)} is not one of {', '.join(quoted)}{hint}"
    if isinstance(value, dict) and kinds == ["an array"]:
        hint = f"; an array of tables is written [[{key}]]"
    if isinstance(value, list) and kinds == ["a table"]:
        hint = f"; a single table is written [{key}]"
    return f"expects {_any_of(kinds + quoted)}, got {_shown(value)}{hint}"


def _limit(error: Any) -> str:
    """What a value must be whose kind is right."""
    kind, ctx = error["type"], error.get("ctx", {})
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        return f"{words} {ctx[name]:.15g}"
    if kind == "too_short":
        return f"of at least {_entries(ctx['min_length'])}"
    if kind == "too_long":
        return f"of at most {_entries(ctx['max_length'])}"
    known = {"finite_number": "a finite number", "string_too_short": "a text that is not empty", "string_unicode": "valid text"}
    return known.get(kind, "a value in range")


def _bare(value: Any) -> str:
    return _entries(len(value)) if isinstance(value, list) else _quote(value) if isinstance(value, str) else _number(value)


def _number(value: Any) -> str:
    return str(value) if isinstance(value, float) or abs(value) < 10**20 else "a larger one"


def _shown(value: Any) -> str:
    """A value from TOML with its kind, short enough for one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)):
        return "an array" if isinstance(value, list) else "a table"
    if isinstance(value, (int, float)):
        return f"{'the integer' if isinstance(value, int) else 'the number'} {_number(value)}"
    return f"the string {_quote(value)}" if isinstance(value, str) else f"the date or time {value}"


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _any_of(options: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))


# --- the other way ---------------------------------------------------------------------------------------------------


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, every default filled in; ``load_recipe`` reads it back to an equal recipe."""
    return "\n".join(_emit(recipe.resolved(), ())).lstrip("\n") + "\n"


def _emit(table: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Lines of one table: its own keys first, since what follows a header belongs to that header."""
    inner = {k: v for k, v in table.items() if isinstance(v, dict) or (v and isinstance(v, list) and isinstance(v[0], dict))}
    for name, value in table.items():
        if name not in inner and value is not None:
            yield f"{dotted((name,))} = {_literal(value)}"
    for name, value in inner.items():
        key = dotted((*path, name))
        for row in [value] if isinstance(value, dict) else value:
            yield from ("", f"[{key}]" if isinstance(value, dict) else f"[[{key}]]")
            yield from _emit(row, (*path, name))


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for completion and checks in an editor.

    A file that extends another need not set what is required; so that is asked only of files that extend nothing.
    """
    schema = _tidy(Recipe.model_json_schema())
    extends = {"type": "string", "description": "Recipe that this one changes, relative to this file."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dedistill recipe",
        **schema,
        "properties": {"extends": extends, **schema["properties"]},
        "if": {"not": {"required": ["extends"]}},
        "then": _required(Recipe),
    }


def _tidy(node: Any) -> Any:
    """Without null, which TOML cannot say, without titles that repeat the key, and without ``required``."""
    if isinstance(node, list):
        return [_tidy(item) for item in node if item != {"type": "null"}]
    if not isinstance(node, dict):
        return node
    noise = {"title": str, "default": type(None), "required": list}  # by type: a recipe key may have the same name
    node = {k: _tidy(v) for k, v in node.items() if not (k in noise and isinstance(v, noise[k]))}
    return {**node.pop("anyOf")[0], **node} if len(node.get("anyOf", [])) == 1 else node


def _required(model: type[Table]) -> dict[str, Any]:
    fields = _fields(model)
    needs: dict[str, Any] = {"required": [name for name, field in fields.items() if field.is_required()]}
    inner = {name: _required(sub) for name, field in fields.items() if (sub := _model_in(field.annotation))}
    inner = {name: need for name, need in inner.items() if need}
    return {key: value for key, value in {**needs, "properties": inner}.items() if value}
