"""JSON files that someone else may have written, read in one way: what was expected, or an error that names the file."""

import json
from pathlib import Path
from typing import Any, TypeVar

from dedistill.errors import UserError

LARGEST = 2**28
"""Bytes. An index of a model of a thousand shards has some 1e7."""
_NAMES = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
_NAMES |= {type(None): "null"}
Kind = TypeVar("Kind", dict[str, Any], list[Any])


def read_object(path: Path, where: str = "", otherwise: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for anything else. where, otherwise: how its message starts and ends."""
    return _read(path, dict, where, otherwise)


def read_array(path: Path, where: str = "", otherwise: str = "") -> list[Any]:
    """The array in a JSON file, as :func:`read_object`."""
    return _read(path, list, where, otherwise)


def parse_object(text: str, what: str) -> dict[str, Any]:
    """The object in JSON that stands in a file of another kind, as in a header of safetensors. what: how messages call it.

    Raises UserError for anything else.
    """
    try:
        return _parsed(text, dict)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{what} cannot be read as JSON: {_reason(e)}") from e


def _read(path: Path, kind: type[Kind], where: str, otherwise: str) -> Kind:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MiB")
        return _parsed(path.read_bytes(), kind)
    except (OSError, ValueError, RecursionError) as e:
        start, end = where and f"{where}: ", otherwise and f"; {otherwise}"
        raise UserError(f"{start}'{path}' cannot be read as JSON: {_reason(e)}{end}") from e


def _parsed(text: str | bytes, kind: type[Kind]) -> Kind:
    found = json.loads(text)
    if not isinstance(found, kind):
        raise ValueError(f"{_NAMES[kind]} was expected, not {_NAMES.get(type(found), type(found).__name__)}")
    return found


def _reason(error: Exception) -> object:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return error.strerror if isinstance(error, OSError) else error
