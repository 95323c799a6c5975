"""The page of a set of pairs: a few of them as noise, points between and image, and how all were made."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dedistill.data.pairs import PairSource
from dedistill.io.atomic import make_folder, replace_file
from dedistill.io.images import replace_image
from dedistill.report.pages import PHONE_SIDE, TINY, Shot, display_width, image_link, render, thumbnail
from dedistill.sampling.images import as_image

SHOWN = 24
WORDS = (
    *("teacher", "cfg", "skip", "method", "solver", "steps", "shift", "negative_prompt", "prediction", "above_range"),
    *("source", "seed", "dtype"),
)


def write_pairs_page(folder: Path, source: PairSource, decode: Callable[[Tensor], Tensor]) -> Path:
    """Write ``index.html`` into ``folder`` of a finished set, with PNG files in images/; returns the page's path."""
    make_folder(folder / "images")
    picks = np.unique(np.linspace(0, len(source) - 1, min(SHOWN, len(source))).astype(int))
    rows = [_row(folder, source, decode, i) for i in picks.tolist()]
    size = rows[0][1][0].width, rows[0][1][0].height
    html = render(
        "pairs.html.j2",
        title=f"{len(source):,} pairs",
        facts=_facts(source),
        sigmas=source.sigmas.tolist(),
        rows=rows,
        left_out=source.left_out(),
        width=display_width(size, len(source.sigmas) + 1),
        small=display_width(size, len(source.sigmas) + 1, PHONE_SIDE),
        tiny=min(size) < TINY,
    )
    page = folder / "index.html"
    replace_file(page, html.encode())
    return page


def _row(folder: Path, source: PairSource, decode: Callable[[Tensor], Tensor], index: int) -> tuple[str, list[Shot]]:
    """Prompt and images of a pair."""
    states, prompt = source.read(index)
    images = decode(torch.from_numpy(states))
    return prompt, [_shot(folder, index, prompt, sigma, image) for sigma, image in zip(source.sigmas, images)]


def _facts(source: PairSource) -> dict[str, str]:
    known = {key: source.facts[key] for key in WORDS if source.facts.get(key) not in (None, "")}
    found = {key.replace("_", " "): f"{x:.4g}" if isinstance(x, float) else str(x) for key, x in known.items()}
    rms, most = source.rounding()
    if most:
        found["lost by 16 bits"] = f"{rms:.2g} of the rms, at most {most:.2g}"
    return found | {"shards": f"{len(source.facts['shards']):,}"}


def _shot(folder: Path, index: int, prompt: str, sigma: float, image: Tensor) -> Shot:
    file = f"images/{index:08d}_{sigma:.4f}.png"
    replace_image(folder / file, as_image(image))
    src, (width, height) = image_link(folder, file)
    small = thumbnail(folder, file, (width, height))
    where = f"pair {index}, sigma {sigma:.4g}"
    return Shot(file, src, small, f"{prompt}, {where}", prompt, where, "", width, height)
