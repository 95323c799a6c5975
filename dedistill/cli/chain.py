"""Run recipes and commands one after the other, as a folder's chain.toml lists them; run again to continue.

dedistill chain dedistill:digits                # the demo without its report
dedistill chain my_chain --dry-run              # only say which commands it is made of
dedistill chain my_chain --scale 0.01           # a hundredth of the steps and pairs
dedistill chain my_chain --rehearse             # first: all of it on tiny random models, in minutes
dedistill plan my_chain                         # what it will cost
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dedistill.cli.command import command_parser, guarded, path, place, positive_number
from dedistill.distributed.outside import WORKS_FOR
from dedistill.errors import RUN_AGAIN, UserError
from dedistill.io.atomic import replace_json
from dedistill.io.ownership import claim, hold
from dedistill.recipe.chain import Chain, load_chain

SHARED = ("train", "pairs")
"""Commands that several processes share."""


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("chain", __doc__)
    parser.add_argument("folder", type=place, help="folder with a chain.toml, or dedistill:NAME")
    parser.add_argument("--scale", type=positive_number, help="times the numbers that the chain lets scale; default its own")
    parser.add_argument("--launch", type=path, metavar="FILE", help="accelerate's file by which to train and make pairs")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    parser.add_argument("--rehearse", action="store_true", help="run all stages on tiny random models, in OUT-rehearsal")
    args = parser.parse_args(argv)
    return guarded(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    chain = load_chain(args.folder)
    scale = args.scale or chain.scale
    if args.rehearse:
        from dedistill.cli.chain_rehearsal import small_chain

        chain, scale = small_chain(chain), 1.0
    commands = [launched(chain.words(stage, scale), args.launch) for stage in chain.stages]
    if args.dry_run:
        lines = [shlex.join(["dedistill", *words]) for words in commands]
        print("\n".join(line + " &" * stage.beside for line, stage in zip(lines, chain.stages)))
        return 0
    own = {"--scale": args.scale, "--launch": args.launch}
    said = [word for name, value in own.items() if value for word in (name, str(value))]
    again = shlex.join(["dedistill", "chain", args.folder, *said, *["--rehearse"] * args.rehearse])
    with running(chain, commands, again) as jobs:
        jobs.finish()
    if args.rehearse:
        print(f"rehearsed: {chain.out}/")
    return 0


def launched(words: list[str], file: Path | None) -> list[str]:
    """A command by the launcher that ``file`` is for, where several processes can share it."""
    if file is None or words[0] not in SHARED:
        return words
    return ["launch", "--config_file", str(file), *words[words[0] == "train" :]]


@contextmanager
def running(chain: Chain, commands: list[list[str]], again: str) -> Iterator["Jobs"]:
    """``chain``'s stages have run as ``commands``, but those beside: ``Jobs.finish`` waits for them. again: the command that
    continues.

    One process at a time may work on a chain's folder. An interrupt stops what runs, which saves first.
    """
    use_threads(chain.threads)
    claim(chain.out, "chain", "out")
    jobs = Jobs(again)
    before = _on_stops(signal.default_int_handler)
    lock = hold(chain.out, "out")
    try:
        replace_json(chain.out / "chain.json", {"stages": commands})
        for i, (stage, words) in enumerate(zip(chain.stages, commands), 1):
            log = chain.out / f"{stage.name}.log" if stage.beside else None
            print(f"{i}/{len(chain.stages)} {stage.name}{f' (meanwhile; {log})' if log else ''}", flush=True)
            jobs.run(words, log)
        yield jobs
    except KeyboardInterrupt:
        jobs.end()
        raise UserError(f"stopped; continue with: {again}", RUN_AGAIN) from None
    finally:
        jobs.end()
        lock.close()
        _restore(before)


Handler = Callable[[int, FrameType | None], Any] | int | None


def _on_stops(handler: Handler) -> dict[int, Handler]:
    """Let ``handler`` hear all requests to stop; what heard them before. SIGINT, too, where a shell that began this in the
    background has it ignored: its jobs would not end, either. Not SIGHUP under nohup, which asks for that."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(before: dict[int, Handler]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)


def use_threads(count: int | None) -> None:
    """Of the CPU, here and in what is started; before torch is imported."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(count or os.environ.get("OMP_NUM_THREADS") or min(8, cores))


class Jobs:
    """Commands as processes in groups of their own, so that a stop reaches each once and nothing outlives this one."""

    def __init__(self, again: str) -> None:
        self._again = again
        self._started: list[tuple[str, subprocess.Popen[bytes], Path | None]] = []

    def run(self, words: list[str], log: Path | None = None) -> None:
        """Start a command and wait for it, or with ``log``, which takes its words, go on. Raises UserError with its exit
        code when it fails; it has said why."""
        out, owned = log.open("wb") if log else None, os.environ | {WORKS_FOR: str(os.getpid())}
        try:
            command = [sys.executable, "-m", "dedistill", *words]
            job = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=owned)
        finally:
            if out:
                out.close()
        self._started.append((words[0], job, log))
        if not log:
            self._wait(words[0], job, log)

    def finish(self) -> None:
        """Wait for what goes on. Raises as ``run``."""
        for command, job, log in self._started:
            self._wait(command, job, log)

    def _wait(self, command: str, job: "subprocess.Popen[bytes]", log: Path | None) -> None:
        code = job.wait()
        if code == RUN_AGAIN:
            raise KeyboardInterrupt
        if code:
            said = f":\n{log.read_text(errors='replace')}" if log else ""
            raise UserError(
                f"dedistill {command} failed with exit code {code}; mend that and run {self._again} again{said}", max(code, 1)
            )

    def end(self) -> None:
        """Stop what still runs, and wait: training saves first. Further requests to stop change nothing."""
        before = _on_stops(signal.SIG_IGN)
        for _, job, _ in self._started:
            if job.poll() is None:
                job.terminate()
        for _, job, _ in self._started:
            job.wait()
        _restore(before)
