"""How fast a run goes, how far it is and what memory it takes: on the terminal and in timings.jsonl, never in metrics.jsonl."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from threading import Event, Thread
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from dedistill.distributed.outside import heartbeat
from dedistill.errors import amount
from dedistill.recipe.resolve import Plan

# --- measured --------------------------------------------------------------------------------------------------------


RECENT = 20
"""Steps whose median is the present speed."""
LATELY = 50
"""Steps by which the time that is left is estimated, validation and saving included."""
CLOSE = 0.1
"""A share of the forecast by which a peak may differ."""
GIB = 1 << 30
Useful = Callable[[tuple[int, ...], int], float]
"""Shape of a sample, tokens of its caption -> operations that one step needs for it, nothing computed twice."""


@dataclass(frozen=True)
class Memory:
    """Of a GPU, in GiB: what torch has in use now and had at most since training began, and what the card has."""

    now: float
    peak: float
    total: float


class Pace:
    """Of one process. A start begins anew."""

    def __init__(self, batch: int, device: torch.device):
        """batch: samples of a step."""
        self.batch, self.device = batch, device
        self.useful: Useful | None = None
        """None: not known, and nothing is said of it."""
        self.expected: float | None = None
        """GiB that a step was forecast to have in use at most."""
        self.done = 0
        """Steps of this start."""
        self.rate: float | None = None
        """Operations per second that matrix products reach on this card, measured."""
        self.seconds = self.tflop_s = 0.0
        """Of a step lately, and useful operations per second, 1e12 of them; 0 where that is not known."""
        self._steps: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._ends: deque[float] = deque(maxlen=LATELY)

    def start(self) -> None:
        """Training begins: the memory that was needed before is no part of it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def took(self, seconds: float, passes: Iterable[tuple[tuple[int, ...], int | None]]) -> None:
        """A step has ended. passes: the shape [B, C, H, W] of each micro-batch, and tokens of its captions where known."""
        useful = self.useful
        work = sum(shape[0] * useful(shape[1:], length) for shape, length in passes if length is not None) if useful else 0.0
        self.done += 1
        self._ends.append(time.monotonic())
        self._steps.append((seconds, work))
        times, works = zip(*self._steps)
        self.seconds, self.tflop_s = median(times), sum(works) / sum(times) / 1e12 if sum(times) else 0.0

    def memory(self) -> Memory | None:
        """None on a CPU."""
        if self.device.type != "cuda":
            return None
        now, peak = torch.cuda.memory_allocated(self.device), torch.cuda.max_memory_allocated(self.device)
        return Memory(now / GIB, peak / GIB, torch.cuda.get_device_properties(self.device).total_memory / GIB)

    def facts(self) -> dict[str, float]:
        """For timings.jsonl."""
        found: dict[str, float] = {}
        if self.seconds:
            found |= {"step_s": round(self.seconds, 4), "samples_s": round(self.batch / self.seconds, 2)}
        if self.tflop_s:
            found["useful_tflop_s"] = round(self.tflop_s, 1)
        if self.tflop_s and self.rate:
            found["share_of_rate"] = round(1e12 * self.tflop_s / self.rate, 4)
        if memory := self.memory():
            found |= {"memory_gib": round(memory.now, 2), "memory_peak_gib": round(memory.peak, 2)}
        if self.expected:
            found["memory_forecast_gib"] = round(self.expected, 2)
        return found

    def surprise(self) -> str:
        """What to say of a peak that is not what was forecast; empty where it is, or where either is not known."""
        memory = self.memory()
        if not memory or not self.expected or abs(memory.peak / self.expected - 1) <= CLOSE:
            return ""
        return (
            f"a step has had {memory.peak:.1f} GiB in use at most, {memory.peak / self.expected - 1:+.0%} of the "
            f"{self.expected:.1f} that were forecast: what else dedistill plan says of memory is off as far"
        )

    def left(self, steps: int) -> str:
        """How long ``steps`` more take at the pace of the last ones; empty where there are none, or no pace yet."""
        if steps <= 0 or len(self._ends) < 2:
            return ""
        return f"{duration(steps * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1))} left"

    def __str__(self) -> str:
        if not self.seconds:
            return ""
        parts = [f"{self.seconds:.3g} s/step", f"{self.batch / self.seconds:.3g} samples/s"]
        if self.tflop_s:
            share = f" ({1e12 * self.tflop_s / self.rate:.0%} of this card's {self.rate / 1e12:.0f})" if self.rate else ""
            parts.append(f"{self.tflop_s:.3g} useful TFLOP/s{share}")
        if memory := self.memory():
            parts.append(f"{memory.now:.1f} GiB, at most {memory.peak:.1f} of {memory.total:.0f}")
        return ", ".join(parts)


def matmul_rate(device: torch.device, side: int = 8192, rounds: int = 10) -> float:
    """Operations per second of bf16 products of random matrices of that side on a GPU, in well under a second."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(2 * rounds):  # the first half warms up
        if i == rounds:
            start.record()
        a @ b
    end.record()
    torch.cuda.synchronize(device)
    return 2 * side**3 * rounds / (start.elapsed_time(end) / 1000)


# --- said: a live line on a terminal; elsewhere a plain line for the first step and then by time ----------------------------


EVERY = 15.0
"""Seconds between plain lines; as long without a step, what is going on is named."""
USUAL = ("training", "waiting for data")


def progress(rows: Iterable[dict[str, Any]], start: int, plan: Plan, pace: Pace) -> Iterator[dict[str, Any]]:
    """Pass rows through, showing a live line on a terminal and a plain line every so often elsewhere."""
    return _live(rows, start, plan, pace) if sys.stderr.isatty() else _plain(rows, plan, pace)


def _plain(rows: Iterable[dict[str, Any]], plan: Plan, pace: Pace) -> Iterator[dict[str, Any]]:
    said = 0.0
    with _Phases() as phases:
        for row in rows:
            special = row["step"] == plan.steps or "val_loss" in row or not row["applied"]
            if not said or special or time.monotonic() - said >= EVERY:
                said = phases.said = time.monotonic()
                print(
                    ", ".join(filter(None, [_line(row, plan), str(pace), pace.left(plan.steps - row["step"])])),
                    file=sys.stderr,
                    flush=True,
                )
            yield row


def _live(rows: Iterable[dict[str, Any]], start: int, plan: Plan, pace: Pace) -> Iterator[dict[str, Any]]:
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), _PhaseColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=plan.steps, completed=start, text="")
        held_out = ""
        for row in rows:
            held_out = f" held-out {row['val_loss']:.4f}" if "val_loss" in row else held_out
            text = ", ".join(filter(None, [_numbers(row) + held_out, str(pace), pace.left(plan.steps - row["step"])]))
            bar.update(task, completed=row["step"], text=text)
            yield row


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
