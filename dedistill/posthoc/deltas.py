"""Averages of what adapters do to the weights, not of their factors.

Averaging two Kronecker or low-rank factors is not averaging their product: for a LERP the two differ by
alpha (1 - alpha) (A2 - A1) x (B2 - B1). A sum of deltas leaves the adapter's form, so it is kept dense, which is exact, or
brought back to the nearest adapter of the same sizes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dedistill.adapters.delta import scale
from dedistill.adapters.naming import layer_of
from dedistill.errors import UserError
from dedistill.io.atomic import allow_open_files, make_folder
from dedistill.io.safetensors import ChecksummedReader, Layout, TensorFile
from dedistill.posthoc.snapshots import Average, Snapshot, agreed_layout, read_finite

LORA = {"lora_up.weight", "lora_down.weight"}
LOKR = {"lokr_w1", "lokr_w2"}
LOKR_LOW = {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}

Factors = dict[str, list[Tensor]]
"""Name of a factor of one layer -> that factor in each snapshot."""


@dataclass(frozen=True)
class LowRankDeltas:
    """Deltas of one layer in all snapshots, as columns whose outer products, weighted and added up, are their average.

    left [m, k], right [n, k]: each snapshot has k / snapshots neighbouring columns. The sum [m, n] is the weight itself
    for a LoRA, and the rearranged one (Van Loan and Pitsianis 1993) for a LoKr, of which each delta is a single product.
    """

    left: Tensor
    right: Tensor
    blocks: tuple[int, int, int, int] | None
    """LoKr: rows and columns of the first factor, then of the second."""

    def columns(self, weights: np.ndarray) -> Tensor:
        """The weight of each column, for the ``weights`` of the snapshots."""
        return torch.from_numpy(weights).to(self.left.dtype).repeat_interleave(self.left.shape[1] // len(weights))

    def dense(self, weights: np.ndarray) -> Tensor:
        """The average change of weight [out, in], or [out, in h w] of a convolution."""
        total = (self.left * self.columns(weights)) @ self.right.T
        if self.blocks is None:
            return total
        a, b, c, d = self.blocks
        return total.reshape(a, b, c, d).transpose(1, 2).reshape(a * c, b * d)


def low_rank_deltas(factors: Factors) -> LowRankDeltas:
    """Raises UserError for another kind of layer than LoKr and LoRA as this program trains them."""
    per_snapshot = [{name: tensors[i] for name, tensors in factors.items()} for i in range(len(next(iter(factors.values()))))]
    kind = factors.keys() - {"alpha"}
    if kind == LORA:
        left = [f["lora_up.weight"].float().flatten(1) * scale(f) for f in per_snapshot]
        right = [f["lora_down.weight"].float().flatten(1).T for f in per_snapshot]
        return LowRankDeltas(torch.cat(left, 1), torch.cat(right, 1), None)
    if kind not in (LOKR, LOKR_LOW):
        raise UserError(f"factors {', '.join(sorted(kind))} are neither LoKr nor LoRA: average them with --space factors")
    seconds = [
        f["lokr_w2"].float().flatten(1) if kind == LOKR else f["lokr_w2_a"].float() @ f["lokr_w2_b"].float()
        for f in per_snapshot
    ]
    left = [f["lokr_w1"].float().reshape(-1) * scale(f) for f in per_snapshot]
    blocks = (*factors["lokr_w1"][0].shape, *seconds[0].shape)
    return LowRankDeltas(torch.stack(left, 1), torch.stack([s.reshape(-1) for s in seconds], 1), blocks)


@dataclass
class ApproximationError:
    """Squared sizes, which add up over layers: of the averages of deltas, and of what their new factors miss."""

    wanted: float = 0.0
    missed: float = 0.0

    def __add__(self, other: "ApproximationError") -> "ApproximationError":
        return ApproximationError(self.wanted + other.wanted, self.missed + other.missed)

    @property
    def error(self) -> float:
        """|new - wanted| / |wanted| in the Frobenius norm."""
        return math.sqrt(self.missed / self.wanted) if self.wanted else 0.0


def refactored(factors: Factors, rows: np.ndarray) -> Iterator[tuple[dict[str, Tensor], ApproximationError]]:
    """For each row of snapshot weights, the layer's nearest factors of the sizes that they have, and what is lost."""
    deltas, last = low_rank_deltas(factors), {name: tensors[-1] for name, tensors in factors.items()}
    # the sum has at most k columns, far fewer than the weight has: after QR of both sides the SVD is of [k, k]
    (q_left, left), (q_right, right) = (torch.linalg.qr(side.double()) for side in (deltas.left, deltas.right))
    rank = 1 if deltas.blocks else factors["lora_up.weight"][0].shape[1]
    for weights in rows:
        u, sizes, v = torch.linalg.svd((left * deltas.columns(weights)) @ right.T, full_matrices=False)
        kept = sizes[:rank].sqrt()  # half of each singular value to either factor, as training leaves them
        first, second = (q @ vectors[:, :rank] * kept for q, vectors in ((q_left, u), (q_right, v.T)))
        error = ApproximationError(float(sizes.square().sum()), float(sizes[rank:].square().sum()))
        if deltas.blocks is None:
            new = {"lora_up.weight": _padded(first, rank) / scale(last), "lora_down.weight": _padded(second, rank).T}
        else:
            new, lost = _kronecker(first, second, deltas.blocks, last)
            error.missed += lost
        own = {name: tensor.to(last[name].dtype).reshape(last[name].shape).contiguous() for name, tensor in new.items()}
        yield own | {n: t for n, t in last.items() if n == "alpha"}, error


