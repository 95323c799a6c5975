"""Exact name patterns: ``*`` stands for anything inside one dotted part, ``**`` for any number of whole parts.

``transformer_blocks.1.*`` never takes block 10, and ``*.norm1`` never takes ``a.b.norm1``: no prefixes, no surprises.
"""

import re
from collections.abc import Iterable
from functools import lru_cache


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = pattern.split(".")
    if any("**" in part and part != "**" for part in parts):
        raise ValueError(f"pattern {pattern!r}: ** stands alone between dots")
    regex = ""
    for i, part in enumerate(parts):
        if part == "**":
            regex += r"(?:[^.]+\.)*" if i < len(parts) - 1 else r"[^.]+(?:\.[^.]+)*"
        else:
            regex += "[^.]*".join(re.escape(piece) for piece in part.split("*"))
            regex += r"\." if i < len(parts) - 1 else ""
    return re.compile(regex)


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that ``pattern`` matches whole, in their order. Raises ValueError for a malformed pattern."""
    compiled = _compiled(pattern)
    return [name for name in names if compiled.fullmatch(name)]
