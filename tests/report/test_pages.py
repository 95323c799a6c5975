"""The pages read back: every image and cell is there, nothing leaves the folder, hostile prompts stay text."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from dedistill.errors import UserError
from dedistill.report.plots import line_plot
from dedistill.report.story import write_story_page
from dedistill.report.sweep import write_sweep_page

HOSTILE = '<script>alert("x")</script> & "quoted" \'odd\''
PROMPTS = ["3 seven", HOSTILE, "3 seven"]  # the same text twice, as with 256 random digits
NAMES = ["teacher", "student/#1 %", "dedistilled"]
CFGS = [1.0, 2.5, 4.0]
NUMBERS = [
    {"key": "accuracy", "label": "accuracy", "better": "high", "help": "Share of digits read as asked."},
    {"key": "frechet", "label": "Fréchet", "better": "low", "help": "Distance from real images."},
    {"key": "detail", "label": "detail", "better": None, "help": "Mean step between pixels."},
]


class Page(HTMLParser):
    """All elements with their attributes, and the text of the page outside scripts and styles."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self.stack = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_data(self, data):
        if not self.stack:
            self.text.append(data)

    def all(self, tag, **attributes):
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def write_sweep(folder, skips=(0,), seeds=(0,), prompts=PROMPTS, size=(8, 16), mode="L"):
    """A sweep of random images with round numbers."""
    generator = np.random.default_rng(0)
    index, cells = [], []
    for n, name in enumerate(NAMES):
        for cfg in CFGS:
            for skip in skips:
                folder_name = f"images/{n} #{n}/cfg{cfg:g}_skip{skip}"
                (folder / folder_name).mkdir(parents=True)
                for i, prompt in enumerate(prompts):
                    for seed in seeds:
                        file = f"{folder_name}/p{i:03d}_s{seed}.png"
                        pixels = generator.integers(0, 255, (size[1], size[0]), dtype=np.uint8)
                        Image.fromarray(pixels).convert(mode).save(folder / file)
                        entry = {"file": file, "candidate": name, "cfg": cfg, "skip": skip, "steps": 16, "prompt": prompt}
                        index.append({**entry, "seed": seed, "saturated": 0.004, "correct": [1.0, 0.5, 0.0][i % 3]})
                numbers = {"accuracy": 0.1 * n + cfg / 10, "frechet": 3 + 7 * cfg, "detail": 0.12}
                cells.append({"candidate": name, "cfg": cfg, "skip": skip, "steps": 16, "images": 256, **numbers})
    settings = {"solver": "euler", "images": 256, "note": "<b>bold</b>"}
    scores = {"title": "A sweep & more", "settings": settings, "numbers": NUMBERS, "cells": cells}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "scores.json").write_text(json.dumps(scores))
    return cells


def check_links(page: Page, folder: Path) -> None:
    """Every image and link exists; nothing points to a network or to script."""
    images = [image for image in page.all("img") if "src" in image]
    assert images
    for image in images:
        assert (folder / unquote(image["src"])).is_file()
        assert image["alt"]
    for link in page.all("a"):
        assert (folder / unquote(link["href"])).is_file()
    assert not [a for t, a in page.elements if t == "script" and "src" in a]
    assert [a["href"] for a in page.all("link")] == ["data:,"]
    plain = page.source.replace("http://www.w3.org/2000/svg", "")
    assert "http://" not in plain and "https://" not in plain and "fetch(" not in plain and "@import" not in plain


def rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_sweep_page_holds_every_image_cell_and_curve(tmp_path):
    cells = write_sweep(tmp_path)
    path = write_sweep_page(tmp_path)
    assert path == tmp_path / "index.html"
    page = Page(path)
    check_links(page, tmp_path)
    assert len({a["href"] for a in page.all("a", class_="shot")}) == len(NAMES) * len(CFGS) * len(PROMPTS)
    assert len(page.all("svg")) == len(NUMBERS)
    assert len(page.all("polyline")) == len(NUMBERS) * len(NAMES)
    values = [field["data-value"] for field in page.all("td") if "data-value" in field]
    per_row = 4 + len(NUMBERS)  # candidate, cfg, steps, images; no column for a skip that is always 0
    rows = [values[i : i + per_row] for i in range(0, len(values), per_row)]
    assert [(row[0], float(row[1]), float(row[4])) for row in rows] == [
        (c["candidate"], c["cfg"], c["accuracy"]) for c in cells
    ]
    assert len([radio for radio in page.all("input") if radio["data-kind"] == "candidate"]) == len(NAMES)
    assert not [radio for radio in page.all("input") if radio["data-kind"] == "skip"]