def _padded(columns: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(columns, (0, rank - columns.shape[1]))


def _kronecker(
    first: Tensor, second: Tensor, blocks: tuple[int, int, int, int], last: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], float]:
    """(factors of a LoKr from its two vectors, squared size of what a second factor of low rank loses)."""
    a, b, c, d = blocks
    # a product of vectors is the same with both signs turned; the sign of before keeps averages comparable
    sign = 1.0 if float((first.reshape(a, b) * last["lokr_w1"].double()).sum()) >= 0 else -1.0
    # the first factor stays as large as it was: the two are trained at the same rate
    size = float(last["lokr_w1"].double().norm() / first.norm()) * sign if float(first.norm()) else 1.0
    w1, w2 = first.reshape(a, b) * size, second.reshape(c, d) / (size * scale(last))
    if "lokr_w2" in last:
        return {"lokr_w1": w1, "lokr_w2": w2}, 0.0
    rank = last["lokr_w2_b"].shape[0]
    u, sizes, v = torch.linalg.svd(w2, full_matrices=False)
    kept = sizes[:rank].sqrt()
    lost = float((w1.norm() * scale(last)) ** 2 * sizes[rank:].square().sum())
    return {"lokr_w1": w1, "lokr_w2_a": u[:, :rank] * kept, "lokr_w2_b": kept[:, None] * v[:rank]}, lost


def write_dense(snapshots: Sequence[Snapshot], averages: Sequence[Average]) -> None:
    """Write the averages of the deltas as they are: ``<layer>.diff``, float32. Merging takes such a file.

    Memory is one layer of all snapshots and one dense delta. Raises UserError as :func:`stream.write_averages`.
    """

    def layout(own: Layout) -> Layout:
        sizes = {layer: {f: own[f"{layer}.{f}"][0] for f in found} for layer, found in _groups(own).items()}
        return {f"{layer}.diff": (_shape(found), torch.float32) for layer, found in sizes.items()}

    def parts(layer: str, factors: Factors, rows: np.ndarray) -> Iterator[dict[str, Tensor]]:
        deltas = low_rank_deltas(factors)
        return ({f"{layer}.diff": deltas.dense(row)} for row in rows)

    _write(snapshots, averages, layout, parts)


