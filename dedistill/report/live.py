"""What a run says while it goes on: a live line on a terminal; elsewhere a plain line for the first step and then by time."""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from threading import Event, Thread
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from dedistill.distributed.heartbeat import heartbeat
from dedistill.errors import amount
from dedistill.recipe.resolve import Plan
from dedistill.runs.pace import Pace

EVERY = 15.0
"""Seconds between plain lines; as long without a step, what is going on is named."""
RECENT = 50
"""Steps by which the time that is left is estimated, validation and saving included."""
USUAL = ("training", "waiting for data")


def progress(rows: Iterable[dict[str, Any]], start: int, plan: Plan, pace: Pace) -> Iterator[dict[str, Any]]:
    """Pass rows through, showing a live line on a terminal and a plain line every so often elsewhere."""
    return _live(rows, start, plan, pace) if sys.stderr.isatty() else _plain(rows, plan, pace)


def _plain(rows: Iterable[dict[str, Any]], plan: Plan, pace: Pace) -> Iterator[dict[str, Any]]:
    left, said = _Left(plan), 0.0
    with _Phases() as phases:
        for row in rows:
            left.step(row["step"])
            special = row["step"] == plan.steps or "val_loss" in row or not row["applied"]
            if not said or special or time.monotonic() - said >= EVERY:
                said = phases.said = time.monotonic()
                print(", ".join(filter(None, [_line(row, plan), str(pace), str(left)])), file=sys.stderr, flush=True)
            yield row


def _live(rows: Iterable[dict[str, Any]], start: int, plan: Plan, pace: Pace) -> Iterator[dict[str, Any]]:
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), _PhaseColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=plan.steps, completed=start, text="")
        held_out, left = "", _Left(plan)
        for row in rows:
            left.step(row["step"])
            held_out = f" held-out {row['val_loss']:.4f}" if "val_loss" in row else held_out
            text = ", ".join(filter(None, [_numbers(row) + held_out, str(pace), str(left)]))
            bar.update(task, completed=row["step"], text=text)
            yield row


class _Left:
    """How long the rest of a run takes at the pace of its last steps."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.times: deque[tuple[int, float]] = deque(maxlen=RECENT)

    def step(self, step: int) -> None:
        self.times.append((step, time.monotonic()))

    def __str__(self) -> str:
        if len(self.times) < 2 or (to_go := self.plan.steps - self.times[-1][0]) <= 0:
            return ""
        (first, then), (last, now) = self.times[0], self.times[-1]
        return f"{duration(to_go * (now - then) / max(1, last - first))} left"


def duration(seconds: float) -> str:
    """As people say it: 12 s, 4 min, 3 h 20 min, 2 d 5 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class _Phases:
    """Names what is going on to a reader without a terminal who has not heard of a step for a while."""

    def __init__(self) -> None:
        self.said, self.ended = time.monotonic(), Event()
        self.thread = Thread(target=self._watch, name="phases", daemon=True)

    def __enter__(self) -> "_Phases":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()

    def _watch(self) -> None:
        while not self.ended.wait(EVERY / 5):
            if time.monotonic() - self.said >= EVERY and heartbeat.phase not in USUAL:
                self.said = time.monotonic()
                print(f"{heartbeat.phase} ...", file=sys.stderr, flush=True)


class _PhaseColumn(ProgressColumn):
    """What is going on, where it is not training."""

    def render(self, task: Task) -> Text:
        return Text("" if heartbeat.phase in USUAL else heartbeat.phase)


def _numbers(row: dict[str, Any]) -> str:
    if not row["applied"]:
        what = "NOT FINITE" if "not_finite" in row else f"gradient norm {row['grad_norm']}: A SPIKE"
        return f"loss {row['loss']}: {what}, step not applied"
    return f"loss {row['loss']:.4f} grad {row['grad_norm']:.3f} lr {row['lr']:.2e}"


def _line(row: dict[str, Any], plan: Plan) -> str:
    held_out = f" held-out {row['val_loss']:.4f}" if "val_loss" in row else ""
    if held_out:
        spread = f" +- {row['val_loss_se']:.4f}" if "val_loss_se" in row else ""
        held_out += f"{spread} ({amount(row['val_images'], 'image')})"
    return f"step {row['step']}/{plan.steps} {_numbers(row)}{held_out}"
