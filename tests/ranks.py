"""Several processes of one run, forked: the imports are there already, so that a run of three takes a second or two."""

import gc
import multiprocessing
import os
import socket
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState

LAUNCH = Path(__file__).parents[1] / "launch"
_fork = multiprocessing.get_context("fork")


def run_ranks(size: int, work: Callable[..., int | None], *arguments: object, said: Path) -> list[int]:
    """Exit codes of ``work(*arguments)`` in each of the processes of :func:`start_ranks`, after 90 seconds at the latest."""
    ranks = start_ranks(size, work, *arguments, said=said)
    for process in ranks:
        process.join(timeout=90)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


def start_ranks(size: int, work: Callable[..., int | None], *arguments: object, said: Path) -> list[BaseProcess]:
    """``work(*arguments)`` in each of ``size`` processes that a launcher would have started on this machine.

    What rank r prints goes to ``said``/r.
    """
    said.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [_fork.Process(target=_rank, args=(rank, size, port, said / str(rank), work, arguments)) for rank in range(size)]
    gc.collect()
    gc.freeze()  # or the first collection in each process copies all that is there; for good, as conftest.py does it
    for process in ranks:
        process.start()
    return ranks


def forked(work: Callable[..., object], *arguments: object) -> object:
    """What ``work(*arguments)`` returns in a process of its own, which may change what is one per process."""
    read, write = _fork.Pipe(duplex=False)
    process = _fork.Process(target=lambda: write.send(work(*arguments)))
    process.start()
    write.close()
    try:
        return read.recv()  # EOFError where it fails; its traceback is on stderr
    finally:
        process.join()


def run_launched(config: str, work: Callable[[list[str]], int], given: list[str], *, said: Path) -> int:
    """Exit code of ``accelerate launch`` with a file of launch/ and two processes of ``work(given)``: what it reads, checks
    and says to them is its own, but they are those of :func:`start_ranks`."""
    launcher = _fork.Process(target=_launcher, args=(str(LAUNCH / config), work, given, said))
    launcher.start()
    launcher.join()
    return launcher.exitcode


def _launcher(config: str, work: Callable[[list[str]], int], given: list[str], said: Path) -> None:
    import torch.distributed.run as torchrun
    from accelerate.commands.launch import launch_command, launch_command_parser

    def start(asked: Namespace) -> None:
        words = asked.training_script_args
        assert asked.module and asked.training_script == "dedistill.train" and words == given
        sys.exit(max(run_ranks(int(asked.nproc_per_node), work, words, said=said)))

    torchrun.run = start
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.chdir(LAUNCH.parent)  # paths in the file are as from there
    options = ["--config_file", config, "--num_processes", "2", "--num_cpu_threads_per_process", "1"]
    launch_command(launch_command_parser().parse_args([*options, "-m", "dedistill.train", *given]))


def _rank(rank: int, size: int, port: int, said: Path, work: Callable[..., int | None], arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU by choice
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(True)  # what the parent found out about itself
    PartialState._reset_state()
    sys.stdout = sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115 - open as long as the process
    try:
        code = work(*arguments) or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code)
