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


def read_table(path: Path, where: str = "", otherwise: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises UserError for anything else. where, otherwise: how its message starts and ends."""
    return _read(path, dict, where, otherwise)


def read_list(path: Path, where: str = "", otherwise: str = "") -> list[Any]:
    """The array in a JSON file, as :func:`read_table`."""
    return _read(path, list, where, otherwise)


def _read(path: Path, kind: type[Kind], where: str, otherwise: str) -> Kind:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MiB")
        found = json.loads(path.read_bytes())
        if not isinstance(found, kind):
            raise ValueError(f"{_NAMES[kind]} was expected, not {_NAMES.get(type(found), type(found).__name__)}")
    except (OSError, ValueError, RecursionError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is nested too deeply" if isinstance(e, RecursionError) else e
        start, end = where and f"{where}: ", otherwise and f"; {otherwise}"
        raise UserError(f"{start}'{path}' cannot be read as JSON: {reason}{end}") from e
    return found
