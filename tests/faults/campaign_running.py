"""Faults of a run that is going on: signals, stuck processes, bad samples, steps without effect, what stands beside training.

Like ``campaign_kinds``: every function gives one row of docs/reliability.md.
"""

import contextlib
import importlib
import os
import signal
import statistics
import time
from itertools import cycle, islice, product
from pathlib import Path

import pytest
import test_no_effect
import test_outside
import test_quarantine
import test_requests
import test_stuck
from campaign_kinds import Row
from ranks import run_ranks, start_ranks
from runs import arguments, differences, last_row, train

from dedistill.errors import RUN_AGAIN
from dedistill.runs import metrics
from dedistill.runs.checkpoint import list_checkpoints, read_checkpoint
from dedistill.runs.metrics import Trackers
from dedistill.train import main
from dedistill.training import guards


def p95(seconds: list[float]) -> str:
    return f"{statistics.quantiles(seconds, n=20, method='inclusive')[-1]:.1f} s" if len(seconds) > 1 else "-"


def _signalled(given: list[str], phase: str, number: int, sender: int, note: Path) -> int:
    """``main``, where one rank gets a signal in a phase; when, on the clock that all processes share, goes to ``note``."""
    owner, name, call, _ = test_requests.PHASES[phase]
    owner = importlib.import_module(owner) if isinstance(owner, str) else owner

    def send() -> None:
        note.write_text(str(time.monotonic()))
        os.kill(os.getpid(), number)

    if int(os.environ["RANK"]) == sender:
        test_requests.Once(pytest.MonkeyPatch(), owner, name, call, send)
    return main(given)


def signals(recipe: Path, folder: Path, count: int) -> Row:
    settings = (*test_requests.SETTINGS, *test_requests.PREVIEW, "checkpoint.keep=9")
    for size in (1, 2):
        assert run_ranks(size, main, arguments(recipe, folder / f"whole{size}", *settings), said=folder / "said") == [0] * size
    only_first = {"preview", "save", "writing"}
    kinds = cycle(product((1, 2), (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), test_requests.PHASES))
    honoured, seconds, sent = 0, [], set()
    for trial, (size, number, phase) in enumerate(islice(kinds, count)):
        out, note = folder / f"run{trial}", folder / f"note{trial}"
        given = arguments(recipe, out, *settings)
        sender = 0 if phase in only_first else trial % size
        codes = run_ranks(size, _signalled, given, phase, number, sender, note, said=folder / "said")
        going_on = number == signal.SIGUSR1
        if not going_on:
            seconds.append(time.monotonic() - float(note.read_text()))
        steps = [int(c.name[5:]) for c in list_checkpoints(out / "checkpoints")]
        saved = set(steps) - {4, 6} if going_on and phase not in ("save", "writing") else steps or phase == "loading"
        again = run_ranks(size, main, given, said=folder / "said")
        same = not differences(folder / f"whole{size}", out)
        good = codes == [0 if going_on else RUN_AGAIN] * size and bool(saved) and again == [0] * size and same
        honoured += good
        sent.add((size, number, phase))
        if not good:
            print(f"signals: {size} {number} {phase}: {codes} {steps} {again} {same}")
    return (
        f"SIGINT, SIGTERM and SIGUSR1 to one process, in {len(test_requests.PHASES)} phases: training, loading, validating, "
        "previewing, saving",
        f"{count}, of {len(sent)} kinds, to runs of 1 and 2 processes",
        f"honoured, and the run in any bit as if uninterrupted: {honoured} of {count}; "
        f"SIGINT and SIGTERM to the end of all processes, which saved: p95 {p95(seconds)}",
        honoured == count,
    )


