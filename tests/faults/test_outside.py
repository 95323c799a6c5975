"""What goes wrong beside training: the logging service, memory, the clock, a second run in the same directory."""

import gc
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from ranks import run_ranks, start_ranks
from runs import arguments, differences, last_row, train
from tiny_recipes import ADAPTER

from dedistill.data import encode as prepare
from dedistill.errors import RUN_AGAIN, UserError
from dedistill.io.atomic import checksummed, read_checksummed
from dedistill.io.ownership import claim
from dedistill.objectives.base import Objective
from dedistill.recipe import load_recipe
from dedistill.runs import metrics
from dedistill.runs.checkpoint import list_checkpoints
from dedistill.runs.directory import RunDirectory
from dedistill.runs.metrics import Trackers
from dedistill.train import main

SETTINGS = ("checkpoint.every=2", "validate.every=99")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_model):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "recipe.toml").write_text(ADAPTER.format(out=folder, base=base_model))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def plain(recipe):
    return train(recipe, recipe.parent / "plain", *SETTINGS)


class Service:
    """What accelerate is to ``Trackers``, with a fault."""

    def __init__(self, fault: str):
        self.fault, self.logged = fault, 0

    def init_trackers(self, *_, **__):
        if self.fault == "refuses":
            raise ConnectionError("refused")
        if self.fault == "hangs at the start":
            time.sleep(600)

    def log(self, values, step):
        self.logged += 1
        if self.fault == "dies" and step == 3:
            raise BrokenPipeError("gone")
        if self.fault == "hangs" and step == 3:
            time.sleep(600)

    def end_training(self):
        if self.fault == "hangs at the end":
            time.sleep(600)


@pytest.mark.parametrize(
    ("fault", "logged"),
    [
        *[("", 2000), ("refuses", 0), ("dies", 3), ("hangs", 3), ("hangs at the end", 2000)],
        pytest.param("hangs at the start", 0, marks=pytest.mark.slow),
    ],
)
def test_no_call_of_the_logging_waits(monkeypatch, capsys, tmp_path, fault, logged):
    """Whatever the service does, a row costs next to nothing, and the end of a run little."""
    monkeypatch.setattr(metrics, "LAST_WORDS", 1.0)
    service, slowest = Service(fault), 0.0
    gc.collect()
    gc.freeze()  # what other tests have left would be walked through in the middle of a row
    trackers = Trackers(service, "run", {}, tmp_path)
    start = time.monotonic()
    for step in range(1, 2001):
        before = time.thread_time()
        trackers.log({"loss": 1.0, "sigma_loss": [1.0]}, step)
        slowest = max(slowest, time.thread_time() - before)
        if not fault or fault.endswith("end"):
            while trackers.rows.qsize() > 500:
                time.sleep(0.001)
    trackers.close()
    assert slowest < 0.05 and time.monotonic() - start < 10 and service.logged == logged
    said = capsys.readouterr().err
    assert ("is left alone" in said) == fault.startswith("hangs") and ("switched off" in said) == (fault in ("refuses", "dies"))
    assert ("too slow for" in said) == (fault in ("hangs at the start", "hangs")), said


