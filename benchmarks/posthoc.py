"""Ten LERP averages of twenty snapshots: one pass over the files against a chain per alpha, as the model card's script does.

python -m benchmarks.posthoc
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.interleave import ratio, report
from dedistill.posthoc.lerp import ALPHAS, find_snapshots, lerp_snapshots, output_name

SNAPSHOTS, TENSORS, SIZE = 20, 12, 512 * 512


def chains(snapshots, out: Path) -> None:
    for alpha in ALPHAS:
        average = load_file(snapshots[0].path)
        for snapshot in snapshots[1:]:
            new = load_file(snapshot.path)
            for name, tensor in average.items():
                tensor.lerp_(new[name], alpha)
        save_file(average, out / output_name(alpha))


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source, a, b = (Path(folder) / name for name in ("snapshots", "a", "b"))
        for path in (source, a, b):
            path.mkdir()
        generator = torch.Generator().manual_seed(0)
        for step in range(1, SNAPSHOTS + 1):
            tensors = {f"t{i}": torch.randn(SIZE, generator=generator) for i in range(TENSORS)}
            save_file(tensors, source / f"step-{step:08d}.safetensors")
        snapshots = find_snapshots(source)
        row = ratio(lambda: lerp_snapshots(snapshots, ALPHAS, a), lambda: chains(snapshots, b), pairs=7, warmup=1)
    size = f"{SNAPSHOTS} snapshots of {TENSORS * SIZE * 4 / 1e6:.0f} MB, {len(ALPHAS)} alphas, one CPU thread"
    report("posthoc", {"one pass vs a chain per alpha": row}, f"{size}; > 1: ours is faster")


if __name__ == "__main__":
    main()
