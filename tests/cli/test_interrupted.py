"""Ctrl-C at any time: the last line is ours, no traceback, and the exit code is the one that means run me again."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import start_ranks
from test_launch import wait_for

from dedistill.cli import launch
from dedistill.cli import main as cli
from dedistill.cli.command import guarded
from dedistill.errors import RUN_AGAIN, UserError
from dedistill.runs.checkpoint import damage, list_checkpoints

ROOT = Path(__file__).parents[2]
AGAIN = "python -m dedistill train "


def interrupted(words: list[str], when: str, cwd: Path) -> list[str]:
    """Lines of ``python -m dedistill`` after a SIGINT, sent to all its processes as a terminal does, as soon as it has said
    ``when``; empty: after 1.5 s."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "dedistill", *words]
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as job:
        lines = []
        if when:
            for line in job.stdout:
                lines.append(line)
                if when in line:
                    break
        else:
            time.sleep(1.5)
        os.killpg(job.pid, signal.SIGINT)
        lines += job.stdout.readlines()
    assert job.returncode == RUN_AGAIN, "".join(lines)
    assert not any("Traceback" in line or "KeyboardInterrupt" in line for line in lines), "".join(lines)
    return [line.rstrip() for line in lines]


def test_training_while_libraries_are_imported(adapter_recipe, tmp_path):
    lines = interrupted(["train", str(adapter_recipe)], "", tmp_path)
    assert lines[-2].startswith("stopped") and lines[-2].endswith("continue with:")
    assert lines[-1].strip().startswith(AGAIN + str(adapter_recipe)), lines


@pytest.mark.parametrize("when", ["results   ", "step 40/"])
def test_training(adapter_recipe, tmp_path, when):
    """Before the first step, and in training; each says how to go on."""
    words = [str(adapter_recipe), "--set", "train.steps=100000", "--set", "validate.every=20", "--set", "snapshot.every=0"]
    (process,) = start_ranks(1, cli.main, ["train", *words], said=tmp_path / "printed")
    printed = tmp_path / "printed" / "0"
    wait_for(lambda: printed.exists() and when in printed.read_text())
    os.kill(process.pid, signal.SIGINT)
    process.join()
    *_, said, again = printed.read_text().rstrip().splitlines()
    assert process.exitcode == RUN_AGAIN and "Traceback" not in printed.read_text()
    assert said.startswith("stopped") and said.endswith("continue with:") and shlex.quote(str(adapter_recipe)) in again


CPU_2 = ["--config_file", str(ROOT / "launch/cpu_2.yaml")]


def under_a_launcher(words: list[str], run: Path) -> list[str]:
    """Lines of ``dedistill launch``, interrupted. With accelerate's and torch's own launchers, of which nothing comes after the
    line that says how to go on; a whole checkpoint is there."""
    lines = interrupted(words, "step 40/", run.parent)
    *_, saved = list_checkpoints(run / "checkpoints")
    assert damage(saved) == "" and lines[-2].startswith(f"stopped and saved at step {int(saved.name[5:])}")
    return lines


LONG = ["--set", "train.steps=100000", "--set", "validate.every=20"]


def test_under_a_launcher(adapter_recipe, tmp_path, forked_commands):
    lines = under_a_launcher(["launch", *CPU_2, str(adapter_recipe), *LONG], tmp_path / "dedistill")
    assert any(line.endswith("on 2 x cpu") for line in lines) and str(adapter_recipe) in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "said"), [(CPU_2, "on 2 x cpu"), (["--cpu", "--num_processes", "1"], "on cpu")])
def test_under_a_launcher_of_new_processes(adapter_recipe, tmp_path, options, said):
    """They go on by the command itself."""
    words = ["launch", *options, str(adapter_recipe), *LONG]
    lines = under_a_launcher(words, tmp_path / "dedistill")
    assert any(line.endswith(said) for line in lines)
    assert lines[-1].strip() == f"python -m dedistill {shlex.join(words)}"


def test_a_launcher_keeps_the_exit_code(adapter_recipe, tmp_path, forked_commands):
    command = [sys.executable, "-m", "dedistill", "launch", *CPU_2, str(adapter_recipe), "--set", "train.stpes=3"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert all("error: --set: train.stpes: unknown key, did you mean 'steps'?" in line for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("code", "said"), [(-9, "rank 1: ended by SIGKILL: often the system's"), (-11, "rank 1: ended by SIGSEGV")]
)
def test_processes_that_could_say_nothing(code, said):
    with pytest.raises(UserError, match=said):
        launch._code(code, "rank 1: ")
    assert launch._code(75) == 75


@pytest.mark.parametrize("name", ["sweep", "evaluate", "measure"])
def test_other_commands(adapter_recipe, monkeypatch, capsys, name):
    def stop(*_, **__):
        raise KeyboardInterrupt  # no signal: where tests run in the background those of a terminal are ignored

    monkeypatch.setattr("dedistill.evaluation.prompts.ask", stop)
    assert cli.main([name, str(adapter_recipe)]) == RUN_AGAIN
    assert capsys.readouterr().err == "stopped; what was complete is kept\n"


@pytest.mark.parametrize("wrapped", [ImportError, RuntimeError])
def test_an_interrupt_that_a_library_made_another_error_of(capsys, wrapped):
    def interrupted():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as e:
            raise wrapped("cannot be imported") from e

    assert guarded(interrupted, debug=False) == RUN_AGAIN
    assert capsys.readouterr().err == "stopped; what was complete is kept\n"


def test_while_the_command_itself_is_imported(monkeypatch, capsys):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", stop)
    assert cli.main(["train", "x.toml"]) == RUN_AGAIN
    assert capsys.readouterr().err == "stopped; nothing was begun\n"
