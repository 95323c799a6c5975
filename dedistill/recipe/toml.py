"""Recipes as TOML: where each key of a file stands, and a recipe as text or as a JSON schema."""

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from dedistill.recipe.fields import BY_FAMILY, Default, Table
from dedistill.recipe.schema import Recipe

MAX_BYTES = 1 << 20
_DEEP = re.compile(r"^[^#=\n]*(?:\.[^#=.\n]*){32}[\]=]", re.MULTILINE)
"""A key or table of more than 32 parts: a reader of TOML takes time and memory by the square of them."""


def check_size(text: str) -> None:
    """Raises ValueError, which does not name the file, for a text that is no recipe and might take long to read."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text):,} characters, more than a recipe has ({MAX_BYTES:,})")
    if deep := _DEEP.search(text):
        raise ValueError(f"line {text.count(chr(10), 0, deep.start()) + 1}: a key of more than 32 parts")


# --- line numbers of the keys of a TOML document ---------------------------------------------------------------------


_BARE = re.compile(r"[A-Za-z0-9_-]+")
# Strings of several lines first, else their opening quotes would read as an empty string; a comment is a token too, so
# that what it says is never read as keys.
_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?""""{0,2}|' + r"'''.*?''''{0,2}|" + r'"(?:\\.|[^"\\])*"|' + r"'[^']*'|#[^\n]*|[\[\]{}=,.\n]|"
    r"""[^\s\[\]{}=,."'#]+""",
    re.DOTALL,
)


def dotted(parts: tuple[str | int, ...]) -> str:
    """``("adapter", "targets", 0)`` -> ``adapter.targets.0``; parts that TOML would quote are quoted."""
    return ".".join(p if _BARE.fullmatch(p) else json.dumps(p, ensure_ascii=False) for p in map(str, parts))


def locate(text: str) -> dict[str, int]:
    """Line, counted from 1, of every table, key and array entry of ``text``, which tomllib must have accepted."""
    scan = _Scan(text)
    table: tuple[str, ...] = ()
    while scan.tokens:
        if scan.peek() == "\n":
            scan.take()
        elif scan.peek() == "[":
            table = scan.header()
        else:
            scan.pair(table)
    return scan.places


class _Scan:
    """Reads tokens from the left. It trusts the text, and at its end every loop stops."""

    def __init__(self, text: str):
        self.tokens: list[tuple[str, int]] = []
        self.places: dict[str, int] = {}
        self.rows: dict[tuple[str, ...], int] = {}  # tables seen so far of each [[array]]
        line = 1
        for match in _TOKEN.finditer(text):
            if not match[0].startswith("#"):
                self.tokens.append((match[0], line))
            line += match[0].count("\n")
        self.tokens.reverse()  # pop() from the end is cheap

    def peek(self) -> str:
        return self.tokens[-1][0] if self.tokens else ""

    def take(self) -> str:
        return self.tokens.pop()[0]

    def key(self, end: str) -> tuple[str, ...]:
        """The parts of a key up to and with ``end``."""
        parts = []
        while (token := self.take()) != end:
            if token != ".":
                parts.append(tomllib.loads(f"key = {token}")["key"] if token[0] in "\"'" else token)
        return tuple(parts)

    def header(self) -> tuple[str, ...]:
        """Read ``[table]`` or ``[[array of tables]]``; the path of the keys that follow, indices and all."""
        line = self.tokens[-1][1]
        self.take()
        many = self.peek() == "["
        if many:
            self.take()
        parts = self.key("]")
        if many:
            self.take()
            array = self.path(parts[:-1], line) + parts[-1:]
            self.rows[array] = self.rows.get(array, 0) + 1
        path = self.path(parts, line)
        self.places[dotted(path)] = line  # the header itself counts, not an earlier key that implied the table
        return path

    def path(self, parts: tuple[str, ...], line: int) -> tuple[str, ...]:
        """``parts`` with the number of the newest table after each array of tables; all tables on the way are noted."""
        path: tuple[str, ...] = ()
        for part in parts:
            path += (part,)
            self.places.setdefault(dotted(path), line)
            if path in self.rows:
                path += (str(self.rows[path] - 1),)
                self.places.setdefault(dotted(path), line)
        return path

    def pair(self, table: tuple[str, ...]) -> None:
        """Read ``key = value``."""
        line = self.tokens[-1][1]
        parts = self.key("=")
        for n in range(len(parts)):
            self.places.setdefault(dotted(table + parts[: n + 1]), line)
        self.value(table + parts)

    def value(self, path: tuple[str, ...]) -> None:
        """Read past a value and note what stands inside it."""
        first, index = self.take(), 0
        if first not in ("[", "{"):
            while self.peek() not in (",", "]", "}", "\n", ""):
                self.take()
            return
        while (token := self.peek()) not in ("]", "}", ""):
            if token in ("\n", ","):
                self.take()
            elif first == "{":
                self.pair(path)
            else:
                inner = (*path, str(index))
                self.places[dotted(inner)] = self.tokens[-1][1]
                self.value(inner)
                index += 1
        if self.tokens:
            self.take()


