"""Stops of a run that a launcher started: whoever gets the signal, the step is finished and saved, and all of it ends."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file

from dedistill.distributed.launcher import REFUSED, promised, resume_command
from dedistill.distributed.outside import BY_SIGNAL, ECHO, REPEAT, StopRequests
from dedistill.errors import RUN_AGAIN
from dedistill.recipe import load_recipe
from dedistill.runs.checkpoint import damage, list_checkpoints
from dedistill.train import main

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": PATH}


def launch(config: str, recipe: Path, *arguments: str, out: Path) -> subprocess.Popen:
    """``accelerate launch`` in a process group of its own, as a terminal starts it; its messages go to ``out``."""
    options = ["--quiet", "--config_file", str(ROOT / "launch" / config), "--num_cpu_threads_per_process", "1"]
    command = ["accelerate", "launch", *options, "-m", "dedistill.train", str(recipe), *arguments]
    with open(out, "w") as said:
        return subprocess.Popen(command, stderr=said, stdout=said, env=ENVIRONMENT, start_new_session=True)


def wait_for(condition, seconds: float = 240) -> None:
    for _ in range(int(20 * seconds)):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def alive(group: int) -> bool:
    """Whether any process of the group runs; zombies that nobody reaps do not count."""
    stats = [p.read_text().rpartition(")")[2].split() for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
    return any(int(fields[2]) == group and fields[0] != "Z" for fields in stats)


@pytest.mark.slow  # the command of several, which starts accelerate's: cli/test_interrupted.py
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("config", "number", "whole_group"),
    [
        ("cpu.yaml", signal.SIGINT, True),
        ("cpu.yaml", signal.SIGTERM, False),
        ("cpu_2.yaml", signal.SIGINT, True),
        ("cpu_2.yaml", signal.SIGTERM, False),
    ],
)
def test_a_signal_to_the_launcher_saves_and_ends_everything(adapter_recipe, tmp_path, config, number, whole_group):
    """Ctrl-C reaches the group, and with several processes a second time through their launcher. A SIGTERM to the
    launcher of one process alone leaves training without a parent, which it notices; that of several passes it on."""
    said, run = tmp_path / "said", tmp_path / "dedistill"
    process = launch(config, adapter_recipe, "--set", "train.steps=100000", "--set", "checkpoint.every=0", out=said)
    journal = run / "metrics.jsonl"
    wait_for(lambda: journal.exists() and journal.stat().st_size > 1000)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    assert process.wait(timeout=240) != 0
    wait_for(lambda: not alive(process.pid))
    assert ("on 2 x cpu" in said.read_text()) == (config == "cpu_2.yaml")
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


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--num_processes", "3"], 3),
        (["--num-processes=4", "--config_file", str(ROOT / "launch/cpu_2.yaml")], 4),
        (["--config-file", str(ROOT / "launch/cpu_2.yaml")], 2),
        (["--config_file", str(ROOT / "launch/gpu_1.yaml")], 1),
    ],
)
def test_what_the_launcher_was_to_start_is_known(monkeypatch, options, count):
    """Several ways of launching two processes start one, silently."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    words = ["accelerate", "launch", *options, "-m", "dedistill.train", "a.toml", "--num_processes", "9"]
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words])
    try:
        wait_for(lambda: b"launch" in Path(f"/proc/{launcher.pid}/cmdline").read_bytes())
        assert promised(launcher.pid) == count
    finally:
        launcher.kill()
        launcher.wait()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert promised(os.getppid()) == 0


@pytest.mark.parametrize(("launcher", "waited", "ends"), [(False, 0, False), (False, 2 * REPEAT, True), (True, 1.0, False)])
def test_a_signal_that_comes_twice_counts_once(monkeypatch, launcher, waited, ends):
    """Ctrl-C comes from the terminal and from the launcher, a SIGTERM of Slurm from it and from torchrun, of one process,
    too. A person's second one comes later."""
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "_exit", sys.exit)
    with StopRequests() as stop:
        stop.deferred = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll()["stop"] == BY_SIGNAL
        stop._first -= waited  # as if that long had passed
        with pytest.raises(SystemExit) if ends else nullcontext():
            os.kill(os.getpid(), signal.SIGTERM)
        stop._first -= 2 * ECHO  # as if that long had passed
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGINT)
        assert ended.value.code == RUN_AGAIN


def test_fewer_processes_than_the_launcher_was_to_start_is_an_error(adapter_recipe, monkeypatch, capsys):
    monkeypatch.setattr("dedistill.distributed.launcher.promised", lambda launcher: 2)
    assert main([str(adapter_recipe)]) == 2
    assert "the launcher was to start 2 processes, but this one is of 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--cpu", "--num_processes", "2"], ["--config_file", "MULTI_CPU"]])
