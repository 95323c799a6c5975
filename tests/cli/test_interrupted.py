"""Ctrl-C at any time: the last line is ours, no traceback, and the exit code is the one that means run me again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dedistill.cli import main as cli
from dedistill.cli.command import guarded
from dedistill.errors import RUN_AGAIN

ROOT = Path(__file__).parents[2]
AGAIN = "python -m dedistill train "


def interrupted(words: list[str], when: str, cwd: Path) -> list[str]:
    """Lines of ``python -m dedistill`` after a SIGINT, sent as soon as it has said ``when``; empty: after 1.5 s."""
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
        job.send_signal(signal.SIGINT)
        lines += job.stdout.readlines()
    assert job.returncode == RUN_AGAIN, "".join(lines)
    assert not any("Traceback" in line or "KeyboardInterrupt" in line for line in lines), "".join(lines)
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("when", ["", "results   ", "step 300/"])
def test_training(adapter_recipe, tmp_path, when):
    """While libraries are imported, before the first step, and in training; each says how to go on."""
    settings = ["--set", "train.steps=100000", "--set", "validate.every=300", "--set", "snapshot.every=0"]
    lines = interrupted(["train", str(adapter_recipe), *settings], when, tmp_path)
    assert lines[-2].startswith("stopped") and lines[-2].endswith("continue with:")
    assert lines[-1].strip().startswith(AGAIN + str(adapter_recipe)), lines


def test_other_commands(tmp_path, adapter_recipe):
    lines = interrupted(["sweep", "dedistill:digits/teacher", "--data", str(adapter_recipe)], "", tmp_path)
    assert lines[-1] == "stopped; what was complete is kept"


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
