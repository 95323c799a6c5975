"""Stops of a run that a launcher started: whoever gets the signal, the step is finished and saved, and all of it ends."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dedistill.engine.checkpoint import damage, list_checkpoints
from dedistill.engine.launcher import resume_command
from dedistill.train import main

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": PATH}


def launch(recipe: Path, *arguments: str, out: Path) -> subprocess.Popen:
    """``accelerate launch`` in a process group of its own, as a terminal starts it; its messages go to ``out``."""
    options = ["--quiet", "--config_file", str(ROOT / "launch" / "cpu.yaml"), "--num_cpu_threads_per_process", "1"]
    command = ["accelerate", "launch", *options, "-m", "dedistill.train", str(recipe), *arguments]
    with open(out, "w") as said:
        return subprocess.Popen(command, stderr=said, stdout=said, env=ENVIRONMENT, start_new_session=True)


def wait_for(condition, seconds: float = 60) -> None:
    for _ in range(int(20 * seconds)):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def alive(group: int) -> bool:
    """Whether any process of the group runs; zombies that nobody reaps do not count."""
    stats = [p.read_text().rpartition(")")[2].split() for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
    return any(int(fields[2]) == group and fields[0] != "Z" for fields in stats)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGINT, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow)]
)
def test_a_signal_to_the_launcher_saves_and_ends_everything(adapter_recipe, tmp_path, number, whole_group):
    """T4: Ctrl-C reaches the group; a SIGTERM to the launcher alone leaves training without a parent, which it notices."""
    said, run = tmp_path / "said", tmp_path / "dedistill"
    process = launch(adapter_recipe, "--set", "train.steps=100000", "--set", "checkpoint.every=0", out=said)
    journal = run / "metrics.jsonl"
    wait_for(lambda: journal.exists() and journal.stat().st_size > 1000)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    assert process.wait(timeout=60) != 0
    wait_for(lambda: not alive(process.pid))
    (saved,) = list_checkpoints(run / "checkpoints")
    assert damage(saved) == "" and f"stopped and saved at step {int(saved.name[5:])}" in said.read_text()
    again = next(line.strip() for line in said.read_text().splitlines() if line.startswith("  accelerate launch"))
    assert shlex.split(again) == process.args
    assert main([str(adapter_recipe), "--set", f"train.steps={int(saved.name[5:]) + 1}"]) == 0


def test_without_a_launcher_the_command_has_none(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert resume_command(["a b.toml"]) == "python -m dedistill.train 'a b.toml'"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as another launcher than the parent process would have it
    assert resume_command(["a.toml"]) == "accelerate launch -m dedistill.train a.toml"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_demo_stops_its_job_and_waits(tmp_path, number):
    """T4: the demo script itself, with the installation left out."""
    for name in ("launch", "recipes", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    setup = 'set -euo pipefail\ncd "$(dirname "${BASH_SOURCE[0]}")/.."\nexport OMP_NUM_THREADS=1\n'
    (tmp_path / "launch" / "setup.sh").write_text(setup)
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            ["bash", "launch/demo.sh"], cwd=tmp_path, stderr=said, stdout=said, env=ENVIRONMENT, start_new_session=True
        )
    journal = tmp_path / "runs/digits/teacher/metrics.jsonl"
    wait_for(lambda: journal.exists() and journal.stat().st_size > 1000)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert children and not any(alive(int(child)) for child in children)
    (saved,) = list_checkpoints(tmp_path / "runs/digits/teacher/checkpoints")
    said = (tmp_path / "said").read_text()
    assert damage(saved) == "" and "continue with: bash launch/demo.sh digits" in said and "Traceback" not in said