def test_hostile_text_stays_text(tmp_path):
    write_sweep(tmp_path)
    page = Page(write_sweep_page(tmp_path))
    assert "<script>alert" not in page.source and "<b>" not in page.source
    assert any(HOSTILE in text for text in page.text)
    assert page.all("a", data_prompt=HOSTILE)
    assert len(page.all("script")) == 2  # the two of base.html.j2


def test_captions_tell_candidate_scale_skip_seed_and_numbers(tmp_path):
    write_sweep(tmp_path)
    shot = Page(write_sweep_page(tmp_path)).all("a", class_="shot")[1]
    assert shot["data-where"] == "teacher, CFG 2.5, skip 0, 16 steps, seed 0"
    assert shot["data-numbers"] == "This image: saturated 0.004, correct 1"


def test_a_misread_image_says_so_without_colour(tmp_path):
    write_sweep(tmp_path)
    page = Page(write_sweep_page(tmp_path))
    alts = [image["alt"] for image in page.all("img") if "src" in image]
    assert sum(alt.endswith(", misread") for alt in alts) == len(alts) // 3
    assert sum(alt.endswith(", partly misread") for alt in alts) == len(alts) // 3
    assert page.all("span", class_="wrong", style="width: 50%")


def test_several_skips_get_a_selector_sheets_and_one_axis(tmp_path):
    cells = write_sweep(tmp_path, skips=(0, 2))
    page = Page(write_sweep_page(tmp_path))
    assert {radio["value"] for radio in page.all("input") if radio["data-kind"] == "skip"} == {"0", "2"}
    assert len(page.all("polyline")) == len(NUMBERS) * len(NAMES) * 2
    assert len([a for _, a in page.elements if a.get("data-candidate")]) == len(NAMES) * 2
    assert len([field for field in page.all("td") if "data-value" in field]) == len(cells) * (5 + len(NUMBERS))
    assert len(list((tmp_path / "sheets").iterdir())) == len(NAMES) * 2
    assert (tmp_path / "sheets" / "teacher_skip2.png").is_file()


def test_sheets_have_one_row_per_prompt(tmp_path):
    write_sweep(tmp_path)
    write_sweep_page(tmp_path)
    sheets = sorted((tmp_path / "sheets").iterdir())
    assert [sheet.name for sheet in sheets] == ["dedistilled.png", "student_1.png", "teacher.png"]
    with Image.open(sheets[0]) as sheet:  # 8 x 16 images are enlarged to 64 x 128
        assert sheet.width > len(CFGS) * 64 and len(PROMPTS) * 128 < sheet.height < len(PROMPTS) * 128 + 140


@pytest.mark.parametrize(("shown", "seeds", "rows"), [(2, (0, 1), 4), (2, (0, 1, 2), 2), (8, (0, 1), 6), (1, (5,), 1)])
def test_only_the_first_prompts_appear_and_all_seeds_when_few(tmp_path, shown, seeds, rows):
    write_sweep(tmp_path, seeds=seeds)
    page = Page(write_sweep_page(tmp_path, shown=shown))
    assert len(page.all("a", class_="shot")) == rows * len(CFGS) * len(NAMES)


@pytest.mark.parametrize(("size", "tiny"), [((8, 16), True), ((32, 32), True), ((128, 128), False)])
def test_small_images_keep_hard_pixels(tmp_path, size, tiny):
    write_sweep(tmp_path, size=size, mode="RGB", prompts=["a"])
    page = Page(write_sweep_page(tmp_path))
    tables = [a["class"] for a in page.all("table") if "gallery" in a["class"]]
    assert all(("tiny" in names.split()) is tiny for names in tables)
    assert page.all("img", width=str(size[0]), height=str(size[1]))


def test_missing_cells_images_and_values_leave_gaps(tmp_path):
    write_sweep(tmp_path, skips=(0, 2))
    gone = lambda entry: entry["candidate"] == "teacher" and entry["skip"] == 2  # noqa: E731
    rewrite(tmp_path / "index.json", lambda index: index.__setitem__(slice(None), [e for e in index[1:] if not gone(e)]))

    def change(scores):
        scores["cells"] = [cell for cell in scores["cells"] if not gone(cell)]
        scores["cells"][0] |= {"accuracy": None, "frechet": float("nan")}

    rewrite(tmp_path / "scores.json", change)
    page = Page(write_sweep_page(tmp_path))
    check_links(page, tmp_path)
    assert page.all("span", class_="gap")
    assert any("no images of teacher" in text for text in page.text)
    assert "nan" not in "".join(page.text).lower()


