"""Weighted sums of snapshots: any number of them in one pass, in which every input is read once, front to back."""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dedistill.errors import UserError
from dedistill.files import make_folder
from dedistill.posthoc.snapshots import PREVIOUS, Snapshot
from dedistill.tensorfile import Layout, SealedReader, TensorFile

CHUNK = 1 << 16
"""Numbers of a tensor averaged at a time; with twenty inputs a few megabytes, about what a processor keeps near."""


@dataclass(frozen=True)
class Average:
    """One output: the weights of the snapshots, which add up to 1, and what made them."""

    path: Path
    weights: np.ndarray
    made_by: str

    def header(self, last: dict[str, str], snapshots: Sequence[Snapshot]) -> dict[str, str]:
        """That of the last snapshot, and every input with its hash and weight."""
        parts = [
            {"file": f"{s.path.parent.name}/{s.path.name}", "sha256": s.seal, "weight": float(w)}
            for s, w in zip(snapshots, self.weights)
        ]
        kept = {k: v for k, v in last.items() if k != PREVIOUS}
        return kept | {"format": "pt", "dedistill.ema": self.made_by, "dedistill.ema_inputs": json.dumps(parts)}


def write_averages(snapshots: Sequence[Snapshot], averages: Sequence[Average]) -> list[Path]:
    """Write the weighted sums of the snapshots' tensors, tensor by tensor; returns the files.

    Sums are float32 (float64 for float64) and rounded once to the inputs' dtype; ``.alpha`` buffers are copied. Memory is
    one chunk of every input and output. Raises UserError naming the snapshot, and nothing is written, when names, shapes or
    dtypes differ, or when the bytes are not those that were written.
    """
    make_folder(averages[0].path.parent)
    with ExitStack() as stack:
        readers = [stack.enter_context(SealedReader(s.path)) for s in snapshots]
        layout = agreed_layout(readers)
        writers = []
        for average in averages:
            header = average.header(readers[-1].metadata, snapshots)
            writers.append(stack.enter_context(TensorFile(average.path, layout, header, seal=True)))
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))  # reading, hashing and writing are most of the work
        for name, rows in _sums(readers, layout, np.stack([a.weights for a in averages]), pool):
            list(pool.map(lambda writer, row, name=name: writer.write(name, row), writers, rows))
        for reader in readers:
            reader.finish()
    return [a.path for a in averages]


def _sums(
    readers: list[SealedReader], layout: Layout, weights: np.ndarray, pool: ThreadPoolExecutor
) -> Iterator[tuple[str, Tensor]]:
    """(name, weighted sums [outputs, up to CHUNK]) through all tensors in the order of the files."""
    for name, (shape, dtype) in layout.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mix, left = torch.from_numpy(weights).to(wide), torch.Size(shape).numel()
        while left:
            size = min(left, CHUNK)
            rows = torch.empty(len(readers), size, dtype=dtype)
            list(pool.map(SealedReader.read_into, readers, rows))
            # alpha is a constant of the format, not a weight
            yield name, rows[-1:].expand(len(weights), -1) if is_constant(name) else (mix @ rows.to(wide)).to(dtype)
            left -= size


def is_constant(name: str) -> bool:
    return name.endswith(".alpha")


def agreed_layout(readers: Sequence[SealedReader]) -> Layout:
    """Names, shapes and dtypes of the tensors, in the order of the bytes. Raises UserError unless all files agree."""
    wanted, first = readers[0].layout, readers[0].path
    for reader in readers[1:]:
        found = reader.layout
        if odd := sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)):
            raise UserError(
                f"snapshot '{reader.path}' differs from '{first}' in {len(odd)} tensors, e.g. {odd[0]}: "
                f"{found.get(odd[0], 'missing')} against {wanted.get(odd[0], 'missing')}. They are not of one run."
            )
        if list(found) != list(wanted):
            raise UserError(f"snapshot '{reader.path}' has its tensors in another order than '{first}': not of one run")
    if not wanted:
        raise UserError(f"snapshot '{first}' is empty")
    if odd := [f"{name} {dtype}" for name, (_, dtype) in wanted.items() if not dtype.is_floating_point]:
        raise UserError(f"snapshot '{first}' holds tensors that cannot be averaged, e.g. {odd[0]}")
    return wanted