def _online(given: list[str], port: int) -> int:
    os.environ |= {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    metrics.LAST_WORDS = 1.0
    return main(given)


@pytest.mark.parametrize("answers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_with_a_dead_service_is_the_same(recipe, plain, tmp_path, answers):
    """With wandb itself: a server that refuses, and one that takes the connection and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen()
        given = arguments(recipe, tmp_path / "run", *SETTINGS, "log.wandb=true")
        assert run_ranks(1, _online, given, server.getsockname()[1], said=tmp_path / "said") == [0]
    assert differences(plain, tmp_path / "run") == []


def test_a_loader_that_fails_ends_the_run_with_the_place_named(recipe, plain, tmp_path, monkeypatch, capsys):
    """Out of memory in the thread that loads; what was saved is gone on with."""
    real = Objective.noisy_batch

    def task(self, step, positions):
        if step == 4:
            raise MemoryError
        return real(self, step, positions)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "noisy_batch", task)
        assert main(arguments(recipe, tmp_path / "run", *SETTINGS)) == RUN_AGAIN
    assert "out of memory while loading positions [0, 1, 2, 3, 4, 5, 6, 7] of step 5" in capsys.readouterr().err
    assert [c.name for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002", "step-00000004"]
    assert differences(plain, train(recipe, tmp_path / "run", *SETTINGS)) == []


def test_memory_that_runs_out_at_a_image_costs_no_image(image_recipe, tmp_path, monkeypatch, capsys):
    """It is named, and encoded by the next start."""
    real, calls = prepare.apply_crop, []

    def crop(image, where):
        calls.append(0)
        if len(calls) == 5:
            raise MemoryError
        return real(image, where)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "apply_crop", crop)
        assert main(arguments(image_recipe, tmp_path / "run")) == RUN_AGAIN
    assert "out of memory while decoding 'photos/p" in capsys.readouterr().err
    assert main(arguments(image_recipe, tmp_path / "run")) == 0
    effects = json.loads((tmp_path / "run" / "plan.json").read_text())["effects"]
    assert (effects["images"], effects["quarantined"]) == (12, 0)


@pytest.mark.parametrize("clock", ["a day back", "ten years on", "stands still"])
def test_the_wall_clock_does_not_matter(recipe, plain, tmp_path, monkeypatch, clock):
    """In the middle of a run."""
    real, start = time.time, time.time()
    calls = []

    def now() -> float:
        calls.append(0)
        return (
            start
            if clock == "stands still"
            else real() + {"a day back": -86400, "ten years on": 3.2e8}[clock] * (len(calls) > 3)
        )

    monkeypatch.setattr(time, "time", now)
    assert differences(plain, train(recipe, tmp_path / "run", *SETTINGS, "run.stuck_after=20")) == [] and calls


def test_two_runs_in_one_directory(recipe, tmp_path, capsys):
    """The second refuses; when the first is killed, its lock is gone with it, whatever it has started."""
    given = arguments(recipe, tmp_path / "run", *SETTINGS)
    for _ in range(2):
        (holder,) = start_ranks(1, main, [*given, "--set", "train.steps=100000"], said=tmp_path / "said")
        at = last_row(tmp_path / "run")
        while last_row(tmp_path / "run") <= at + 2:
            time.sleep(0.02)
        assert main(given) == 1 and "another process is running in" in capsys.readouterr().err
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
    steps = int(list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name[5:]) + 2
    assert main([*given, "--set", f"train.steps={steps}"]) == 0 and last_row(tmp_path / "run") == steps
    assert Path(tmp_path / "run" / ".lock").exists()


def test_what_is_saved_next_needs_the_folder_that_was_opened(recipe, tmp_path):
    run = RunDirectory(load_recipe(recipe, [f"run.out={tmp_path / 'run'}"]))
    run.require()
    with run:
        run.require()
        run.path.rename(tmp_path / "other")
        with pytest.raises(UserError, match="was moved or removed while the run went on"):
            run.require()
        shutil.copytree(tmp_path / "other", run.path)
        with pytest.raises(UserError, match="was moved or removed"):
            run.require()
        shutil.rmtree(run.path)
        (tmp_path / "other").rename(run.path)
        run.require()


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_run_whose_folder_goes_ends_and_makes_no_other(recipe, tmp_path, capsys, how):
    """Whatever is written next; a run that was moved is whole, and is gone on with from there."""
    run, real = tmp_path / "run", Objective.noisy_batch

    def task(self, step, positions):
        if step == 4 and not (tmp_path / "other").exists():
            while not (run / "checkpoints/step-00000002/manifest.json").exists():
                time.sleep(0.01)  # what is written next, not what is being written
            run.rename(tmp_path / "other")
            if how == "removed":
                shutil.rmtree(tmp_path / "other" / "checkpoints")
            if how == "replaced":
                run.mkdir()
                (run / ".lock").touch()
        return real(self, step, positions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "noisy_batch", task)
        assert main(arguments(recipe, run, *SETTINGS)) == 1
    said = capsys.readouterr().err  # a save may be under way
    ends = [f"'{run}' was moved or removed while the run went on", "No such file or directory", "does not read back as written"]
    assert any(end in said for end in ends)
    assert not run.exists() or [p.name for p in run.iterdir()] == [".lock"]
    if how == "moved":
        assert main(arguments(recipe, tmp_path / "other", *SETTINGS)) == 0


class Gone:
    """A terminal that was closed, or a log on a full disk."""

    encoding, errors = "utf-8", "strict"

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")

    def isatty(self):
        return False


def test_a_terminal_that_is_gone_ends_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(arguments(recipe, tmp_path / "run", *SETTINGS)) == 0
    monkeypatch.undo()
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_previews_that_cannot_be_written_end_nothing(recipe, tmp_path, capsys):
    """A file stands where their folder is to be."""
    claim(tmp_path / "run", "run", "run.out")
    (tmp_path / "run" / "previews").write_text("")
    preview = ("preview.every=2", "preview.prompts=['one two']", "preview.cfgs=[1]", "sample.steps=2")
    assert main(arguments(recipe, tmp_path / "run", *SETTINGS, *preview)) == 0
    assert f"cannot write '{tmp_path / 'run' / 'previews'}'" in capsys.readouterr().err


def test_lost_checkpoints_are_not_started_over(recipe, plain, tmp_path, capsys):
    """A run that was far has saved; without its checkpoints it is not begun anew in silence."""
    run = shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    rows = (run / "metrics.jsonl").read_bytes()
    assert main(arguments(recipe, run, *SETTINGS)) == 1
    assert "goes up to step 6, but there is no checkpoint" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == rows


def test_checkpoints_of_another_version_are_left_alone(recipe, plain, tmp_path, capsys):
    run = shutil.copytree(plain, tmp_path / "run")
    manifests = [c / "manifest.json" for c in list_checkpoints(run / "checkpoints")]
    for manifest in manifests:
        manifest.write_bytes(checksummed(read_checksummed(manifest) | {"schema": 1}))
    assert main(arguments(recipe, run, *SETTINGS)) == 1
    assert "of another version of dedistill (schema 1, here 2)" in capsys.readouterr().err
    assert all(m.is_file() for m in manifests)
