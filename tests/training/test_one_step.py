"""How much of the package one must read to understand an ordinary step: what runs in it is counted, in all threads."""

import sys
import threading
from pathlib import Path

import pytest

import dedistill
from dedistill.train import main
from dedistill.training.trainer import Trainer

PACKAGE = Path(dedistill.__file__).parent
LIMITS = {"flux_recipe": (18, 79), "teacher_recipe": (19, 68)}
"""Files and functions."""
FLUX = """
[base]
quant = "int8"
[adapter]
kind = "lokr"
init = "perturbed_normal"
[[adapter.targets]]
preset = "blocks"
factor = 4
"""


class Seen:
    """Functions of the package that are called while ``watching``, as (file, name). What is defined inside a function, such
    as a comprehension, counts as that function."""

    def __init__(self):
        self.watching = False
        self.functions: set[tuple[str, str]] = set()

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if self.watching and event == "call" and code.co_filename.startswith(str(PACKAGE)):
            self.functions.add((code.co_filename.removeprefix(f"{PACKAGE}/"), code.co_qualname.partition(".<locals>")[0]))


def functions_of_a_step(recipe: Path, monkeypatch, *settings: str) -> set[tuple[str, str]]:
    """Those called, in the thread that trains and in the one that reads ahead, in eight steps in the middle of a run."""
    fit, seen = Trainer.fit, Seen()

    def watched(trainer, *arguments):
        for row in fit(trainer, *arguments):
            seen.watching = 16 <= row["step"] < 24
            yield row

    monkeypatch.setattr(Trainer, "fit", watched)
    threading.setprofile(seen)  # of threads that are still to be started
    sys.setprofile(seen)
    try:
        assert main([str(recipe), "--debug", *[word for s in settings for word in ("--set", s)]]) == 0
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return seen.functions


@pytest.fixture
def flux_recipe(image_recipe) -> Path:
    text = image_recipe.read_text()
    start, end = text.index("[adapter]"), text.index("[data]")
    image_recipe.write_text(text[:start] + FLUX.lstrip() + text[end:])
    return image_recipe


@pytest.mark.parametrize("recipe", LIMITS)
def test_an_ordinary_step_takes_few_files_and_functions(recipe, request, monkeypatch):
    settings = ["train.steps=40", "checkpoint.every=0", "snapshot.every=0", "validate.every=0", "data.caption_dropout=0.5"]
    found = functions_of_a_step(request.getfixturevalue(recipe), monkeypatch, *settings)
    files = {file for file, _ in found}
    listed = "\n".join(f"  {file}: {', '.join(sorted(n for f, n in found if f == file))}" for file in sorted(files))
    print(f"{recipe}: {len(files)} files, {len(found)} functions\n{listed}")
    assert {"training/trainer.py"} < files, "the step itself was watched"
    most_files, most_functions = LIMITS[recipe]
    assert len(files) <= most_files and len(found) <= most_functions, listed
