"""Ten LERP averages of twenty snapshots: one pass over the files against a chain per alpha, as the model card's script does.

The script reads every snapshot once per alpha. While the files stay in the page cache that costs little; twenty adapters of
1.2 GB (605 million numbers in bfloat16) or more do not stay in most machines' memory. So both are measured: files in the
cache, and files that each chain has to read from the disk again. Ours hashes what it reads and writes, and waits until its
outputs are on the disk; the script does neither.

python -m benchmarks.posthoc        about 5 minutes, 2 GB of disk
"""

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from benchmarks.interleave import RESULTS, ratio
from dedistill.posthoc.profiles import ALPHAS, chain_averages, output_name
from dedistill.posthoc.snapshots import Snapshot, find_snapshots, write_averages, write_snapshot

SNAPSHOTS, TENSORS, SIZE = 20, 8, 1 << 20
PAIRS = 5


def script(snapshots: list[Snapshot], out: Path, before_chain: Callable[[], object] = lambda: None) -> None:
    out.mkdir(exist_ok=True)
    for alpha in ALPHAS:
        before_chain()
        average = load_file(snapshots[0].path)
        for snapshot in snapshots[1:]:
            new = load_file(snapshot.path)
            for name, tensor in average.items():
                tensor.lerp_(new[name], alpha)
        save_file(average, out / output_name(alpha))


def forget(snapshots: list[Snapshot]) -> None:
    """Take the files out of the page cache, as others would that did not fit beside them."""
    for snapshot in snapshots:
        with open(snapshot.path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make(folder: Path, dtype: torch.dtype) -> list[Snapshot]:
    generator = torch.Generator().manual_seed(0)
    for step in range(1, SNAPSHOTS + 1):
        tensors = {f"t{i}": torch.randn(SIZE, generator=generator).to(dtype) for i in range(TENSORS)}
        write_snapshot(folder, step, tensors, {"format": "pt"})
    return find_snapshots(folder)


def costs(action: Callable[[], object]) -> dict[str, float]:
    """Megabytes asked of and given to the system by read and write, and calls of fsync."""
    fsyncs, real = [], os.fsync
    before = _told()
    with mock.patch("os.fsync", lambda file: (fsyncs.append(file), real(file))):
        action()
    megabytes = {key: round((value - before[key]) / 1e6) for key, value in _told().items()}
    return {"read": megabytes["rchar"], "written": megabytes["wchar"], "fsyncs": len(fsyncs)}


def _told() -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+): (\d+)", Path("/proc/self/io").read_text())}


def compared(folder: Path, dtype: torch.dtype) -> dict:
    snapshots = make(folder / "snapshots", dtype)
    megabytes = round(snapshots[0].path.stat().st_size / 1e6)

    def ours() -> None:
        write_averages(snapshots, chain_averages(ALPHAS, len(snapshots), folder / "ours"))

    def theirs() -> None:
        script(snapshots, folder / "script")

    def ours_cold() -> None:
        forget(snapshots)
        ours()

    def theirs_cold() -> None:
        script(snapshots, folder / "script", lambda: forget(snapshots))

    found = {
        "megabytes_of_a_snapshot": megabytes,
        "ours": costs(ours),
        # its files are mapped, which is no read in the system's books: one per call of load_file
        "script": costs(theirs) | {"read": len(ALPHAS) * SNAPSHOTS * megabytes},
        "seconds_ratio": {
            "files in the page cache": ratio(ours, theirs, pairs=PAIRS, warmup=0),
            "files read from the disk": ratio(ours_cold, theirs_cold, pairs=PAIRS, warmup=0),
        },
    }
    print(json.dumps(found, indent=1), flush=True)
    return found


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with tempfile.TemporaryDirectory() as folder:
            results[name] = compared(Path(folder), dtype)
    setting = (
        f"{SNAPSHOTS} snapshots of {TENSORS * SIZE / 1e6:.0f} million numbers, {len(ALPHAS)} alphas, {os.cpu_count()} cores"
    )
    told = {"setting": f"{setting}; script over ours in seconds, > 1: ours is faster; megabytes", "results": results}
    (RESULTS / "posthoc.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
