"""The laboratory's page: verdicts, forests and tables that can be sorted and copied."""

from pathlib import Path

from markupsafe import Markup

from dedistill.io.atomic import make_folder
from dedistill.report.pages import render
from lab.report import IMAGES, forest, models_table, padding_table, trick_table, variance_table, verdicts
from lab.tricks import SCORES, TRICKS

TEMPLATES = Path(__file__).parent / "templates"
LEAD = (
    "A student was distilled from a teacher of handwritten digits, then de-distilled; every row changes one thing. Differences "
    'are between runs of the same student and the same draws, seed by seed. "No difference seen" means that the interval holds '
    "zero, not that there is none."
)


def write_page(found: dict, folder: Path) -> Path:
    """Write ``index.html`` into ``folder``; returns its path. found: what ``lab.run_all`` returns."""
    make_folder(folder)
    scores, scale = found["scores"], found["scale"]
    sections = [_section(trick.title, trick.question, trick_table(trick, scores)) for trick in TRICKS]
    sections.append(
        _section("Variance, independent over stratified timesteps", "Above 1, stratifying calms.", variance_table(scores))
    )
    sections.append(_section("Padding", "Accuracy and Frechet distance at CFG 2, by tokens.", padding_table(scores)))
    sections.append(_section("All models", "Means over seeds, and their deviations.", models_table(scores)))
    page = folder / "index.html"
    html = render(
        "lab.html.j2",
        TEMPLATES,
        title="What each trick is worth",
        lead=LEAD,
        facts={
            "seeds": found["seeds"],
            "steps": scale["steps"],
            "held-out samples": scale["held_out"],
            "prompts": scale["prompts"],
            "minutes of one core": round(found["cpu_seconds"] / 60),
        },
        verdicts=verdicts(scores),
        forests=[(f"Differences of the {SCORES[key].label}", Markup(forest(scores, key))) for key in IMAGES],
        sections=sections,
    )
    page.write_text(html, encoding="utf-8")
    return page


def _section(title: str, question: str, table: tuple[list[str], list[list[str]]]) -> dict:
    heads, rows = table
    numeric = [all(_leading(row[i]) or not row[i] for row in rows) for i in range(len(heads))]
    fields = [
        [{"text": text, "sort": _leading(text) if number else text, "best": False} for text, number in zip(row, numeric)]
        for row in rows
    ]
    columns = [{"label": head or "variant", "help": "", "numeric": number} for head, number in zip(heads, numeric)]
    return {"title": title, "question": question, "table": {"heads": columns, "rows": fields}}


def _leading(text: str) -> str:
    """The number that a field begins with, to sort by; empty if there is none."""
    first = text.replace("`", "").partition(" ")[0].rstrip(",")
    try:
        return repr(float(first))
    except ValueError:
        return ""
