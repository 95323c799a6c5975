"""metrics.jsonl: the record of a run, one JSON object per line, the same bytes for the same recipe.

Wall-clock times go to timings.jsonl, so that two runs can be compared byte for byte.
"""

import json
import netrc
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol

from dedistill.errors import amount
from dedistill.io.atomic import WholeFile, refused, sync

if TYPE_CHECKING:
    from dedistill.runs.directory import RunDirectory

WANDB_HOST = "api.wandb.ai"
WAITING = 1000
"""Rows that may wait for W&B."""
LAST_WORDS = 30.0
"""Seconds that W&B gets at the end of a run."""

Row = dict[str, object]
"""What is known of a step when it is done: JSON."""


class JsonlWriter:
    """Append-only JSON lines. Rows of steps after ``step`` are cut off on opening: a continued run writes them again.

    rows: how many were kept.
    """

    def __init__(self, path: Path, step: int):
        self.path, self.rows = path, 0
        with WholeFile(path) as kept:
            for line, row in _rows(path):
                if row["step"] <= step:
                    kept.write(line.encode())
                    self.rows += 1
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as the run

    def write(self, row: Row) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
        except OSError as e:
            raise refused(self.path, e) from e

    def sync(self) -> None:
        """Before a checkpoint: a run that goes on from there must find every row up to it, also after a loss of power."""
        sync(self.path)

    def close(self) -> None:
        with suppress(OSError):  # every line went out when it was written; a full disk was reported then
            self._file.close()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole row of a JSON Lines file one by one, also of one that is being written or whose last write was cut off."""
    return (row for _, row in _rows(path))


def last_step(path: Path) -> int:
    """The step of its last row; 0 without one."""
    return max((row["step"] for row in deque(read_rows(path), maxlen=1)), default=0)


class MetricsLogger:
    """metrics.jsonl and timings.jsonl of a run, opened together. Seconds are kept out of the first, the deterministic one."""

    def __init__(self, run: "RunDirectory", step: int):
        self.metrics, self.timings = JsonlWriter(run.metrics, step), JsonlWriter(run.timings, step)
        self._last = time.monotonic()

    def write(self, row: Row, timing: dict[str, float]) -> None:
        """timing: what belongs into the second, beside the seconds since the last row."""
        self.metrics.write(row)
        now = time.monotonic()
        self.timings.write({"step": row["step"], "seconds": round(now - self._last, 4), **timing})
        self._last = now

    def reopened(self, run: "RunDirectory", step: int) -> "MetricsLogger":
        """Those of a run that is rolled back to ``step``."""
        self.close()
        return MetricsLogger(run, step)

    def sync(self) -> None:
        self.metrics.sync()

    def close(self) -> None:
        self.metrics.close()
        self.timings.close()


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines and their rows; a torn one (a killed write) is left out, and what is no row."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            if line.endswith("\n") and (row := _row(line)) is not None:
                yield line, row


def _row(line: str) -> dict[str, Any] | None:
    try:
        row, end = _decode(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int) or not line[end:].isspace():
        return None
    if "sigma_loss" in row:
        numbers = row["sigma_loss"]
        if not isinstance(numbers, list) or not _NUMBERS.issuperset(map(type, numbers)):
            return None
    if not _SAMPLES.isdisjoint(row):
        for samples in (row[key] for key in _SAMPLES if key in row):
            if not isinstance(samples, list) or not all(isinstance(sample, dict) and "sample" in sample for sample in samples):
                return None
    return row


_decode = json.JSONDecoder().raw_decode
_NUMBERS = {int, float, type(None)}


_SAMPLES = frozenset(("quarantined", "not_finite", "spike"))
"""Keys of a row whose values are lists of samples."""


def _has_key() -> bool:
    """Whether W&B would find a key: in the environment, or where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc")
    except (OSError, netrc.NetrcParseError):
        return False
    return WANDB_HOST in known.hosts


class Tracking(Protocol):
    """What an ``accelerate.Accelerator`` does for a run's log."""

    def init_trackers(self, project_name: str, *, config: dict[str, object], init_kwargs: dict[str, object]) -> None: ...

    def log(self, values: dict[str, object], *, step: int) -> None: ...

    def end_training(self) -> None: ...


class Trackers:
    """Weights & Biases through accelerate, in a thread of its own: it may refuse, fail or hang, and a run does not notice.

    Offline without a key. Rows wait in a queue; those that find it full are left out, and counted.
    """

    def __init__(self, accelerator: Tracking, name: str, config: dict[str, object], folder: Path):
        self.rows: Queue[tuple[Row, int] | None] = Queue(WAITING)
        self.left_out, self.failed = 0, False
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        os.environ.setdefault("WANDB_SILENT", "true")
        settings = {"wandb": {"name": name, "mode": mode, "dir": str(folder)}}
        work = (accelerator, config, settings)
        self.thread = Thread(target=self._work, args=work, name="wandb", daemon=True)
        self.thread.start()
        if mode == "offline":
            print(f"W&B: no key, logging offline; later: wandb sync {folder}/wandb/offline-run-*", file=sys.stderr)

    def log(self, row: Row, step: int) -> None:
        """Never waits."""
        if not self.thread.is_alive():
            return
        try:
            self.rows.put_nowait((row, step))
        except Full:
            self.left_out += 1

    def close(self) -> None:
        """Wait for what is under way, but not for long."""
        with suppress(Full):
            self.rows.put(None, timeout=LAST_WORDS)
        self.thread.join(LAST_WORDS)
        if self.thread.is_alive():
            print(f"W&B does not answer and is left alone after {LAST_WORDS} s; metrics.jsonl has everything", file=sys.stderr)
        if self.left_out and not self.failed:
            print(f"W&B was too slow for {amount(self.left_out, 'row')}; metrics.jsonl has all", file=sys.stderr)

    def _work(self, accelerator: Tracking, config: dict[str, object], settings: dict[str, object]) -> None:
        try:
            accelerator.init_trackers("dedistill", config=config, init_kwargs=settings)
            while item := self.rows.get():
                row, step = item
                accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)
            accelerator.end_training()
        except Exception as e:  # any failure of a logging service is survivable
            self.failed = True
            print(f"W&B failed ({e}) and is switched off; metrics.jsonl has everything", file=sys.stderr)
