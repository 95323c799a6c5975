"""A process that hangs ends within a stated time, with all its stacks written; a slow one goes on."""

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest
from losses import in_training
from ranks import run_ranks, start_ranks
from runs import arguments, last_row
from tiny_recipes import ADAPTER

from dedistill.data.images.index import Index
from dedistill.errors import RUN_AGAIN
from dedistill.objectives.base import Objective
from dedistill.train import main
from dedistill.training import watchdog_process
from dedistill.training.watchdog import PATIENCE

LIMIT = 2.0
SETTINGS = ("checkpoint.every=100", "snapshot.every=0", "validate.every=100", f"run.stuck_after={LIMIT}")
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, base_model):
    folder = tmp_path_factory.mktemp("stuck")
    (folder / "recipe.toml").write_text(ADAPTER.format(out=folder, base=base_model))
    return folder / "recipe.toml"


def children(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for(condition, seconds: float = 30) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - start


def written(run: Path, rank: int = 0) -> str:
    """The stacks, which come a moment after the end."""
    file = run / f"stacks-rank-{rank}.txt"
    wait_for(lambda: file.exists() and file.stat().st_size > 0, 3)
    return file.read_text()


def seconds_to_end(ranks) -> float:
    return wait_for(lambda: not any(p.is_alive() for p in ranks), PATIENCE * LIMIT + 20)


def locked() -> None:
    """A deadlock in C, with the interpreter's lock held."""
    mutex, c = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    c.pthread_mutex_lock(mutex)
    c.pthread_mutex_lock(mutex)


def _stuck(given: list[str], how: str) -> int:
    """``main``, where something hangs in the fourth step."""
    sleep = {"asleep": lambda: time.sleep(600), "holding the interpreter": locked}
    if how == "loading":
        real = Objective.noisy_batch
        Objective.noisy_batch = lambda self, step, positions: time.sleep(600) if step == 3 else real(self, step, positions)
    else:
        calls = []

        def loss(real, model, task):
            calls.append(0)
            if len(calls) == 4:
                sleep[how]()
            return real(model, task)

        Objective.loss = in_training(loss)
    return main(given)


@pytest.mark.parametrize(
    ("how", "code", "seen"),
    [
        ("asleep", RUN_AGAIN, "in step 4, while training"),
        ("loading", RUN_AGAIN, "in step 3, while waiting for data"),  # made together with what step 4 gets
        pytest.param("holding the interpreter", -signal.SIGKILL, "in step 4, while training", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_hangs_ends_with_its_stacks(recipe, tmp_path, how, code, seen):
    (process,) = ranks = start_ranks(1, _stuck, arguments(recipe, tmp_path / "run", *SETTINGS), how, said=tmp_path / "said")
    wait_for(lambda: last_row(tmp_path / "run") >= 2)
    took = seconds_to_end(ranks)
    stacks = written(tmp_path / "run")
    assert process.exitcode == code and 0.9 * LIMIT < took < LIMIT + watchdog_process.GRACE + 4
    assert f"watchdog: rank 0: no sign of life for 2 s, {seen}" in stacks
    assert "test_stuck.py" in stacks and "trainer.py" in stacks


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_is_stopped_takes_all_with_it(recipe, tmp_path, rank):
    """SIGSTOP, not SIGKILL: no connection breaks."""
    given = arguments(recipe, tmp_path / "run", *SETTINGS, "train.steps=100000")
    ranks = start_ranks(2, main, given, said=tmp_path / "said")
    wait_for(lambda: last_row(tmp_path / "run") > 5)
    os.kill(ranks[rank].pid, signal.SIGSTOP)
    took = seconds_to_end(ranks)
    assert took < LIMIT + watchdog_process.GRACE + 3 and [p.exitcode for p in ranks] == [RUN_AGAIN] * 2
    assert "Thread" in written(tmp_path / "run", rank)


def test_a_process_that_is_killed_takes_all_with_it(recipe, tmp_path):
    given = arguments(recipe, tmp_path / "run", *SETTINGS, "train.steps=100000")
    ranks = start_ranks(2, main, given, said=tmp_path / "said")
    wait_for(lambda: last_row(tmp_path / "run") > 5)
    (beside,) = children(ranks[1].pid)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert seconds_to_end(ranks) < 3 and [p.exitcode for p in ranks] == [RUN_AGAIN, -signal.SIGKILL]
    wait_for(lambda: not Path(f"/proc/{beside}").exists() or "Z" in Path(f"/proc/{beside}/stat").read_text().split()[2], 3)


def _slow(given: list[str]) -> int:
    """``main``, where every step takes at least twenty times what it should."""
    Objective.loss = in_training(lambda real, model, task: (time.sleep(0.6), real(model, task))[1])
    return main(given)


def test_a_slow_process_goes_on(recipe, tmp_path):
    """Slower than the limit in all, and each step slow; nobody is ended."""
    given = arguments(recipe, tmp_path / "run", *SETTINGS, "train.steps=5")
    start = time.monotonic()
    assert run_ranks(2, _slow, given, said=tmp_path / "said") == [0, 0], (tmp_path / "said" / "0").read_text()
    assert time.monotonic() - start > LIMIT and not list((tmp_path / "run").glob("stacks*"))


def test_a_decode_that_hangs(image_recipe, tmp_path, monkeypatch):
    """In a thread of its own; the image's reader is in the stacks."""
    monkeypatch.setattr(Index, "image", lambda self, i: time.sleep(600))
    given = arguments(image_recipe, tmp_path / "run", f"run.stuck_after={LIMIT}")
    assert run_ranks(1, main, given, said=tmp_path / "said") == [RUN_AGAIN]
    stacks = written(tmp_path / "run")
    assert "while decoding images" in stacks and "in pixels" in stacks


def test_nothing_is_left_behind(recipe, tmp_path):
    before = children(os.getpid())
    assert main(arguments(recipe, tmp_path / "run", *SETTINGS)) == 0
    assert children(os.getpid()) == before and not list((tmp_path / "run").glob("stacks*"))
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


def test_without_a_limit_there_is_no_watchdog(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: 1 / 0)
    assert main(arguments(recipe, tmp_path / "run", *SETTINGS, "run.stuck_after=0")) == 0
