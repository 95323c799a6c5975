"""The two files of a sweep, read and checked: scores.json and index.json."""

import json
from collections.abc import Iterable
from pathlib import Path

from dedistill.errors import UserError


def read_json(path: Path) -> object:
    """Parse a JSON file; a missing or broken one is the user's to mend."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; is {path.parent} the folder of a finished sweep?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); run the sweep again to write it anew") from None


def read_scores(path: Path) -> dict:
    scores = read_json(path)
    if not isinstance(scores, dict):
        raise UserError(f"{path}: expected an object with title, settings, numbers and cells")
    for key, kind in {"title": str, "settings": dict, "numbers": list, "cells": list}.items():
        if not isinstance(scores.get(key), kind):
            raise UserError(f"{path}: {key!r} is missing or not a {kind.__name__}")
    _require(path, "numbers", scores["numbers"], {"key": str, "label": str})
    _require(path, "cells", scores["cells"], {"candidate": str, "cfg": (int, float), "skip": int})
    if not scores["cells"]:
        raise UserError(f"{path}: 'cells' is empty: the sweep made no pictures")
    for number in scores["numbers"]:
        number.setdefault("help", "")
        if number.setdefault("better", None) not in ("high", "low", None):
            raise UserError(f"{path}: number {number['key']!r}: 'better' is {number['better']!r}, not high, low or null")
    return scores


def read_index(path: Path) -> list[dict]:
    pictures = read_json(path)
    if not isinstance(pictures, list) or not pictures:
        raise UserError(f"{path}: expected a list with one object per picture")
    kinds = {"file": str, "candidate": str, "cfg": (int, float), "skip": int, "prompt": str, "seed": int}
    _require(path, "picture", pictures, kinds)
    for entry in pictures:
        if Path(entry["file"]).is_absolute() or ".." in Path(entry["file"]).parts:
            raise UserError(f"{path}: {entry['file']!r} lies outside the sweep folder; paths must be relative to it")
    return pictures


def _require(path: Path, what: str, entries: Iterable[object], kinds: dict[str, type | tuple[type, ...]]) -> None:
    """Raise when an entry lacks one of the keys or has another kind of value there."""
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: {what} {i} is not an object")
        for key, kind in kinds.items():
            if not isinstance(entry.get(key), kind) or isinstance(entry[key], bool):
                raise UserError(f"{path}: {what} {i}: {key!r} is missing or has the wrong type ({entry.get(key)!r})")
