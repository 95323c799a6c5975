"""The LERP chain of LibreFLUX: ema <- (1 - alpha) ema + alpha checkpoint, over all snapshots, for many alphas at once.

alpha is the weight of the *new* checkpoint, so alpha = .9 is nine tenths the last snapshot. A chain is a fixed linear
combination, hence one streaming pass: each input is read once, each output written once, in float32 until the end.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dedistill.errors import UserError
from dedistill.files import make_folder, step_of
from dedistill.tensorfile import DTYPES, TensorFile

ALPHAS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.975, 0.99, 0.995, 0.999)
"""The ten of the LibreFLUX model card."""

CHUNK = 1 << 18
"""Numbers of a tensor averaged at a time."""

_FLOATS = {name: dtype for dtype, name in DTYPES.items() if dtype.is_floating_point}


@dataclass(frozen=True)
class Snapshot:
    step: int
    path: Path


def find_snapshots(folder: Path) -> list[Snapshot]:
    """``step-*.safetensors`` of a run, in the order of their numbers. Raises UserError when there are fewer than two."""
    found = [(step_of(p), p) for p in folder.glob("step-*.safetensors")]
    snapshots = sorted((Snapshot(step, p) for step, p in found if step is not None), key=lambda s: s.step)
    if len(snapshots) < 2:
        raise UserError(f"'{folder}' holds {len(snapshots)} snapshots; an average needs at least two (set snapshot.every)")
    return snapshots


def chain_weights(alpha: float, count: int) -> np.ndarray:
    """Weight of each of ``count`` checkpoints, oldest first, float64: (1-a)^(n-1), a(1-a)^(n-2), ..., a. They add up to 1."""
    if not 0 < alpha <= 1:
        raise UserError(f"alpha = {alpha}: the weight of the newer checkpoint lies in (0, 1]", exit_code=2)
    age = np.arange(count - 1, -1, -1, dtype=np.float64)
    weights = alpha * (1 - alpha) ** age
    weights[0] = (1 - alpha) ** (count - 1)
    return weights


def describe(weights: np.ndarray, steps: Sequence[int]) -> tuple[float, float]:
    """(effective sample size 1 / sum w^2, mean age in steps behind the last snapshot)."""
    ages = steps[-1] - np.asarray(steps, dtype=np.float64)
    return float(1 / np.square(weights).sum()), float((weights * ages).sum())


def output_name(alpha: float) -> str:
    return f"alpha_linear_{alpha:g}.safetensors"


def lerp_snapshots(snapshots: list[Snapshot], alphas: Sequence[float], out: Path) -> list[Path]:
    """Write one average per alpha into ``out``, reading each snapshot's tensors once; returns the files.

    Peak memory is one chunk of every input and output. Outputs have the inputs' dtype, rounded once.
    Raises UserError when snapshots differ in names, shapes or dtypes, naming file and tensor; then nothing is written.
    """
    weights = np.stack([chain_weights(a, len(snapshots)) for a in alphas])
    make_folder(out)
    with ExitStack() as stack:
        files = [stack.enter_context(_open(s.path)) for s in snapshots]
        names = _agreed_names(snapshots, files)
        first = {name: files[0].get_slice(name) for name in names}
        layout = {name: (tuple(part.get_shape()), _FLOATS[part.get_dtype()]) for name, part in first.items()}
        writers = []
        for alpha, row in zip(alphas, weights):
            header = _metadata(files[-1].metadata() or {}, alpha, row, snapshots)
            writers.append(stack.enter_context(TensorFile(out / output_name(alpha), layout, header)))
        for name in names:
            for rows in _averages(name, files, weights):
                for writer, row in zip(writers, rows):
                    writer.write(name, row)
    return [w.path for w in writers]


def _averages(name: str, files: list, weights: np.ndarray) -> Iterator[Tensor]:
    """The weighted sums of one tensor, [alphas, chunk] at a time, in the tensor's own dtype."""
    tensors = [file.get_tensor(name).reshape(-1) for file in files]
    dtype = tensors[0].dtype
    if name.endswith(".alpha"):  # a constant of the format, not a weight
        yield tensors[-1].expand(len(weights), -1)
        return
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mix = torch.from_numpy(weights).to(wide)
    for start in range(0, len(tensors[0]), CHUNK):
        stack = torch.stack([t[start : start + CHUNK].to(wide) for t in tensors])
        yield (mix @ stack).to(dtype)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as e:
        raise UserError(f"snapshot '{path}' cannot be read: {e}. Remove it to average the others.") from e


def _agreed_names(snapshots: list[Snapshot], files: list) -> list[str]:
    def layout(file) -> dict[str, tuple]:
        return {n: (tuple(file.get_slice(n).get_shape()), file.get_slice(n).get_dtype()) for n in file.keys()}  # noqa: SIM118

    wanted = layout(files[0])
    for snapshot, file in zip(snapshots[1:], files[1:]):
        found = layout(file)
        if odd := sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n)):
            raise UserError(
                f"snapshot '{snapshot.path}' differs from '{snapshots[0].path}' in {len(odd)} tensors, e.g. {odd[0]}: "
                f"{found.get(odd[0], 'missing')} against {wanted.get(odd[0], 'missing')}. They are not of one run."
            )
    if not wanted:
        raise UserError(f"snapshot '{snapshots[0].path}' is empty")
    if odd := [f"{name} {dtype}" for name, (_, dtype) in wanted.items() if dtype not in _FLOATS]:
        raise UserError(f"snapshot '{snapshots[0].path}' holds tensors that cannot be averaged, e.g. {odd[0]}")
    return sorted(wanted)


def _metadata(metadata: dict[str, str], alpha: float, weights: np.ndarray, snapshots: list[Snapshot]) -> dict[str, str]:
    parts = [{"file": s.path.name, "weight": float(w)} for s, w in zip(snapshots, weights)]
    return {**metadata, "format": "pt", "dedistill.ema": f"lerp alpha={alpha:g}", "dedistill.ema_inputs": json.dumps(parts)}
