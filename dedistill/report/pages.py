"""What the pages share: templates, links to images and small copies of them, numbers as text."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from dedistill.errors import UserError, amount
from dedistill.io.images import is_whole_image, replace_image
from dedistill.report.plots import Points, line_plot, tick_label

TEMPLATES = Path(__file__).parent / "templates"
TINY = 96  # images with a shorter side than this are shown with hard pixel edges
PHONE_SIDE = 80  # side of a thumbnail on a phone
_SMALL = re.compile(r"[0-9a-f]{24}\.webp")
THUMB_SIDE, THUMB_QUALITY = 320, 75  # of the small copies: 15 kB for a photograph


@dataclass(frozen=True)
class Shot:
    """One image as the templates show it; ``where`` and ``numbers`` are the caption of the enlarged image.

    The grid shows ``small``, the enlarged image is ``src``, both URLs; width and height are those of ``src``.
    """

    file: str
    src: str
    small: str
    alt: str
    prompt: str
    where: str
    numbers: str
    width: int
    height: int
    wrong: float = 0.0  # share the judge misread


@cache
def _environment(folder: Path) -> Environment:
    loader = FileSystemLoader([folder, TEMPLATES])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"tick": tick_label, "amount": amount}
    return environment


def render(template: str, folder: Path = TEMPLATES, /, **values: object) -> str:
    """Fill a page template; everything that is not ``Markup`` is escaped, prompts above all.

    folder: where the template lies. What it extends or imports may also be one of this package's templates.
    """
    return _environment(folder).get_template(template).render(**values)


def image_link(folder: Path, file: str) -> tuple[str, tuple[int, int]]:
    """The URL of an image relative to the page in ``folder``, and its size in pixels."""
    with _readable(folder / file), Image.open(folder / file) as image:
        return quote(Path(file).as_posix()), image.size


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what reading an image raises into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such image; was the folder moved without its images?") from None
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from None


def thumbnail(folder: Path, file: str, size: tuple[int, int]) -> str:
    """The URL of what the page in ``folder`` shows of an image of ``size`` in its grid.

    A WebP in ``folder``/thumbs, named by the hash of the image; the image itself where it is tiny, to keep its pixels.
    """
    if min(size) < TINY:
        return quote(Path(file).as_posix())
    content = (folder / file).read_bytes()
    name = f"thumbs/{hashlib.sha256(content).hexdigest()[:24]}.webp"
    if not is_whole_image(folder / name):
        (folder / "thumbs").mkdir(exist_ok=True)
        with _readable(folder / file), Image.open(io.BytesIO(content)) as image:
            save_small(image, folder / name)
    return name


def save_small(image: Image.Image, path: Path, side: int = THUMB_SIDE) -> tuple[int, int]:
    """Write a WebP of ``image`` that fits into a square of ``side`` pixels; returns its size."""
    small = image.convert("RGBA" if image.has_transparency_data else "RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    replace_image(path, small, quality=THUMB_QUALITY)
    return small.size


def drop_old_thumbnails(folder: Path, shots: Iterable[Shot]) -> None:
    """Remove small copies that none of ``shots`` shows; images under other names than they have are not ours."""
    shown = {shot.small for shot in shots}
    for path in (folder / "thumbs").glob("*.webp"):
        if _SMALL.fullmatch(path.name) and f"thumbs/{path.name}" not in shown:
            path.unlink()


def display_width(size: tuple[int, int], columns: int, most: int = 220) -> int:
    """The width in CSS pixels of a thumbnail: tiny images by a whole factor, larger ones to fill the page.

    ``most`` bounds the side of a square image; long grids want less than the page would hold.
    """
    width, height = size
    root = math.sqrt(width * height)
    if min(size) < TINY:
        return width * max(1, int(min(max(920 / columns, 72), 128, most) / root))
    return round(min(max(920 / columns, 96), most) * width / root)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value read from JSON can be shown as a number: neither missing, nor NaN, nor true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def figure(
    series: Mapping[str, Points], *, title: str, xlabel: str, ylabel: str, help: str = "", **options: Any
) -> dict[str, object]:
    """A plot and its numbers, as the macro ``figure`` of parts.html.j2 takes them; options: those of ``line_plot``."""
    svg = line_plot(series, title=title, xlabel=xlabel, ylabel=ylabel, **options)
    rows = [
        (name, *map(number, point)) for name, points in series.items() for point in sorted(points, key=lambda point: point[0])
    ]
    heads = ["line", xlabel, title, "from", "to"]
    return {"svg": Markup(svg), "title": title, "help": help, "heads": heads[: max(map(len, rows), default=3)], "rows": rows}


def number(value: float | None) -> str:
    """A number to be copied: six significant digits."""
    return f"{value:.6g}" if is_number(value) else ""


def decimals(values: Iterable[float | None]) -> int:
    """How many decimals a column of such numbers needs."""
    largest = max((abs(value) for value in values if is_number(value)), default=0)
    return next(count for limit, count in ((100, 1), (10, 2), (0.1, 3), (0, 4)) if largest >= limit)


def field(value: object, text: Callable[[float], str] = str, best: float | None = None) -> dict[str, Any]:
    """One field of a sortable table; ``text`` writes a number. What is neither text nor a number is a gap."""
    if isinstance(value, str):
        return {"text": value, "sort": value, "best": False}
    if not is_number(value):
        return {"text": "–", "sort": "", "best": False}
    return {"text": text(value), "sort": repr(value), "best": value == best}
