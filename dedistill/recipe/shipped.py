"""The recipes that come with the package, by name: ``dedistill:flux_schnell_24gb``, ``dedistill:digits/teacher``."""

from difflib import get_close_matches
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "recipes"
PREFIX = "dedistill:"
CHAIN = "chain.toml"
"""What lists the stages of a chain of recipes, beside these."""


def shipped_recipes() -> dict[str, Path]:
    """Name without ``dedistill:`` -> file, sorted by name."""
    files = (file for file in sorted(FOLDER.rglob("*.toml")) if file.name != CHAIN)
    return {file.relative_to(FOLDER).with_suffix("").as_posix(): file for file in files}


def shipped_file(name: str) -> Path | None:
    """The file behind ``dedistill:NAME``; None for anything else. Raises LookupError, saying what there is."""
    if not name.startswith(PREFIX):
        return None
    known = shipped_recipes()
    stem = name.removeprefix(PREFIX).removesuffix(".toml")
    if stem in known:
        return known[stem]
    near = get_close_matches(stem, known, n=1)
    hint = f"did you mean '{PREFIX}{near[0]}'?" if near else f"there are {', '.join(known)}"
    raise LookupError(f"no recipe of this name comes with dedistill, {hint}")


def near_shipped(path: Path) -> str:
    """What to say of a missing file that bears the name of a shipped recipe; else nothing."""
    ends = [f"{path.parent.name}/{path.stem}", path.stem]
    found = next((name for name in ends if name in shipped_recipes()), None)
    return f", did you mean '{PREFIX}{found}'?" if found else ""


def is_shipped(place: str) -> bool:
    """Whether ``place`` (file:line, as errors show it) lies in a recipe that came with the package."""
    file = place.rpartition(":")[0]
    return file.startswith(PREFIX) or (file != "" and FOLDER in Path(file).resolve().parents)
