"""What the tables of a recipe are made of: bounds, paths, defaults that depend on other keys, and where a key was said."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from dedistill.io.atomic import with_home


def _integral(value: object) -> object:
    """1e4 and 10000.0 are integers to whoever writes them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _path(text: str) -> str:
    text = with_home(text)
    if (odd := _CONTROL.match(text)) and not Path(odd[0]).exists():  # "C:\new" in double quotes holds a line feed
        odd_sign = "holds a line feed, tab or the like, and no such folder exists"
        raise ValueError(f"{odd_sign}; a path of Windows is written with /, or in single quotes")
    return text


_CONTROL = re.compile(r"[^\x00-\x1f]*[\x00-\x1f][^/]*")
"""The start of a path up to the end of the first name with a control character in it."""


Whole = Annotated[int, BeforeValidator(_integral)]
Count = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Whole, Field(ge=1)]
Bounded = Annotated[Whole, Field(ge=1, le=1_000_000)]  # what takes memory or time in proportion
Few = Annotated[Whole, Field(ge=1, le=1000)]
Steps = Annotated[Whole, Field(ge=1, le=1_000_000_000)]
Seed = Annotated[Whole, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Place = Annotated[str, StringConstraints(min_length=1), AfterValidator(_path)]
"""A path, or a hub id; ``~`` is the home folder."""
Auto = Literal["auto"]
"""Of keys that decide about memory and time alone: chosen at each start for the device at hand (``forecast.choose``)."""
SAFE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._ -]*$"
"""Names that are folders somewhere: no separators, nothing hidden, no way up."""
BY_FAMILY = "the family's"


@dataclass(frozen=True)
class Default:
    """What ``recipe.resolve`` puts in the place of a key that is left out, in recipes where the key has an effect.

    Elsewhere the key stays none. A field may have several, of which at most one holds.
    """

    value: Any
    """A value, or BY_FAMILY."""
    key: str = ""
    """Dotted key on which the effect depends; empty: it always has one."""
    among: tuple[str, ...] = ()
    """Values of ``key`` with which it holds; empty: all but 0."""

    def holds(self, found: object) -> bool:
        """Whether it does where ``key`` is ``found``."""
        return not self.key or (found in self.among if self.among else bool(found))

    def __str__(self) -> str:
        if not self.key:
            return str(self.value)
        where = f" = {' or '.join(map(repr, self.among))}" if self.among else ""
        return f"{self.value} with {self.key}{where}"


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class KeySource(NamedTuple):
    """Where a key was set. Sorts in the order of reading: the file itself, what it extends, then ``--set``."""

    order: int
    file: str
    line: int = 0  # 0: the file as a whole, or --set

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def weight(self) -> int:
        """The larger, the later what stands there is laid over the rest: what is extended, the file itself, all of
        ``--set`` alike."""
        return OVERRIDES if self.order >= OVERRIDES else -self.order


OVERRIDES = 1000
"""Order of the first override."""
