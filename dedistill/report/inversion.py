"""The page of an inverted image: the source, what came back of it, and edits over how much they were held to it."""

from pathlib import Path
from typing import Any

from dedistill.evaluation.edits import INDEX
from dedistill.io.atomic import replace_file
from dedistill.io.json_files import read_object
from dedistill.report.pages import PHONE_SIDE, TINY, Shot, display_width, figure, image_link, render, thumbnail


def write_inversion_page(folder: Path) -> Path:
    """Write ``index.html`` for what ``evaluation.edits`` left in ``folder``; returns the page's path."""
    found = read_object(folder / INDEX)
    cells, settings = found["cells"], found["settings"]
    etas, prompts = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("eta", "prompt"))
    shots = {(cell["prompt"], cell["eta"]): _shot(folder, cell) for cell in cells}
    first = next(iter(shots.values()))
    size = first.width, first.height
    columns = round((len(etas) + 2) * max(1.0, first.width / first.height) ** 0.5)  # all in one row, also of wide images
    names = {prompt: "given back" if prompt is None else prompt for prompt in prompts}
    curves = {names[p]: [(cell["eta"], cell["psnr"]) for cell in cells if cell["prompt"] == p] for p in prompts}
    html = render(
        "inversion.html.j2",
        title=found["title"],
        settings=settings | {"likeness of the codec alone": f"{found['limit']:.1f} dB"},
        source=[_shot(folder, {"file": found[key], "prompt": None, "eta": None}, key) for key in ("source", "decoded")],
        etas=etas,
        rows=[{"name": names[p], "source": p is None, "shots": [shots[p, eta] for eta in etas]} for p in prompts],
        width=display_width(size, columns),
        small=display_width(size, columns, PHONE_SIDE),
        tiny=min(size) < TINY,
        plot=figure(
            curves,
            title="Likeness to the source",
            xlabel="eta",
            ylabel="PSNR, dB",
            help="Peak signal-to-noise ratio of pixels; 99 where they are equal.",
        ),
    )
    page = folder / "index.html"
    replace_file(page, html.encode())
    return page


def _shot(folder: Path, cell: dict[str, Any], called: str = "") -> Shot:
    src, (width, height) = image_link(folder, cell["file"])
    prompt = called or (cell["prompt"] if cell["prompt"] is not None else "given back")
    where = "the image itself" if cell["eta"] is None else f"eta {cell['eta']:g}"
    numbers = f"{cell['psnr']:.1f} dB from the source" if "psnr" in cell else ""
    small = thumbnail(folder, cell["file"], (width, height))
    return Shot(cell["file"], src, small, f"{prompt}, {where}", prompt, where, numbers, width, height)