# --- from the models back to text ------------------------------------------------------------------------------------


def fields_of(model: type[Table]) -> dict[str, FieldInfo]:
    """Keys of a table as TOML spells them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def table_in(annotation: object) -> type[Table] | None:
    """The model of a field that is a table or an array of tables."""
    if isinstance(annotation, type) and issubclass(annotation, Table):
        return annotation
    return next((model for arg in get_args(annotation) if (model := table_in(arg))), None)


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML; ``load_recipe`` reads it back to an equal recipe."""
    return table_to_toml(recipe.resolved())


def table_to_toml(table: dict[str, Any]) -> str:
    """Plain data as TOML; None, which TOML cannot say, is left out."""
    return "\n".join(_emit(table, ())).lstrip("\n") + "\n"


def _emit(table: dict[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Lines of one table: its own keys first, since what follows a header belongs to that header."""
    inner = {k: v for k, v in table.items() if isinstance(v, dict) or (v and isinstance(v, list) and isinstance(v[0], dict))}
    for name, value in table.items():
        if name not in inner and value is not None:
            yield f"{dotted((name,))} = {_literal(value)}"
    for name, value in inner.items():
        key = dotted((*path, name))
        for row in [value] if isinstance(value, dict) else value:
            lines = list(_emit(row, (*path, name)))
            if isinstance(value, list) or lines[:1] != [""]:  # a table of tables alone needs no header
                yield from ("", f"[{key}]" if isinstance(value, dict) else f"[[{key}]]")
            yield from lines


def _literal(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for completion and checks in an editor.

    A file that extends another need not set what is required; so that is asked only of files that extend nothing.
    """
    raw = Recipe.model_json_schema()
    for table in _tables(Recipe):
        _tell_defaults(table, raw["$defs"][table.__name__]["properties"])
    schema = _tidy(raw)
    extends = {
        "type": "string",
        "description": "Recipe that this one changes: a path from this file, or dedistill:NAME.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dedistill recipe",
        **schema,
        "properties": {"extends": extends, **schema["properties"]},
        "if": {"not": {"required": ["extends"]}},
        "then": _required(Recipe),
    }


def _tables(model: type[Table]) -> Iterator[type[Table]]:
    for field in fields_of(model).values():
        if inner := table_in(field.annotation):
            yield inner
            yield from _tables(inner)


def _tell_defaults(table: type[Table], properties: dict[str, Any]) -> None:
    """Defaults that depend on other keys, in the descriptions, and as values where there is one only."""
    for name, field in fields_of(table).items():
        if defaults := [default for default in field.metadata if isinstance(default, Default)]:
            node = properties[name]
            node["description"] += f" Default {', '.join(map(str, defaults))}."
            if len(defaults) == 1 and defaults[0].value != BY_FAMILY:
                node["default"] = defaults[0].value


def _tidy(node: dict[str, Any]) -> dict[str, Any]:
    """Without null, which TOML cannot say, titles that repeat the key, defaults of whole tables, and ``required``."""
    # by type: a recipe key may have the same name
    noise: dict[str, tuple[type, ...]] = {"title": (str,), "default": (type(None), dict), "required": (list,)}
    node = {k: _tidy_value(v) for k, v in node.items() if not (k in noise and isinstance(v, noise[k]))}
    return {**node.pop("anyOf")[0], **node} if len(node.get("anyOf", [])) == 1 else node


def _tidy_value(value: object) -> object:
    if isinstance(value, list):
        return [_tidy_value(item) for item in value if item != {"type": "null"}]
    return _tidy(value) if isinstance(value, dict) else value


def _required(model: type[Table]) -> dict[str, Any]:
    fields = fields_of(model)
    needs: dict[str, Any] = {"required": [name for name, field in fields.items() if field.is_required()]}
    inner = {name: _required(sub) for name, field in fields.items() if (sub := table_in(field.annotation))}
    inner = {name: need for name, need in inner.items() if need}
    return {key: value for key, value in {**needs, "properties": inner}.items() if value}