def stuck(recipe: Path, folder: Path, count: int) -> Row:
    good, seconds = 0, []
    kinds = ("asleep", "loading", "holding the interpreter", signal.SIGSTOP, signal.SIGKILL, "slow")
    for trial, kind in enumerate(islice(cycle(kinds), count)):
        out, rank = folder / f"run{trial}", trial % 2
        given = arguments(recipe, out, *test_stuck.SETTINGS)
        if kind == "slow":
            good += run_ranks(2, test_stuck._slow, given, said=folder / "said") == [0, 0]
            continue
        if isinstance(kind, str):
            ranks = start_ranks(1, test_stuck._stuck, given, kind, said=folder / "said")
            test_stuck.wait_for(lambda out=out: last_row(out) >= 2)
        else:
            ranks = start_ranks(2, main, [*given, "--set", "train.steps=100000"], said=folder / "said")
            test_stuck.wait_for(lambda out=out: last_row(out) > 5)
            os.kill(ranks[rank].pid, kind)
        took = test_stuck.seconds_to_end(ranks)
        killed = kind == signal.SIGKILL
        if not killed:
            seconds.append(took)
        expected = {RUN_AGAIN, -signal.SIGKILL} if killed or kind == "holding the interpreter" else {RUN_AGAIN}
        stacks = killed or len(test_stuck.written(out, 0 if isinstance(kind, str) else rank)) > 200
        fine = {p.exitcode for p in ranks} <= expected and stacks and took < test_stuck.LIMIT + 10
        good += fine
        if not fine:
            print(f"stuck: {kind}: {[p.exitcode for p in ranks]} {took:.1f} s {stacks}")
    return (
        "a process that sleeps, whose loader hangs, that is locked up in C, stopped (SIGSTOP), killed, or 20 times too slow",
        f"{count}, with `run.stuck_after` at {test_stuck.LIMIT:g} s",
        f"all ended with stacks written and an exit code to run again, slow ones not: {good} of {count}; "
        f"seconds to the end: p95 {p95(seconds)}",
        good == count,
    )


def bad_steps(recipe: Path, folder: Path) -> Row:
    trained = different = runs = 0
    for kind, hits in product(("nan", "spike"), ((6, 7, 8), (5, 6, 7), (8, 9, 10))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guards, "WARM_UP", 4)
            patch.setattr(test_quarantine, "HITS", hits)
            test_quarantine.spoil(patch, kind)
            outs = []
            for every in (0, 1, 3):
                settings = (*test_quarantine.SETTINGS, f"checkpoint.every={every}")
                outs.append(train(recipe, folder / f"{kind}{hits[0]}-{every}", *settings))
                _, manifest = read_checkpoint(list_checkpoints(outs[-1] / "checkpoints")[-1])
                named = set(manifest["guard"]["quarantine"]) == set(test_quarantine.bad_names())
                trained += not named or manifest["skipped"] > 0
                runs += 1
            different += sum(bool(differences(outs[0], out)) for out in outs[1:])
    return (
        "samples that spoil three steps in a row: not finite, or a gradient far above its history",
        f"{runs} runs",
        f"steps trained on one, or left out in the end: {trained}; "
        f"runs that differ in any bit for where they went back to: {different}",
        trained == different == 0,
    )


def no_effect(recipe: Path, folder: Path) -> Row:
    caught = 0
    for number, (fault, message) in enumerate(test_no_effect.CASES.values()):
        out, said = folder / f"run{number}", folder / f"said{number}"
        with pytest.MonkeyPatch.context() as patch, open(said, "w") as f, contextlib.redirect_stderr(f):
            fault(patch)
            code = main(arguments(recipe, out, *test_no_effect.SETTINGS))
        caught += code == 1 and message in said.read_text() and last_row(out) <= 3
    count = len(test_no_effect.CASES)
    return (
        "training without effect: " + ", ".join(test_no_effect.CASES),
        f"{count}",
        f"stopped: {caught} of {count}",
        caught == count,
    )


def logging(recipe: Path, folder: Path) -> Row:
    slowest, affected, faults = 0.0, 0, ("refuses", "dies", "hangs at the start", "hangs", "hangs at the end")
    metrics.LAST_WORDS = 1.0
    for fault in faults:
        trackers = Trackers(test_outside.Service(fault), "run", {}, folder)
        for step in range(1, 2001):
            start = time.thread_time()
            trackers.log({"loss": 1.0}, step)
            slowest = max(slowest, time.thread_time() - start)
        trackers.close()
    plain = train(recipe, folder / "plain", *test_outside.SETTINGS)
    for number, listens in enumerate((True, False)):
        out = folder / f"run{number}"
        with test_outside.socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            if listens:
                server.listen()
            given = [arguments(recipe, out, *test_outside.SETTINGS, "log.wandb=true"), server.getsockname()[1]]
            ended = run_ranks(1, test_outside._online, *given, said=folder / "said") == [0]
        affected += not ended or bool(differences(plain, out))
    return (
        "a logging service that refuses, dies or hangs at any call",
        f"{len(faults)} kinds x 2,000 rows; 2 runs with wandb itself and a server that refuses or is silent",
        f"runs affected: {affected}; most that a row cost training: {slowest * 1000:.1f} ms",
        affected == 0 and slowest < 0.05,
    )