@pytest.mark.parametrize("file", ["index.json", "scores.json"])
@pytest.mark.parametrize("content", [None, "", "{broken", "3", "[]", '[{"file": 1}]', '{"title": "t"}'])
def test_broken_files_are_the_users_to_mend(tmp_path, file, content):
    write_sweep(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=file):
        write_sweep_page(tmp_path)


@pytest.mark.parametrize(("file", "what"), [("index.json", "image 0"), ("scores.json", "cells 0")])
def test_steps_that_are_not_counted_are_refused(tmp_path, file, what):
    """They need not be there, as in sweeps of earlier versions."""
    write_sweep(tmp_path)
    first = lambda table: table[0] if isinstance(table, list) else table["cells"][0]  # noqa: E731
    rewrite(tmp_path / file, lambda table: first(table).update(steps="8"))
    with pytest.raises(UserError, match=f"{what}: 'steps' is missing or has the wrong type"):
        write_sweep_page(tmp_path)


@pytest.mark.parametrize("gone", ["steps", "images"])
@pytest.mark.parametrize(("file", "what"), [("index.json", "image 1"), ("scores.json", "cells 1")])
def test_an_amount_that_only_some_have_is_a_hole(tmp_path, file, what, gone):
    write_sweep(tmp_path)

    def change(table):
        entries = table if isinstance(table, list) else table["cells"]
        for entry in entries:
            entry[gone] = 4
        del entries[1][gone]

    rewrite(tmp_path / file, change)
    with pytest.raises(UserError, match=f"{file}: {what}: '{gone}' is missing"):
        write_sweep_page(tmp_path)


@pytest.mark.parametrize("file", ["../secret.png", "/etc/secret.png", "images/none.png", "scores.json"])
def test_a_image_outside_missing_or_broken_is_refused(tmp_path, file):
    write_sweep(tmp_path)
    rewrite(tmp_path / "index.json", lambda index: index[0].update(file=file))
    with pytest.raises(UserError, match=Path(file).name):
        write_sweep_page(tmp_path)


def test_an_unknown_direction_is_refused(tmp_path):
    write_sweep(tmp_path)
    rewrite(tmp_path / "scores.json", lambda scores: scores["numbers"][0].update(better="up"))
    with pytest.raises(UserError, match=r"accuracy.*up"):
        write_sweep_page(tmp_path)


def story_of(folder):
    """A story whose images lie in a sweep next to it."""
    write_sweep(folder / "sweep")
    write_sweep_page(folder / "sweep")
    index = json.loads((folder / "sweep" / "index.json").read_text())
    images = {
        name: {
            f"{cfg:g}": ["../sweep/" + e["file"] for e in index if (e["candidate"], e["cfg"]) == (name, cfg)] for cfg in CFGS
        }
        for name in NAMES
    }
    one = {"accuracy": 0.512, "frechet": 12.5, "precision": 0.9, "saturated": 0.02}
    return {
        "title": "A <story>",
        "lead": "What happened.",
        "models": NAMES,
        "labels": {"teacher": "The teacher"},
        "cfgs": CFGS,
        "summary": {name: {"fm_loss": 0.1832, "fm_loss_se": 0.0011, "cfg": {f"{c:g}": one for c in CFGS}} for name in NAMES},
        "checks": [
            {"text": "one <holds>", "value": "+.29", "bound": "> .15", "ok": True},
            {"text": "another fails", "value": "-.1", "bound": "> 0", "ok": False},
        ],
        "images": images,
        "prompts": PROMPTS,
        "sweep_link": "../sweep/index.html",
        "commands": ["dedistill train <recipe>"],
    }


def test_story_page(tmp_path):
    story = story_of(tmp_path)
    page = Page(write_story_page(tmp_path / "story", story))
    check_links(page, tmp_path / "story")
    text = "".join(page.text)
    assert len(page.all("a", class_="shot")) == len(NAMES) * len(CFGS) * len(PROMPTS)
    assert len(page.all("polyline")) == 4 * len(NAMES)
    assert len(page.all("li", class_="passed")) == len(page.all("li", class_="failed")) == 1
    assert text.count("0.512") >= len(NAMES) * len(CFGS)
    for expected in ("The teacher", "one <holds>", "+.29", "> .15", "0.1832 ± 0.0011", "dedistill train <recipe>", HOSTILE):
        assert expected in text
    assert "<script>alert" not in page.source


def test_story_without_judge_checks_and_some_images(tmp_path):
    story = story_of(tmp_path)
    for key in ("checks", "labels", "sweep_link", "commands"):
        del story[key]
    story["summary"] = {name: {"cfg": {"1.0": {"saturated": 0.02}}} for name in NAMES}  # "1.0" as str(float) writes it
    story["images"] = {"teacher": story["images"]["teacher"]}
    page = Page(write_story_page(tmp_path / "story", story))
    assert len(page.all("polyline")) == len(NAMES)
    assert len(page.all("a", class_="shot")) == len(CFGS) * len(PROMPTS)