def write_refactored(snapshots: Sequence[Snapshot], averages: Sequence[Average]) -> list[ApproximationError]:
    """Write the averages of the deltas as adapters of the snapshots' own sizes; what each of them loses, over all layers.

    Raises UserError as :func:`stream.write_averages`.
    """
    lost = [ApproximationError() for _ in averages]

    def layout(own: Layout) -> Layout:
        return {f"{layer}.{f}": own[f"{layer}.{f}"] for layer, found in _groups(own).items() for f in found}

    def parts(layer: str, factors: Factors, rows: np.ndarray) -> Iterator[dict[str, Tensor]]:
        for i, (new, error) in enumerate(refactored(factors, rows)):
            lost[i] += error
            yield {f"{layer}.{name}": new[name] for name in factors}

    _write(snapshots, averages, layout, parts)
    return lost


def _write(
    snapshots: Sequence[Snapshot],
    averages: Sequence[Average],
    layout: Callable[[Layout], Layout],
    parts: Callable[[str, Factors, np.ndarray], Iterator[dict[str, Tensor]]],
) -> None:
    """One pass over the snapshots, layer by layer, which writes what ``parts`` makes of each for every average."""
    make_folder(averages[0].path.parent)
    allow_open_files(len(snapshots) + len(averages))
    with ExitStack() as stack:
        readers = [stack.enter_context(ChecksummedReader(s.path)) for s in snapshots]
        own = agreed_layout(readers)
        writers = []
        for average in averages:
            header = average.header(readers[-1].metadata, snapshots)
            writers.append(stack.enter_context(TensorFile(average.path, layout(own), header, checksum=True)))
        rows = np.stack([a.weights for a in averages])
        for layer, factors in _layers(readers, own):
            for writer, tensors in zip(writers, parts(layer, factors, rows)):
                for name, tensor in tensors.items():
                    writer.write(name, tensor)
        for reader in readers:
            reader.finish()


def _layers(readers: list[ChecksummedReader], layout: Layout) -> Iterator[tuple[str, Factors]]:
    """(layer, its factors in all snapshots) as soon as the last of them has been read, in the order of :func:`_groups`."""
    groups = _groups(layout)
    begun: dict[str, Factors] = {}
    for name, (shape, dtype) in layout.items():
        tensors = [torch.empty(shape, dtype=dtype) for _ in readers]
        for reader, tensor in zip(readers, tensors):
            read_finite(reader, tensor, name)
        # factors of a layer may lie apart in the file; only the layers that are begun are in memory
        layer = layer_of(name)
        begun.setdefault(layer, {})[name.removeprefix(f"{layer}.")] = tensors
        if len(begun[layer]) == len(groups[layer]):
            yield layer, begun.pop(layer)


def _groups(layout: Layout) -> dict[str, list[str]]:
    """Layer -> its factors, in the order in which layers are complete."""
    last = {layer_of(name): i for i, name in enumerate(layout)}
    found: dict[str, list[str]] = {}
    for name in layout:
        layer = layer_of(name)
        found.setdefault(layer, []).append(name.removeprefix(f"{layer}."))
    return {layer: found[layer] for layer in sorted(found, key=last.__getitem__)}


def _shape(sizes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    """[out, in], or [out, in h w] of a convolution, from the shapes of its factors."""
    if "lora_up.weight" in sizes:
        return sizes["lora_up.weight"][0], math.prod(sizes["lora_down.weight"][1:])
    if "lokr_w1" not in sizes:
        raise UserError("the snapshots hold no LoKr or LoRA: take --space factors, which is exact for whole weights")
    rows, *columns = sizes["lokr_w2"] if "lokr_w2" in sizes else (sizes["lokr_w2_a"][0], sizes["lokr_w2_b"][1])
    return sizes["lokr_w1"][0] * rows, sizes["lokr_w1"][1] * math.prod(columns)
