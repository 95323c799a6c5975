"""Compare two ways of doing one thing: in one process, in turn, as a ratio per pair. Absolute times are not reported."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def ratio(ours: Callable[[], object], theirs: Callable[[], object], *, pairs: int = 15, warmup: int = 2) -> dict:
    """``theirs`` over ``ours`` in seconds: median, least and greatest of interleaved pairs. Above 1, ours is faster."""
    for _ in range(warmup):
        ours(), theirs()
    ratios = []
    for i in range(pairs):
        first, second = (ours, theirs) if i % 2 == 0 else (theirs, ours)
        a, b = _seconds(first), _seconds(second)
        ratios.append(b / a if i % 2 == 0 else a / b)
    return {"median": round(statistics.median(ratios), 2), "least": round(min(ratios), 2), "greatest": round(max(ratios), 2)}


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def report(name: str, rows: dict[str, dict], setting: str) -> None:
    """Print the ratios and keep them in ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    print(f"{name}: {setting}")
    for label, row in rows.items():
        print(f"  {label:56} {row['median']:6.2f} ({row['least']:.2f} to {row['greatest']:.2f})")
    (RESULTS / f"{name}.json").write_text(json.dumps({"setting": setting, "ratios": rows}, indent=1) + "\n")
