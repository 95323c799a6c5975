"""Evaluating on a few images of one's own: which prompts are asked, what is said of them, and what is refused at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from image_files import write_image

from dedistill.cli.main import main

ROOT = Path(__file__).parent.parent.parent


def write(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        write_image(folder / f"{i:02d}.png", 96, 80, i)
        (folder / f"{i:02d}.txt").write_text(f"a red house {i}")
    return folder


def command(*arguments: str) -> tuple[int, str, float]:
    """Exit code, what was said, and seconds of work of a process of its own that could not have loaded torch unseen."""
    code = """import sys, time
started = time.process_time()
from dedistill.cli.main import main
rc = main(sys.argv[1:])
print("seconds", time.process_time() - started, file=sys.stderr)
print("loaded", [m for m in ("torch", "diffusers", "transformers") if m in sys.modules], file=sys.stderr)
sys.exit(rc)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    *said, seconds, loaded = done.stderr.splitlines()
    assert loaded == "loaded []", done.stderr
    return done.returncode, "\n".join(said), float(seconds.split()[1])


@pytest.mark.parametrize(
    ("images", "arguments", "count"),
    [
        (5, [], "5 different prompts are"),
        (20, ["--prompts", "15"], "15 different prompts are"),
        (3, ["--set", "preview.prompts=['a', 'b']", "--set", "preview.every=1"], "5 different prompts are"),
        (20, ["--prompts", "few.txt"], "1 different prompt is"),
    ],
)
def test_too_few_prompts_are_refused_before_anything_is_loaded(image_recipe, tmp_path, monkeypatch, images, arguments, count):
    folder = write(tmp_path / "few", images)
    (tmp_path / "few.txt").write_text("the same\nthe same\n")
    monkeypatch.chdir(tmp_path)
    rc, said, seconds = command("evaluate", str(image_recipe), "--set", f"data.sets.0.path={folder}", *arguments)
    assert rc == 2 and f"--prompts: {count} too few to choose by; at least 16 are needed" in said
    assert "--prompts prompts.txt" in said and "preview.prompts" in said and seconds < 4, "about 1 s"


@pytest.mark.parametrize("count", ["100001", "1" + "0" * 5000])
def test_a_number_of_prompts_that_no_memory_holds_is_refused(count, capsys):
    assert main(["evaluate", "dedistill:digits/dedistill", "--prompts", count]) == 2
    assert "more than the 100,000 that are asked at most" in capsys.readouterr().err


def test_few_digits_are_refused_as_early():
    rc, said, _ = command("evaluate", "dedistill:digits/dedistill", "--prompts", "4")
    assert rc == 2 and "4 different prompts are too few to choose by" in said


def test_evaluate_on_twenty_images(image_recipe, tmp_path, capsys):
    """Held-out captions first, then prompts of previews, then captions that were trained on, each named and counted."""
    settings = [f"data.sets.0.path={write(tmp_path / 'twenty', 20)}", "preview.prompts=['a blue cat']", "preview.every=9"]
    settings.append("train.batch=16")  # as many images are made at once
    changed = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", str(image_recipe), *changed]) == 0
    capsys.readouterr()
    options = ["--candidates", "base", "last", "--samples", "16", "--cfg", "1", "2", "--steps", "1", "--prompts", "24"]
    assert main(["evaluate", str(image_recipe), *changed, *options]) == 0
    said = capsys.readouterr()
    wanted = "24, 21 of them different: 4 of held-out images, 1 of preview.prompts, 16 of captions that were trained on"
    assert said.err.count(wanted) == 1
    assert "16 prompts are captions that were trained on" in said.out and "Measured on 4 held-out images" in said.out
    kept = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())
    html = (tmp_path / "run/evaluation/index.html").read_text()
    assert len(kept["cautions"]) >= 2 and all(words in html for words in kept["cautions"])
    assert "is lowest, on too few images" in html and "last is best" not in html, "four images are no verdict"
    assert "bootstraps" not in html and "of the choice" not in html, "nothing is said of what is not there"
    scores = json.loads((tmp_path / "run/evaluation/sweep/scores.json").read_text())
    assert scores["settings"]["prompts"] == "24, 21 of them different, 16 of these trained on"
    measured = json.loads((tmp_path / "run/evaluation/distillation/distillation.json").read_text())
    options = ["--count", "30", "--steps", "1", "--points", "1", "--out", str(tmp_path / "pairs")]
    assert main(["pairs", str(image_recipe), *changed, *options]) == 0
    assert "prompts: 30, 16 of them different; those that come again do so from other noise" in capsys.readouterr().err
    assert measured["settings"]["prompts"] == scores["settings"]["prompts"] and measured["distinct_prompts"] == 21
