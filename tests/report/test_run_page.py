"""The page of a run: what is averaged and how, what a broken record leaves of it, and the page of a real run."""

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from by_file import tool
from example_pages import run_rows
from test_pages import Page

from dedistill.errors import UserError
from dedistill.report.plots import heat_map
from dedistill.report.run import CURVES, Record, averaged, bins_over_time, write_run_page
from dedistill.train import main

ROOT = Path(__file__).parent.parent.parent
RECIPE = {"run": {"name": "a <b>run</b>"}, "train": {"steps": 100, "objective": "flow"}}


def write_run(folder: Path, rows: list[dict], torn: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    (folder / "recipe.json").write_text(json.dumps(RECIPE))
    return folder


@pytest.mark.parametrize("count", [1, 199, 200, 201, 5000])
def test_averages_keep_the_mean_and_the_order(count):
    """At most 200 points; each row counts in exactly one, so the mean weighted by rows is that of all rows."""
    generator = np.random.default_rng(0)
    rows = [{"step": i + 1, "loss": float(generator.standard_normal())} for i in range(count)]
    points = averaged(Record(rows), "loss")
    assert len(points) == min(count, 200)
    steps = [step for step, _ in points]
    assert steps == sorted(set(steps)) and steps[0] >= 1 and steps[-1] <= count
    if count <= 200:
        assert points == [(row["step"], row["loss"]) for row in rows]
    if count % 200 == 0:
        assert np.mean([v for _, v in points]) == pytest.approx(np.mean([row["loss"] for row in rows]))


def test_an_average_of_errors_does_not_shrink():
    """The held-out samples are the same each time: 400 readings with an error of .1 still are .1 off."""
    rows = [{"step": i, "val_loss": 1.0, "val_loss_se": 0.1} for i in range(400)]
    assert all(point[1:] == pytest.approx((1, 1 - 0.196, 1 + 0.196)) for point in averaged(Record(rows), "val_loss"))


def test_what_is_no_number_is_left_out():
    """Losses of bad steps are words in the record."""
    rows = [{"step": 1, "loss": "nan"}, {"step": 2, "loss": 0.5}, {"step": 3}, {"step": 4, "loss": float("nan")}]
    assert averaged(Record(rows), "loss") == [(2.0, 0.5)]


def test_bins_are_averaged_over_what_fell_into_them():
    rows = [
        {"step": s, "sigma_loss": bins} for s, bins in ((1, [1.0, None]), (2, [3.0, None]), (3, [5.0, 2.0]), (4, [None, 4.0]))
    ]
    assert bins_over_time(Record(rows), most=2) == ([1.5, 3.5], [[2.0, 5.0], [None, 3.0]])
    other = [{"step": 0, "sigma_loss": [9.0]}, {"step": 0}, *rows]  # log.sigma_bins was changed on the way
    assert bins_over_time(Record(other), most=2) == bins_over_time(Record(rows), most=2)
    assert bins_over_time(Record([{"step": 1}])) == ([], [])


def test_a_heat_map_is_fuller_where_there_is_more():
    """Equal ratios are equal steps; a gap is no cell; the first row lies at the bottom."""
    svg = heat_map([1, 2, 3], {"low": [1.0, 2.0, 4.0], "<high>": [None, 4.0, 1.0]}, title="t", xlabel="x", ylabel="y", unit="u")
    cells = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"[^>]* fill-opacity="([\d.]+)"><title>([^<]*)</title>', svg)
    fullness = {title: float(opacity) for _, _, opacity, title in cells}
    assert [*fullness] == ["low, x 1: 1", "low, x 2: 2", "low, x 3: 4", "&lt;high&gt;, x 2: 4", "&lt;high&gt;, x 3: 1"]
    assert [*fullness.values()] == [0.06, 0.53, 1.0, 1.0, 0.06]
    heights = {title.partition(",")[0]: float(y) for _, y, _, title in cells}
    assert heights["low"] > heights["&lt;high&gt;"]
    places = [float(x) for x, _, _, title in cells if title.startswith("low")]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)


