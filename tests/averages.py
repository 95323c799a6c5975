"""Averages of snapshots as most tests want them."""

from collections.abc import Sequence
from pathlib import Path

from dedistill.posthoc.profiles import chain_averages
from dedistill.posthoc.snapshots import Snapshot, write_averages


def lerp_snapshots(snapshots: Sequence[Snapshot], alphas: Sequence[float], out: Path) -> list[Path]:
    """Write one chain's average of the snapshots' tensors per alpha into ``out``."""
    return write_averages(snapshots, chain_averages(alphas, len(snapshots), out))
