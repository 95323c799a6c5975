"""What pydantic found, in plain words: one line for each key."""

import math
import re
from collections.abc import Sequence
from difflib import get_close_matches

from pydantic_core import ErrorDetails

from dedistill.errors import amount
from dedistill.recipe.foreign import answer_to_value

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


def explain(errors: list[ErrorDetails], key: str) -> str:
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
    if answer := answer_to_value(key, value):
        hint = f"; {answer}"
    if isinstance(value, str) and {error["type"] for error in errors} & {"int_type", "float_type"} and _is_number(value):
        hint = "; write it without quotes"
    for error in errors:
        if error["type"] != "literal_error" and error["type"] not in _KINDS:
            return f"{any_of([_limit(error), *quoted])}, got {_bare(value)}{hint}"
    kinds = [_KINDS[error["type"]] for error in errors if error["type"] in _KINDS]
    if isinstance(value, str) and not kinds:
        return f"{quote(value)} is not one of {', '.join(quoted)}{hint}"
    if isinstance(value, dict) and kinds == ["an array"]:
        hint = f"; an array of tables is written [[{key}]]"
    if isinstance(value, list) and kinds == ["a table"]:
        hint = f"; a single table is written [{key}]"
    return f"expects {any_of(kinds + quoted)}, got {shown(value)}{hint}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _limit(error: ErrorDetails) -> str:
    """What is asked of a value whose kind is right."""
    kind, ctx = error["type"], error.get("ctx", {})
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        return f"must be {words} {ctx[name]:.15g}"
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "multiple_of":
        return f"must be a multiple of {ctx['multiple_of']:.15g}"
    if kind == "too_short":
        return f"must have at least {amount(ctx['min_length'], 'entry', 'entries')}"
    if kind == "too_long":
        return f"must have at most {amount(ctx['max_length'], 'entry', 'entries')}"
    known = {
        "finite_number": "be a finite number",
        "string_too_short": "not be empty",
        "string_unicode": "be valid Unicode",
        "string_pattern_mismatch": "begin with a letter or digit and hold only letters, digits, spaces and . _ -",
    }
    return f"must {known.get(kind, 'be a value in range')}"


def _bare(value: object) -> str:
    """A value whose kind needs no mention; of an array only the length."""
    if _huge(value):
        return "a number of more than 20 digits"
    return str(len(value)) if isinstance(value, list) else quote(value) if isinstance(value, str) else str(value)


def _huge(value: object) -> bool:
    """Too long for a message, and past 4300 digits Python refuses to write it out."""
    return isinstance(value, int) and abs(value) >= 10**20


def shown(value: object) -> str:
    """A value from TOML with its kind, short enough for one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)):
        return "an array" if isinstance(value, list) else "a table"
    if isinstance(value, (int, float)) and not _huge(value):
        return f"{'the integer' if isinstance(value, int) else 'the number'} {_bare(value)}"
    if isinstance(value, str):
        return f"the string {quote(value)}"
    return _bare(value) if _huge(value) else f"the date or time {value}"


def quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def any_of(options: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
