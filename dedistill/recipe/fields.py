"""What the tables of a recipe are made of: bounds, paths, and defaults that depend on other keys."""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from dedistill.io.atomic import with_home

Positive = Annotated[int, Field(ge=1)]
Bounded = Annotated[int, Field(ge=1, le=1_000_000)]  # what takes memory or time in proportion
Share = Annotated[float, Field(ge=0, le=1)]
Place = Annotated[str, StringConstraints(min_length=1), AfterValidator(with_home)]
"""A path, or a hub id; ``~`` is the home folder."""
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
        where = f"= {' or '.join(map(repr, self.among))}" if self.among else "more than 0"
        return f"{self.value} with {self.key} {where}"


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)