@pytest.mark.parametrize("key", ["title", "models", "summary", "images", "prompts"])
def test_an_incomplete_story_is_refused(tmp_path, key):
    story = story_of(tmp_path)
    del story[key]
    with pytest.raises(UserError, match=key):
        write_story_page(tmp_path / "story", story)


def test_story_names_the_row_that_lacks_images(tmp_path):
    story = story_of(tmp_path)
    story["images"]["teacher"]["1"].pop()
    with pytest.raises(UserError, match="teacher at CFG 1 has 2 images for 3 prompts"):
        write_story_page(tmp_path / "story", story)


class Svg(Page):
    """The same parser over a plot."""

    def __init__(self, source):
        HTMLParser.__init__(self)
        self.elements, self.text, self.stack, self.source = [], [], [], source
        self.feed(source)


def plot(series, **options):
    return Svg(line_plot(series, title="A & b", xlabel="CFG", ylabel="y <unit>", **options))


def test_plot_has_a_line_marker_dash_and_tooltips_per_series():
    svg = plot({name: [(1, 0.5), (2, 0.25), (4, i)] for i, name in enumerate(["a", "b<", "c", "d"])})
    lines = svg.all("polyline")
    assert len(lines) == 4
    assert len({line.get("stroke-dasharray") for line in lines}) == 4
    assert len({path["d"] for path in svg.all("path", class_="marker")}) == 4
    assert "a, CFG 2: 0.25" in svg.text and "b<, CFG 2: 0.25" in svg.text and "A & b" in svg.text


def test_plot_puts_larger_values_higher_and_inside_the_frame():
    svg = plot({"a": [(3, 9.0), (1, 1.0), (2, 4.0)]})
    points = [tuple(map(float, point.split(","))) for point in svg.all("polyline")[0]["points"].split()]
    width, height = map(float, svg.all("svg")[0]["viewbox"].split()[2:])
    assert points == sorted(points) and points[0][1] > points[1][1] > points[2][1]
    assert all(0 < x < width and 0 < y < height for x, y in points)


def test_plot_on_a_logarithmic_axis_spaces_factors_evenly():
    svg = plot({"a": [(1, 1.0), (2, 10.0), (3, 100.0), (4, 0.0)]}, log_y=True)
    heights = [float(point.split(",")[1]) for point in svg.all("polyline")[0]["points"].split()]
    assert len(heights) == 3  # zero has no place on this axis
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("values", [[5.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 1e-9], [-3.0, 7e6], [None, float("nan"), 1.0]])
def test_plot_survives_odd_values(values, log_y):
    svg = plot({"a": list(enumerate(values))}, log_y=log_y)
    assert "nan" not in svg.source and "inf" not in svg.source


def test_an_empty_series_keeps_the_colours_of_the_others():
    full, partial = plot({"a": [(1, 1)], "b": [(1, 2)]}), plot({"a": [], "b": [(1, 2)]})
    assert len(partial.all("polyline")) == 1
    assert full.all("g", class_="series s1") and partial.all("g", class_="series s1")
    assert "no values" in plot({"a": []}).text


def test_a_shared_range_makes_plots_comparable():
    ranged = [plot({"a": [(1, y)]}, y_range=(0, 10)) for y in (0, 10)]
    ticks = [[text for text in svg.text if text.strip().replace(".", "").isdigit()] for svg in ranged]
    assert ticks[0] == ticks[1]


def test_measured_places_have_round_ticks():
    """An axis of places that were chosen shows these; of places that were measured, round numbers."""
    line = {"a": [(0.0113, 1.0), (0.0187, 1.0), (0.0489, 1.0)]}
    texts = [{text.strip() for text in plot(line, round_x=choice).text} for choice in (False, True)]
    assert {"0.0113", "0.0187"} <= texts[0] and {"0.02", "0.04"} <= texts[1] and "0.0113" not in texts[1]


def test_twelve_lines_all_look_different():
    svg = line_plot({f"line {i}": [(0, i), (1, i)] for i in range(12)}, title="t", xlabel="x", ylabel="y")
    lines = re.findall(r'<g class="series.*?</g>', svg, flags=re.S)
    dashes = [
        (re.search(r'stroke="([^"]+)"', s)[1], (re.search(r'stroke-dasharray="([^"]+)"', s) or [0, ""])[1]) for s in lines
    ]
    assert len(lines) == 12 and len(set(dashes)) == 12
