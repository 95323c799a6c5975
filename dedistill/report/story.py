"""The three stages side by side: does guidance leave the student and come back? Numbers, checks, one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from dedistill.data.digits import digits_in
from dedistill.data.encode import open_source
from dedistill.data.source import Source, needed
from dedistill.errors import UserError, amount, say
from dedistill.evaluation.candidates import candidates_of
from dedistill.evaluation.judges import judge_for
from dedistill.evaluation.prompts import read_prompts
from dedistill.evaluation.sweep import Candidate, Grid, guiders_at, sweep
from dedistill.evaluation.validation import Validator
from dedistill.io.atomic import replace_file, replace_json
from dedistill.io.images import replace_image
from dedistill.io.ownership import claim
from dedistill.objectives.base import objective_for
from dedistill.recipe import Recipe
from dedistill.report.pages import (
    PHONE_SIDE,
    TINY,
    Shot,
    decimals,
    display_width,
    drop_old_thumbnails,
    figure,
    image_link,
    is_number,
    render,
    thumbnail,
)
from dedistill.report.plots import tick_label, value_label
from dedistill.report.sweep import write_sweep_page
from dedistill.runs.model import open_finished
from dedistill.sampling.images import contact_sheet

# --- the page that tells one run's story -----------------------------------------------------------------------------


NEEDED = {"title": str, "lead": str, "models": list, "cfgs": list, "summary": dict, "images": dict, "prompts": list}
# key, label, axis label, what it says; a summary without one of these simply lacks its row and its curve
MEASURES = (
    ("accuracy", "Accuracy", "higher is better →", "Share of images in which the judge reads what the prompt asked for."),
    ("frechet", "Fréchet distance", "← lower is better", "Distance of the images from real ones, as the judge sees both."),
    ("precision", "Precision", "higher is better →", "Share of images that lie among the real ones."),
    ("saturated", "Saturated", "share of pixels", "Share of pixels at the end of their range: burnt out by guidance."),
)


def write_story_page(folder: Path, story: dict[str, Any]) -> Path:
    """Write ``index.html`` and ``thumbs`` for a story into ``folder`` and return the page's path.

    ``story`` holds title, lead, models, labels, cfgs, summary, checks, images (files relative to ``folder``),
    prompts, sweep_link and commands; checks, labels, sweep_link and commands may be left out. Raises ``UserError``
    when another key or an image is missing.
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
    replace_file(page, html.encode())
    return page


def _name(story: dict[str, Any], model: str) -> str:
    return story.get("labels", {}).get(model, model)


def _at(by_scale: dict[str, Any], cfg: float) -> object:
    """The entry of a scale: the keys went through JSON, so 1 may be "1" or "1.0"."""
    for key in (tick_label(cfg), str(cfg), str(float(cfg)), cfg):
        if key in by_scale:
            return by_scale[key]
    return None


def _value(story: dict[str, Any], model: str, cfg: float, key: str) -> float | None:
    numbers = _at(story["summary"][model].get("cfg", {}), cfg)
    value = numbers.get(key) if isinstance(numbers, dict) else None
    return value if is_number(value) else None


def _table(story: dict[str, Any]) -> list[dict[str, Any]]:
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


def _gallery(folder: Path, story: dict[str, Any]) -> list[dict[str, Any]]:
    """A group of rows per model, a row per scale, a column per prompt."""
    groups = []
    for model in story["models"]:
        rows = []
        for cfg in story["cfgs"]:
            files: Any = _at(story["images"].get(model, {}), cfg)
            if files:
                rows.append({"cfg": cfg, "shots": _shots(folder, story, model, cfg, files)})
        if rows:
            groups.append({"name": _name(story, model), "rows": rows})
    return groups


def _shots(folder: Path, story: dict[str, Any], model: str, cfg: float, files: list[str]) -> list[Shot | None]:
    prompts = story["prompts"]
    if len(files) != len(prompts):
        raise UserError(
            f"story: {model} at CFG {tick_label(cfg)} has {amount(len(files), 'image')} for {amount(len(prompts), 'prompt')}"
        )
    where = f"{_name(story, model)}, CFG {tick_label(cfg)}"
    measured = [(label.lower(), _value(story, model, cfg, key)) for key, label, *_ in MEASURES]
    numbers = ", ".join(f"{label} {value_label(value)}" for label, value in measured if value is not None)
    numbers = f"At this scale: {numbers}" if numbers else ""
    shots: list[Shot | None] = []
    for file, prompt in zip(files, prompts):
        if not file:
            shots.append(None)
            continue
        src, (width, height) = image_link(folder, file)
        small = thumbnail(folder, file, (width, height))
        shots.append(Shot(file, src, small, f"{prompt}: {where}", prompt, where, numbers, width, height))
    return shots


