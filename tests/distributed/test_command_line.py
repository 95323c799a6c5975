"""What a launcher's command line tells its processes, read from a process that was started with such words."""

import subprocess
import sys

import pytest

from dedistill.distributed import launcher

OPTIONS = ["--config_file", "launch/cpu_2.yaml", "--num_processes=2"]


@pytest.fixture
def started():
    """Start a process whose command line holds these words."""
    processes = []

    def start(*words: str) -> int:
        command = [sys.executable, "-c", "print(flush=True); input()", *words]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        processes[-1].stdout.readline()
        return processes[-1].pid

    yield start
    for process in processes:
        process.communicate(b"\n")


@pytest.mark.parametrize(
    "program",
    [["-m", "dedistill.train"], ["-m", "dedistill", "train"]],
    ids=" ".join,
)
def test_the_command_to_go_on_keeps_the_launchers_options(started, monkeypatch, program):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    process = started("accelerate", "launch", *OPTIONS, *program, "my.toml", "--set", "a=1")
    monkeypatch.setattr(launcher.os, "getppid", lambda: process)
    wanted = " ".join(["accelerate launch", *OPTIONS, "-m dedistill.train my.toml --set a=1"])
    assert launcher.resume_command(["my.toml", "--set", "a=1"]) == wanted
    assert launcher.promised(process) == 2


def test_words_of_other_programs_are_no_options(started, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    process = started("make", "dedistill", "train.py")
    monkeypatch.setattr(launcher.os, "getppid", lambda: process)
    assert launcher.resume_command(["my.toml"]) == "accelerate launch -m dedistill.train my.toml"
    assert launcher.promised(process) == 0
