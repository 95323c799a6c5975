"""Train, or make pairs, on several GPUs or machines: accelerate's launcher, without its tracebacks, with train's exit codes.

dedistill launch --config_file launch/ddp.yaml --num_processes 8 my_recipe.toml
dedistill launch --config_file launch/cpu_2.yaml my_recipe.toml --set train.steps=200      # two processes on a CPU
dedistill launch --num_processes 8 pairs my_recipe.toml --out pairs
"""

import logging
import os
import signal
import subprocess
import sys

from dedistill.cli.command import command_parser, guarded
from dedistill.errors import RUN_AGAIN, UserError

SHUTDOWN = "110"
"""Seconds that a stop has for its step and save."""
ELASTIC = ("agent.server", "multiprocessing")
"""Parts of torch's launcher that say which processes ended how."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = command_parser("launch", __doc__)
    help = "options of accelerate launch, pairs or nothing, the recipe, options of dedistill train or pairs"
    parser.add_argument("words", nargs="*", metavar="[--config_file FILE ...] RECIPE [...]", help=help)
    if not argv or argv[0] in ("-h", "--help"):
        parser.parse_args(argv or ["--help"])
    return guarded(lambda: run(argv), debug="--debug" in argv)


def run(argv: list[str]) -> int:
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN)
    for name in ("accelerate.commands.launch", *(f"torch.distributed.elastic.{part}.api" for part in ELASTIC)):
        logging.getLogger(name).addFilter(lambda record: False)  # what is wrong the processes say themselves
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(argv)
    words = [args.training_script, *args.training_script_args]
    args.training_script, args.module = "dedistill" if words[0] == "pairs" else "dedistill.train", True
    args.training_script_args = words
    try:
        launch_command(args)
    except SignalException:  # by then all processes have saved and said how to go on
        return RUN_AGAIN
    except KeyboardInterrupt:  # a single process is not waited for
        return _last()
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        return _code(failure.exitcode, f"rank {rank}: ")
    except subprocess.CalledProcessError as e:
        return _code(e.returncode)
    return 0


def _last() -> int:
    try:
        return _code(os.waitstatus_to_exitcode(os.wait()[1]))
    except ChildProcessError:  # it had ended
        return RUN_AGAIN


def _code(code: int, who: str = "") -> int:
    """That of a process. Raises UserError for one that a signal ended, which could say nothing itself."""
    if code < 0:
        name = signal.Signals(-code).name
        raise UserError(f"{who}ended by {name}" + (": often the system's, out of memory" if name == "SIGKILL" else ""))
    return code