def _plots(story: dict[str, Any]) -> list[dict[str, Any]]:
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


# --- the three stages side by side -----------------------------------------------------------------------------------


STAGES = ("teacher", "student", "dedistilled")
LABELS = {"teacher": "teacher", "student": "student", "student_native": "student, its own steps", "dedistilled": "de-distilled"}
LEAD = (
    "A teacher learned images from noisy captions. Its student was distilled to a few steps with the guidance baked in: "
    "it follows every prompt without guidance, and guidance only burns its images. De-distilling trains a small LoKr on "
    "the frozen int8 student with plain flow matching: at CFG 1 it is an honest model again, and the CFG dial works."
)
HELD_OUT = 512


@dataclass(frozen=True)
class Margins:
    """Where broken guidance is measured, and how much held-out loss de-distilling must win back at least."""

    scale: float = 4
    loss: float = 0.08


# MNIST's loss is a third of the digits', and its teacher itself is far from the data at CFG 4
MARGINS = {"digits": Margins(), "mnist": Margins(scale=2, loss=0.03)}
SHOWN = 8
SHEET_CFGS, SHEET_PROMPTS = (1, 2, 4, 8), 10


def tell(
    recipes: dict[str, Recipe], out: Path, *, cfgs: Sequence[float], prompts: int, steps: int, commands: list[str]
) -> list[dict[str, Any]]:
    """Sweep the finished runs of the three ``recipes`` into ``out``/sweep, write ``out``/summary.json and the page.

    All stages are sampled with the same number of steps, prompts and noise, so that only the model differs; the
    student also with its own few steps. Returns what the story claims, as :func:`story_checks` does.
    """
    claim(out, "story", "--out")
    source = open_source(recipes["dedistilled"].data)
    candidates = [_candidate(name, recipes[name], steps) for name in STAGES]
    candidates.insert(2, _candidate("student_native", recipes["student"], recipes["student"].sample.steps))
    grid = Grid(guiders_at(cfgs), read_prompts(str(prompts), lambda: source), (0,))
    scores = sweep(candidates, grid, out / "sweep", title="Teacher, student, de-distilled", judge=judge_for(source), say=say)
    write_sweep_page(out / "sweep")
    losses = _held_out_losses(recipes, source)
    summary: dict[str, dict[str, Any]] = {
        name: {"steps": c.steps, **losses.get(name, {}), "cfg": {}} for name, c in zip([*LABELS], candidates)
    }
    for cell in scores["cells"]:
        numbers = {
            k: cell[k] for k in ("accuracy", "frechet", "precision", "recall", "saturated", "contrast", "detail") if k in cell
        }
        summary[cell["candidate"]]["cfg"][f"{cell['cfg']:g}"] = numbers
    checks = story_checks(summary, MARGINS.get(source.name, Margins()))
    replace_json(out / "summary.json", summary)
    _write_page(out, recipes, summary, checks, cfgs, grid.prompts, commands)
    _write_sheet(out, cfgs, grid.prompts)
    print_table(summary, checks)
    return checks


def _candidate(name: str, recipe: Recipe, steps: int) -> Candidate:
    last = candidates_of(recipe, ["last"], steps=steps)[0]
    return Candidate(name, last.weights, steps, last.open)


def _held_out_losses(recipes: dict[str, Recipe], source: Source) -> dict[str, dict[str, float | None]]:
    """Flow-matching loss of every stage on the same held-out samples, noise and sigmas."""
    found = {}
    for name in STAGES:
        model = open_finished(recipes[name])
        objective = objective_for(recipes["dedistilled"], source, model.shift, model.components.schedule)
        result = needed(Validator(objective, HELD_OUT, model.chunk)(model))  # nothing interrupts it here
        found[name] = {"fm_loss": result["val_loss"], "fm_loss_se": result.get("val_loss_se")}
    return found