def test_the_page_shows_what_was_logged_and_what_went_wrong(tmp_path):
    rows = run_rows(60)
    page = Page(write_run_page(write_run(tmp_path / "run", rows, torn='{"step": 61, "loss": 0.1')))
    text = " ".join("".join(page.text).split())
    assert "60 of 100" in text and "a <b>run</b>" in text and "<b>run" not in page.source
    labels = (
        "training loss",
        "held-out loss",
        "gradient norm",
        "learning rate",
        "guidance gap",
        "straightness",
        "few-step gap",
    )
    names = [svg["aria-label"] for svg in page.all("svg")]
    assert [name.partition(":")[0] for name in names] == [*labels, "loss by sigma", "change by sigma"]
    assert text.count("not finite, not applied") == 3  # in the table, and on the plots of loss and gradient norm
    assert "step 9: trained again from here without 1 sample" in text and "set/<b>odd</b> name.png" in text
    assert len(page.all("g", class_="mark")) == 2 * 3
    assert page.source.count('class="span"') == 6  # intervals of the held-out loss alone
    assert page.all("a", href="../metrics.jsonl")


@pytest.mark.parametrize("rows", [1, 2, 3000])
def test_short_and_long_runs(tmp_path, rows):
    """From the first row on; of a long run the page stays small."""
    made = run_rows(max(rows, 20))[:rows]
    page = write_run_page(write_run(tmp_path / "run", made))
    assert page.stat().st_size < 1_200_000
    lines = re.findall(r'<polyline points="([^"]*)"', page.read_text())
    assert max(len(line.split()) for line in lines) <= 200


def test_the_rows_of_a_long_run_are_not_kept(tmp_path):
    """What is in memory grows by the numbers that are drawn, 8 bytes each, and by no row; nor is each bad one listed."""
    made = run_rows(20)
    bins = len(next(row["sigma_loss"] for row in made if "sigma_loss" in row))
    bad = next(row for row in made if not row["applied"])

    def rows(count):
        for step in range(count):
            yield (bad if step % 10 == 0 else made[0]) | {"step": step + 1, "prompt": "x" * 400}

    def peak(count):
        tracemalloc.start()
        record = Record(rows(count))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(record.bad) == min(200, count // 10) and record.bad_count == count // 10 and record.last_step == count
        return most

    numbers = 2 * len(CURVES) + len(CURVES) + bins + 1
    assert peak(20_000) - peak(10_000) < 2 * 10_000 * 8 * numbers, "arrays grow by an eighth at a time, copied once"


def test_a_run_without_bins_or_meters(tmp_path):
    made = [{"step": 1, "loss": "inf", "lr": 0.0, "grad_norm": "inf", "applied": False, "not_finite": []}]
    page = Page(write_run_page(write_run(tmp_path / "run", made)))
    assert [svg["aria-label"].partition(":")[0] for svg in page.all("svg")] == ["learning rate"]
    assert "Bad steps" in page.text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", None, r"metrics\.jsonl: no row yet"),
        ("metrics.jsonl", '{"step": 1', r"metrics\.jsonl: no row yet"),
        ("metrics.jsonl", '{"step": 1}\n', r"metrics\.jsonl: the row of step 1 has no 'applied'"),
        ("recipe.json", None, r"recipe\.json' cannot be read as JSON: No such file"),
        ("recipe.json", "{", r"recipe\.json' cannot be read as JSON: Expecting"),
        ("recipe.json", "[]", r"recipe\.json' cannot be read as JSON: an object was expected"),
        ("recipe.json", '{"run": {"name": "a"}}', r"recipe\.json: damaged"),
    ],
)
def test_what_is_no_run_is_refused_by_name(tmp_path, file, content, message):
    run = write_run(tmp_path / "run", run_rows(20))
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    with pytest.raises(UserError, match=message):
        write_run_page(run)
    assert not (run / "report").exists()


def test_the_tool_takes_a_run_or_its_recipe(teacher_recipe, tmp_path, capsys):
    """The page of a real run, by its folder and by its recipe."""
    out = tmp_path / "run"
    assert main([str(teacher_recipe), "--set", f"run.out={out}", "--set", "validate.every=2"]) == 0
    capsys.readouterr()
    assert tool("report_run", out) == 0
    assert capsys.readouterr().err == f"done: {out / 'report' / 'index.html'}\n"
    page = (out / "report" / "index.html").read_bytes()
    assert b"4 of 4, finished" in page and b"held-out loss" in page and b"change by sigma" in page
    assert (
        tool("report_run", teacher_recipe, "--set", f"run.out={out}") == 0
        and (out / "report" / "index.html").read_bytes() == page
    )
    assert tool("report_run", tmp_path / "none.toml") == 2 and "none.toml" in capsys.readouterr().err
