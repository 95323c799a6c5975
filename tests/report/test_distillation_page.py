"""The page of distillation meters: every number, every verdict, intervals in the plots, nothing from outside."""

import json
import re

import pytest
from test_pages import Page

from dedistill.report.distillation import write_distillation_page
from dedistill.report.plots import line_plot

HOSTILE = "<b>student</b> & co"
METERS = [
    {"key": "loss", "label": "held-out loss", "help": "Loss.", "axis": None},
    {"key": "few_steps", "label": "few-step gap", "help": "Gap.", "axis": "Euler steps"},
]


def row(value: float, at: float | None = None, verdict: str | None = None) -> dict:
    found = {"value": value, "low": value * 0.9, "high": value * 1.1, "units": 40}
    found |= {} if at is None else {"at": at}
    if verdict:
        found |= {"difference": value / 7, "difference_low": value / 9, "difference_high": value / 5, "verdict": verdict}
    return found


@pytest.fixture
def found() -> dict:
    teacher = {"loss": [row(0.4178)], "few_steps": [row(0.145, 1), row(0.0123, 4)]}
    student = {
        "loss": [row(0.5716, verdict="higher")],
        "few_steps": [row(0.2, 1, "higher"), row(0.0083, 4, "no difference seen")],
    }
    names = {"teacher": teacher, HOSTILE: student}
    counts = {"settings": {"prompts": 24}, "images": 40, "distinct_prompts": 24}
    return {"title": "t", "reference": "teacher", "meters": METERS, "candidates": names, **counts}


def test_the_page_shows_every_number_and_verdict(tmp_path, found):
    page = Page(write_distillation_page(tmp_path, found))
    text = " ".join("".join(page.text).split())
    values = [r for rows in found["candidates"].values() for key in rows for r in rows[key]]
    assert all(f"{r[key]:.4g}" in text for r in values for key in r if key not in ("at", "verdict", "units"))
    assert text.count("higher") == 2 and text.count("no difference seen") == 1
    assert "few-step gap, 1 step" in text and "few-step gap, 4 steps" in text
    assert HOSTILE in text and "<b>student" not in page.source
    cells = [float(a["data-value"]) for a in page.all("td") if a.get("data-value") not in (None, "") and "class" not in a]
    assert len(cells) == 3 * 6 + 3 * 3
    assert json.loads((tmp_path / "distillation.json").read_text()) == found
    plain = page.source.replace("http://www.w3.org/2000/svg", "")
    assert "http" not in plain and not page.all("script", src="") and page.source.count("<svg") == 1


def test_few_images_have_numbers_and_no_intervals(tmp_path, found):
    """The page says on what it stands and what to do; nothing is called higher."""
    few = {"low": None, "high": None, "units": 3}
    unsaid = {"difference_low": None, "difference_high": None, "verdict": None}
    for rows in (r for name in found["candidates"].values() for r in name.values()):
        rows[:] = [r | few | (unsaid if "verdict" in r else {}) for r in rows]
    page = Page(write_distillation_page(tmp_path, found | {"images": 3, "distinct_prompts": 1}))
    text = " ".join("".join(page.text).split())
    assert "Measured on 3 held-out images and 1 different prompt" in text and "data.held_out" in text and "--prompts" in text
    assert text.count("no interval: 3 different") == 6 and "0.4178" in text
    assert not page.all("span", class_="verdict") and "0.376" not in text and page.source.count('class="span"') == 0


def test_intervals_are_drawn_where_they_belong():
    """A span per point, from low to high, inside the frame; the axis covers them."""
    points = [(1.0, 2.0, 1.0, 5.0), (2.0, 3.0, 2.5, 3.5)]
    svg = line_plot({"a": points}, title="t", xlabel="x", ylabel="y")
    spans = [[float(n) for n in s] for s in re.findall(r'class="span" d="M([\d.]+) ([\d.]+)V([\d.]+)"', svg)]
    ticks = {float(n): float(y) - 4 for y, n in re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)}
    lowest, highest = min(ticks), max(ticks)
    assert lowest <= 1 and highest >= 5

    def value(y: float) -> float:
        """The number at a pixel, by the lowest and highest tick, whose labels stand 4 pixels below their lines."""
        return lowest + (y - ticks[lowest]) / (ticks[highest] - ticks[lowest]) * (highest - lowest)

    assert [(value(a), value(b)) for _, a, b in spans] == [pytest.approx(p[2:], abs=0.01) for p in points]
    assert 'class="span"' not in line_plot({"a": [p[:2] for p in points]}, title="t", xlabel="x", ylabel="y")
    missing = line_plot({"a": [(1.0, 2.0, float("nan"), 5.0), points[1]]}, title="t", xlabel="x", ylabel="y")
    assert missing.count('class="span"') == 1 and missing.count('class="point"') == 1