def story_checks(summary: dict[str, Any], margins: Margins) -> list[dict[str, Any]]:
    """What the story claims, with margins far beyond the noise of the evaluation: text, value, bound, ok of each."""
    scale, cfg = f"{margins.scale:g}", f"at CFG {margins.scale:g}"
    student, restored = summary["student"], summary["dedistilled"]
    accuracy = {name: summary[name]["cfg"]["1"]["accuracy"] for name in STAGES}
    frechet = {name: summary[name]["cfg"][scale]["frechet"] for name in STAGES}
    baked = accuracy["student"] - accuracy["teacher"]
    broken = frechet["student"] / frechet["teacher"]
    honest = accuracy["dedistilled"] - accuracy["teacher"]
    learned = student["fm_loss"] - restored["fm_loss"]
    usable = frechet["dedistilled"] / frechet["student"]
    return [
        _check("Guidance is baked in: the student's accuracy at CFG 1 exceeds the teacher's", baked, "> .15", baked > 0.15),
        _check(f"CFG is broken: the student's Frechet distance {cfg} over the teacher's", broken, "> 2", broken > 2),
        _check("Guidance is out again: accuracy at CFG 1, de-distilled less teacher", honest, "within .12", abs(honest) < 0.12),
        _check(
            "The flow is back: held-out loss, student less de-distilled",
            learned,
            f">= {margins.loss:g}",
            learned >= margins.loss,
        ),
        _check(f"CFG works again: Frechet distance {cfg}, de-distilled over student", usable, "< .6", usable < 0.6),
    ]


def _check(text: str, value: float, bound: str, ok: bool) -> dict[str, Any]:
    return {
        "text": text,
        "value": f"{value:+.3f}" if "less" in text or "exceeds" in text else f"{value:.2f}",
        "bound": bound,
        "ok": bool(ok),
    }


def _write_page(
    out: Path,
    recipes: dict[str, Recipe],
    summary: dict[str, Any],
    checks: list[dict[str, Any]],
    cfgs: Sequence[float],
    prompts: tuple[str, ...],
    commands: list[str],
) -> None:
    def files(name: str, cfg: float) -> list[str]:
        return [f"sweep/images/{name}/cfg{cfg:g}_skip0/p{i:03d}_s0.png" for i in range(len(prompts[:SHOWN]))]

    write_story_page(
        out,
        {
            "title": f"{recipes['dedistilled'].run.name}: guidance lost and found",
            "lead": LEAD,
            "models": list(LABELS),
            "labels": {n: f"{LABELS[n]} ({amount(summary[n]['steps'], 'step')})" for n in LABELS},
            "cfgs": cfgs,
            "summary": summary,
            "checks": checks,
            "images": {n: {f"{c:g}": files(n, c) for c in cfgs} for n in LABELS},
            "prompts": list(prompts[:SHOWN]),
            "sweep_link": "sweep/index.html",
            "commands": commands,
        },
    )


def _write_sheet(out: Path, cfgs: Sequence[float], prompts: tuple[str, ...]) -> None:
    """``story.png``: the stages at a few scales as one image."""
    shown = [c for c in SHEET_CFGS if c in cfgs]
    prompts = prompts[:SHEET_PROMPTS]

    def image(name: str, cfg: float, i: int) -> Image.Image:
        with Image.open(out / f"sweep/images/{name}/cfg{cfg:g}_skip0/p{i:03d}_s0.png") as file:
            return file.copy()

    rows = [
        (f"{LABELS[name]}, CFG {cfg:g}", [image(name, cfg, i) for i in range(len(prompts))]) for name in STAGES for cfg in shown
    ]
    columns = [" ".join(map(str, digits_in(p))) or p for p in prompts]  # short: a caption is wider than a digit
    sheet = contact_sheet(rows, columns, title="Guidance lost and found")
    replace_image(out / "story.png", sheet, optimize=True)


def print_table(summary: dict[str, Any], checks: list[dict[str, Any]]) -> None:
    """The summary as a table on stdout, then the checks."""
    out = Console(highlight=False, width=132)
    table = Table(title="accuracy / Frechet distance / saturated / precision", title_justify="left", pad_edge=False)
    table.add_column("CFG", justify="right")
    for name in summary:
        loss = f"\nloss {summary[name]['fm_loss']:.4f}" if "fm_loss" in summary[name] else "\n"
        table.add_column(f"{LABELS[name]}\n{amount(summary[name]['steps'], 'step')}{loss}", justify="right")
    for cfg in next(iter(summary.values()))["cfg"]:
        cells = [summary[name]["cfg"][cfg] for name in summary]
        table.add_row(
            cfg, *(f"{c['accuracy']:.3f} {c['frechet']:6.2f} {c['saturated']:.3f} {c['precision']:.2f}" for c in cells)
        )
    out.print(table)
    for check in checks:
        mark = "[green]yes[/green]" if check["ok"] else "[red]NO [/red]"
        out.print(f"{mark} {check['text']}: {check['value']} ({check['bound']})")
