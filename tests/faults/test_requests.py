"""What a run is asked for, by signals and by files, in every phase."""

import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from harness import forked
from ranks import run_ranks
from runs import arguments, differences, quietly, train

from dedistill.data import encode as prepare
from dedistill.errors import RUN_AGAIN
from dedistill.evaluation.validation import Validator
from dedistill.objectives.base import Objective
from dedistill.runs.checkpoint import damage, list_checkpoints
from dedistill.train import main
from dedistill.training import keeping, preview
from dedistill.training.engine import Engine
from dedistill.training.keeping import AsyncCheckpointWriter

SETTINGS = ("checkpoint.every=4", "validate.every=2", "validate.samples=8")
PREVIEW = ("preview.every=2", "preview.prompts=['one two']", "preview.cfgs=[1]", "sample.steps=2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_model):
    from tiny_recipes import ADAPTER

    folder = tmp_path_factory.mktemp("requests")
    (folder / "recipe.toml").write_text(ADAPTER.format(out=folder, base=base_model))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def uninterrupted(recipe):
    return train(recipe, recipe.parent / "whole", *SETTINGS, *PREVIEW)


class Once:
    """Does something before the ``number``-th call of what it stands before."""

    def __init__(self, patch, owner, name: str, number: int, action):
        real, self.calls = getattr(owner, name), 0

        def called(*arguments, **options):
            self.calls += 1
            if self.calls == number:
                action()
            return real(*arguments, **options)

        patch.setattr(owner, name, called)


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def steps(run: Path) -> list[int]:
    return [int(p.name[5:]) for p in list_checkpoints(run / "checkpoints")]


# phase: whose method, which, at which call; the step that is saved
PHASES = {
    "step": (Engine, "backward", 2, 2),
    "loading": (Objective, "noisy_batch", 3, None),
    "validation": (Validator, "__call__", 2, 2),
    "inside a validation": (Objective, "loss", 4, 2),  # after the first validation and two steps
    "preview": (preview, "trajectories", 2, 3),
    "save": (AsyncCheckpointWriter, "start", 1, None),
    "writing": (keeping, "save_checkpoint", 1, None),
}


@pytest.mark.parametrize(
    ("phase", "number"),
    [("step", signal.SIGTERM), *zip(PHASES, itertools.cycle([signal.SIGINT, signal.SIGTERM]))],  # one handler takes both
)
def test_a_stop_in_any_phase_saves_and_the_next_run_is_exact(recipe, uninterrupted, tmp_path, monkeypatch, phase, number):
    owner, name, call, saved = PHASES[phase]
    with monkeypatch.context() as patch:
        Once(patch, owner, name, call, send(number))
        assert main(arguments(recipe, tmp_path / "run", *SETTINGS, *PREVIEW)) == RUN_AGAIN
    found = steps(tmp_path / "run")
    assert saved is None or found[-1] == saved, found
    assert all(damage(c) == "" for c in list_checkpoints(tmp_path / "run" / "checkpoints"))
    assert differences(uninterrupted, train(recipe, tmp_path / "run", *SETTINGS, *PREVIEW)) == []


@pytest.mark.parametrize("where", [(Validator, "__call__", 1), (Engine, "backward", 1), (preview, "trajectories", 1)])
def test_a_stop_before_anything_was_trained_ends_at_once(recipe, uninterrupted, tmp_path, monkeypatch, where, capsys):
    """The first validation, the first preview, the first batch: nothing is lost by ending there."""
    with monkeypatch.context() as patch:
        Once(patch, *where, send(signal.SIGTERM))
        assert main(arguments(recipe, tmp_path / "run", *SETTINGS, *PREVIEW)) == RUN_AGAIN
    assert steps(tmp_path / "run") == [] and "Traceback" not in capsys.readouterr().err
    assert differences(uninterrupted, train(recipe, tmp_path / "run", *SETTINGS, *PREVIEW)) == []


@pytest.mark.parametrize(("number", "size"), [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_signals_while_a_cache_is_encoded(image_recipe, tmp_path, monkeypatch, number, size):
    """What is encoded is kept, and not encoded again. A request to save has nothing to save and is no reason to end."""
    monkeypatch.setattr(prepare, "IMAGES_PER_SHARD", 2)
    real = prepare.Store.write

    def write(self, entries):
        real(self, entries)
        if os.environ.get("RANK", "0") == "0" and any("latent" in parts for parts in entries.values()):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(prepare.Store, "write", write)
    given = arguments(image_recipe, tmp_path / "run")
    codes = run_ranks(size, main, given, said=tmp_path / "said")
    shards = len(list((tmp_path / "cache" / "latents").glob("*.safetensors")))
    if number == signal.SIGUSR1:
        assert codes == [0] * size
        return
    assert codes == [RUN_AGAIN] * size and 1 <= shards <= 1 + 3 * (size - 1)
    monkeypatch.undo()
    assert run_ranks(size, main, given, said=tmp_path / "said") == [0] * size


def test_sigusr1_saves_and_goes_on(recipe, uninterrupted, tmp_path, monkeypatch):
    Once(monkeypatch, Engine, "backward", 3, send(signal.SIGUSR1))
    run = train(recipe, tmp_path / "run", *SETTINGS, *PREVIEW, "checkpoint.keep=9")
    assert steps(run) == [3, 4, 6] and differences(uninterrupted, run) == []


def test_a_second_signal_ends_at_once(recipe, tmp_path):
    """Also where a thread hangs that would be waited for."""

    def hang() -> None:
        send(signal.SIGTERM)()
        threading.Timer(1.0, send(signal.SIGTERM)).start()
        time.sleep(60)

    def action() -> None:
        real = Objective.noisy_batch
        Objective.noisy_batch = lambda self, step, positions: hang() if step == 3 else real(self, step, positions)
        main(arguments(recipe, tmp_path / "run", *SETTINGS))

    start = time.monotonic()
    assert os.waitstatus_to_exitcode(forked(quietly(action))) == RUN_AGAIN
    assert time.monotonic() - start < 30


def _touching(given: list[str], name: str, out: Path) -> int:
    """``main``, where someone touches a file in the run directory during the third step."""
    real = Engine.backward
    calls = []

    def backward(*arguments, **options):
        calls.append(0)
        if len(calls) == 3 and os.environ.get("RANK", "0") == "0":
            (out / name).touch()
        return real(*arguments, **options)

    Engine.backward = backward
    try:
        return main(given)
    finally:
        Engine.backward = real


@pytest.mark.parametrize(("name", "size"), [("stop", 1), ("stop", 2), ("save", 1), ("sample", 1), ("sample", 2)])
def test_files_in_the_run_directory(recipe, uninterrupted, tmp_path, name, size):
    """``until python -m dedistill.train RECIPE; do :; done`` is ended by ``touch RUN/stop``: its exit code is 0."""
    out, settings = tmp_path / "run", (*SETTINGS, *PREVIEW, "checkpoint.keep=9")
    given = arguments(recipe, out, *settings)
    codes = run_ranks(size, _touching, given, name, out, said=tmp_path / "said")
    said = (tmp_path / "said" / "0").read_text()
    assert codes == [0] * size, said
    assert steps(out) == {"stop": [3], "save": [3, 4, 6], "sample": [4, 6]}[name]
    assert not (out / name).exists()
    sheets = sorted(p.name for p in (out / "previews").glob("*.png"))
    assert ("step-00000003.png" in sheets) == (name == "sample")
    if name == "stop":
        assert "stopped and saved at step 3" in said
    if size == 1:  # sums over two processes round otherwise
        assert differences(uninterrupted, train(recipe, out, *settings)) == []


def test_files_from_before_the_start_are_removed_with_a_note(recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    train(recipe, tmp_path / "run", *SETTINGS)
    assert "/run/stop' was there before the start and is removed" in capsys.readouterr().err.replace("\n", "")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6] and not (tmp_path / "run" / "stop").exists()


def test_a_request_for_previews_without_any_says_so(recipe, tmp_path, capsys):
    code = _touching(arguments(recipe, tmp_path / "run", *SETTINGS), "sample", tmp_path / "run")
    assert code == 0 and "no [preview] table" in capsys.readouterr().err
