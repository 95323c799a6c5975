"""The page that tells one run's story: what was claimed, whether it holds, and the numbers and pictures behind it."""

from __future__ import annotations

from pathlib import Path

from dedistill.errors import UserError
from dedistill.report.pages import (
    PHONE_SIDE,
    TINY,
    Shot,
    decimals,
    display_width,
    drop_old_thumbnails,
    figure,
    is_number,
    picture_link,
    render,
    thumbnail,
)
from dedistill.report.plots import tick_label, value_label

NEEDED = {"title": str, "lead": str, "models": list, "cfgs": list, "summary": dict, "pictures": dict, "prompts": list}
# key, label, axis label, what it says; a summary without one of these simply lacks its row and its curve
MEASURES = (
    ("accuracy", "Accuracy", "higher is better →", "Share of pictures in which the judge reads what the prompt asked for."),
    ("frechet", "Fréchet distance", "← lower is better", "Distance of the pictures from real ones, as the judge sees both."),
    ("precision", "Precision", "higher is better →", "Share of pictures that lie among the real ones."),
    ("saturated", "Saturated", "share of pixels", "Share of pixels at the end of their range: burnt out by guidance."),
)


def write_story_page(folder: Path, story: dict) -> Path:
    """Write ``index.html`` and ``thumbs`` for a story into ``folder`` and return the page's path.

    ``story`` holds title, lead, models, labels, cfgs, summary, checks, pictures (files relative to ``folder``),
    prompts, sweep_link and commands; checks, labels, sweep_link and commands may be left out. Raises ``UserError``
    when another key or a picture is missing.
    """
    folder = Path(folder)
    for key, kind in NEEDED.items():
        if not isinstance(story.get(key), kind):
            raise UserError(f"story: {key!r} is missing or not a {kind.__name__}")
    for model in story["models"]:
        if not isinstance(story["summary"].get(model), dict):
            raise UserError(f"story: 'summary' has nothing for the model {model!r}")
    folder.mkdir(parents=True, exist_ok=True)  # first: "../sweep/x.png" cannot be found from a folder that is not there
    gallery = _gallery(folder, story)
    shots = [shot for model in gallery for row in model["rows"] for shot in row["shots"] if shot]
    drop_old_thumbnails(folder, shots)
    size = max(((shot.width, shot.height) for shot in shots), default=(TINY, TINY))
    html = render(
        "story.html.j2",
        title=story["title"],
        lead=story["lead"],
        checks=story.get("checks", []),
        cfgs=story["cfgs"],
        prompts=story["prompts"],
        table=_table(story),
        gallery=gallery,
        tiny=min(size) < TINY,
        small=display_width(size, len(story["prompts"]), PHONE_SIDE),
        width=display_width(size, len(story["prompts"]), most=72 if min(size) < TINY else 128),
        plots=_plots(story),
        sweep_link=story.get("sweep_link"),
        commands=story.get("commands", []),
    )
    page = folder / "index.html"
    page.write_text(html, encoding="utf-8")
    return page


def _name(story: dict, model: str) -> str:
    return story.get("labels", {}).get(model, model)


def _at(by_scale: dict, cfg: float) -> object:
    """The entry of a scale: the keys went through JSON, so 1 may be "1" or "1.0"."""
    for key in (tick_label(cfg), str(cfg), str(float(cfg)), cfg):
        if key in by_scale:
            return by_scale[key]
    return None


def _value(story: dict, model: str, cfg: float, key: str) -> float | None:
    numbers = _at(story["summary"][model].get("cfg", {}), cfg)
    value = numbers.get(key) if isinstance(numbers, dict) else None
    return value if is_number(value) else None


def _table(story: dict) -> list[dict]:
    """A group of rows per model, a row per measure; a measure has the same number of decimals everywhere."""
    models, cfgs = story["models"], story["cfgs"]
    values = {key: {(m, c): _value(story, m, c, key) for m in models for c in cfgs} for key, *_ in MEASURES}
    table = []
    for model in models:
        rows = []
        for key, label, *_ in MEASURES:
            if all(value is None for value in values[key].values()):
                continue
            places = decimals(values[key].values())
            mine = [values[key][model, cfg] for cfg in cfgs]
            rows.append({"label": label, "texts": ["–" if v is None else f"{v:.{places}f}" for v in mine]})
        loss, error = (story["summary"][model].get(key) for key in ("fm_loss", "fm_loss_se"))
        text = f"flow-matching loss {loss:.4f}" if is_number(loss) else ""
        text += f" ± {error:.4f}" if text and is_number(error) else ""
        table.append({"name": _name(story, model), "loss": text, "rows": rows})
    return table


def _gallery(folder: Path, story: dict) -> list[dict]:
    """A group of rows per model, a row per scale, a column per prompt."""
    groups = []
    for model in story["models"]:
        rows = []
        for cfg in story["cfgs"]:
            files = _at(story["pictures"].get(model, {}), cfg)
            if files:
                rows.append({"cfg": cfg, "shots": _shots(folder, story, model, cfg, files)})
        if rows:
            groups.append({"name": _name(story, model), "rows": rows})
    return groups


def _shots(folder: Path, story: dict, model: str, cfg: float, files: list[str]) -> list[Shot | None]:
    prompts = story["prompts"]
    if len(files) != len(prompts):
        raise UserError(f"story: {model} at CFG {tick_label(cfg)} has {len(files)} pictures for {len(prompts)} prompts")
    where = f"{_name(story, model)}, CFG {tick_label(cfg)}"
    measured = [(label.lower(), _value(story, model, cfg, key)) for key, label, *_ in MEASURES]
    numbers = ", ".join(f"{label} {value_label(value)}" for label, value in measured if value is not None)
    numbers = f"At this scale: {numbers}" if numbers else ""
    shots: list[Shot | None] = []
    for file, prompt in zip(files, prompts):
        if not file:
            shots.append(None)
            continue
        src, (width, height) = picture_link(folder, file)
        small = thumbnail(folder, file, (width, height))
        shots.append(Shot(file, src, small, f"{prompt}: {where}", prompt, where, numbers, width, height))
    return shots


def _plots(story: dict) -> list[dict]:
    plots = []
    for key, label, axis, explanation in MEASURES:
        series = {
            _name(story, model): [
                (cfg, value) for cfg in story["cfgs"] if (value := _value(story, model, cfg, key)) is not None
            ]
            for model in story["models"]
        }
        if any(series.values()):
            plots.append(figure(series, title=label, xlabel="CFG scale", ylabel=axis, help=explanation))
    return plots
