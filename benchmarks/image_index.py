"""What a kept index saves: 10,000 small images with captions, indexed again from the file against from nothing.

python -m benchmarks.image_index
"""

import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.interleave import ratio, report
from dedistill.data.images.index import build_index
from dedistill.data.images.types import ImageSet

IMAGES = 10_000


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, shards = Path(temporary) / "folder", Path(temporary) / "shards"
        folder.mkdir()
        shards.mkdir()
        rng = np.random.default_rng(0)
        for i in range(IMAGES):
            Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / f"{i:05d}.jpg")
            (folder / f"{i:05d}.txt").write_text(f"image {i}")
        with tarfile.open(shards / "00000.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
        rows = {}
        for path in (folder, shards):
            sources, file = [ImageSet(str(path))], Path(temporary) / f"{path.name}.jsonl"
            again = lambda: build_index(sources, file=file)  # noqa: B023, E731
            anew = lambda: build_index(sources)  # noqa: B023, E731
            rows[path.name] = ratio(again, anew, pairs=5, warmup=1)
    report("image_index", rows, f"{IMAGES:,} images of 64 x 48: time from nothing over time from the kept index")


if __name__ == "__main__":
    main()