def test_launchers_that_start_one_process_for_two_are_found_out(adapter_recipe, tmp_path, options):
    """With accelerate itself."""
    file = tmp_path / "multi_cpu.yaml"
    file.write_text((ROOT / "launch/cpu_2.yaml").read_text().replace("MULTI_GPU", "MULTI_CPU").replace("false", "true"))
    options = [str(file) if o == "MULTI_CPU" else o for o in options]
    command = ["accelerate", "launch", "--quiet", *options, "-m", "dedistill.train", str(adapter_recipe)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    assert done.returncode and "the launcher was to start 2 processes, but this one is of 1" in done.stderr


@pytest.mark.parametrize("variable", list(REFUSED))
def test_engines_that_are_not_supported_are_refused(adapter_recipe, monkeypatch, capsys, variable):
    """docs/engines.md."""
    monkeypatch.setenv(variable, "true")
    assert main([str(adapter_recipe)]) == 2
    assert f"the launcher asks for {REFUSED[variable]}, which is refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "kind", "count"),
    [
        *[("cpu", "NO", 1), ("gpu_1", "NO", 1), ("cpu_2", "MULTI_GPU", 2), ("ddp", "MULTI_GPU", -1), ("fsdp2", "FSDP", -1)],
        *[("zero2", "DEEPSPEED", -1), ("zero3", "DEEPSPEED", -1)],
    ],
)
def test_configs_of_accelerate_load(file, kind, count):
    """-1: accelerate asks for --num_processes."""
    config = load_config_from_file(str(ROOT / "launch" / f"{file}.yaml"))
    precision = None if kind == "DEEPSPEED" else "no"  # accelerate wants it left out beside a DeepSpeed file
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, count, precision)
    assert config.use_cpu == (file == "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_torchrun_sh_starts_two_processes(adapter_recipe, tmp_path, engine):
    command = ["bash", str(ROOT / "launch/torchrun.sh"), str(adapter_recipe), "--set", "train.steps=2"]
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if engine == "fsdp2" else {}
    environment = ENVIRONMENT | asked | {"PORT": "0", "PER_NODE": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    effects = json.loads((tmp_path / "dedistill/plan.json").read_text())["effects"]
    assert (effects["processes"], effects["engine"]) == (2, engine)


def test_the_other_launch_files_parse():
    """As far as can be seen without Slurm, SkyPilot and Docker: scripts parse, what they name exists."""
    for script in [*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch"]:
        assert subprocess.run(["bash", "-n", script]).returncode == 0, script
    assert subprocess.run(["bash", ROOT / "launch/torchrun.sh"], capture_output=True).returncode == 2
    sky = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())
    assert load_recipe(sky["envs"]["RECIPE"]) and sky["workdir"] == "."
    for part in (sky["setup"], sky["run"]):
        assert subprocess.run(["bash", "-n"], input=part, text=True).returncode == 0
    for line in (ROOT / "launch/Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / name).exists() for name in line.split()[1:-1])
    for file in ROOT.glob("launch/*"):
        named = re.findall(r"\blaunch/[\w/]+\.\w+", file.read_text())
        assert all((ROOT / name).is_file() for name in named), file


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_demo_stops_its_job_and_waits(tmp_path, number):
    """The demo script itself, with the installation left out, begun as a shell begins what goes to the background."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    setup = 'set -euo pipefail\ncd "$(dirname "${BASH_SOURCE[0]}")/.."\nexport OMP_NUM_THREADS=1\n'
    (tmp_path / "launch" / "setup.sh").write_text(setup)
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(
            ["bash", "-c", "trap '' INT; exec bash launch/demo.sh"],
            cwd=tmp_path, stderr=said, stdout=said, env=ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
    journal = tmp_path / "runs/digits/teacher/metrics.jsonl"
    wait_for(lambda: journal.exists() and journal.stat().st_size > 1000)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    assert process.wait(timeout=240) == RUN_AGAIN
    assert children and not any(alive(int(child)) for child in children)
    (saved,) = list_checkpoints(tmp_path / "runs/digits/teacher/checkpoints")
    said = (tmp_path / "said").read_text()
    assert damage(saved) == "" and "continue with: dedistill demo digits" in said and "Traceback" not in said


def test_cudnn_attention_is_off_in_training(teacher_recipe):
    """On an H100 its backward gave NaN; the switch is torch's own, so that it can be asked for anywhere."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert main([str(teacher_recipe)]) == 0
    assert not torch.backends.cuda.cudnn_sdp_enabled()
