"""Tables of the Hugging Face hub that hold the images themselves, in shards and groups of rows."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dedistill.cli.main import main
from dedistill.data.images import rows as module
from dedistill.data.images.index import build_index
from dedistill.data.images.types import ImageSet
from dedistill.data.usable import by_headers, look
from dedistill.errors import UserError
from dedistill.recipe import load_recipe

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(seed: int, side: int = 80) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def shard(path, images: list[bytes | None], kind=STRUCT, group: int = 3, **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = (
        images
        if kind != STRUCT
        else [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    )
    table = pa.table({"image": pa.array(cells, kind), **columns})
    pq.write_table(table, path, row_group_size=group)


@pytest.fixture
def hub(tmp_path):
    """Two shards of a hub's data set, in groups of three rows, beside its card."""
    root = tmp_path / "hub"
    for number in range(2):
        captions = pa.array([f"image {number} {i}" for i in range(8)])
        shard(root / f"data/train-{number:05d}-of-00002.parquet", [png(10 * number + i) for i in range(8)], text=captions)
    (root / "README.md").write_text("card")
    return root


def test_shards_of_a_hub_are_one_set(hub):
    """Captions, bytes, sizes and names of every row; read again, nothing is looked at twice."""
    file = hub.parent / "index.jsonl"
    index = build_index([ImageSet(str(hub))], file=file)
    assert [s.captions for s in index.samples] == [(f"image {n} {i}",) for n in range(2) for i in range(8)]
    assert index.samples[9].name == "hub/data/train-00001-of-00002.parquet::1" and index.samples[9].width == 80
    for i in (15, 0, 8, 3, 7):
        assert index.read(i) == png(10 * (i // 8) + i % 8)
    again = build_index([ImageSet(str(hub))], file=file)
    assert again.samples == index.samples
    assert len(build_index([ImageSet(str(hub / "data/train-00000-of-00002.parquet"))]).samples) == 8
    assert len(build_index([ImageSet(str(hub / "data"))]).samples) == 16


def test_a_changed_table_is_read_anew(hub):
    file = hub.parent / "index.jsonl"
    build_index([ImageSet(str(hub))], file=file)
    shard(hub / "data/train-00000-of-00002.parquet", [png(50)], text=pa.array(["new"]))
    index = build_index([ImageSet(str(hub))], file=file)
    assert [s.captions for s in index.samples][:2] == [("new",), ("image 1 0",)] and index.read(0) == png(50)


FIXED = pa.binary(len(png(0)))  # of noise: both have as many bytes


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT, FIXED, pa.dictionary(pa.int32(), pa.binary())])
@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"captions": pa.array([["a", None, "b"], ["c"]])}, [("a", "b"), ("c",)]),
        ({"text": pa.array(["x", "y"]).dictionary_encode(), "label": pa.array([1, 2])}, [("x",), ("y",)]),
        ({"prompt": pa.array(["x", "y"]).cast(pa.string_view())}, [("x",), ("y",)]),
        ({"short_caption": pa.array(["s", "t"]), "caption": pa.array(["l", None])}, [("s", "l"), ("t",)]),
    ],
)
def test_captions_are_chosen_as_in_other_tables(tmp_path, kind, columns, wanted):
    shard(tmp_path / "t.parquet", [png(0), png(1)], kind, **columns)
    assert [s.captions for s in build_index([ImageSet(str(tmp_path / "t.parquet"))]).samples] == wanted


def test_bad_rows_are_left_out_by_number(tmp_path):
    images = [png(0), None, b"no image", png(3)[:200], png(4)]
    shard(tmp_path / "t.parquet", images, text=pa.array(["a", "b", "c", "d", "e"]))
    index = build_index([ImageSet(str(tmp_path / "t.parquet"))])
    assert [s.captions for s in index.samples] == [("a",), ("e",)]
    reasons = dict(index.quarantined)
    assert reasons["t/t.parquet::1"] == "its row holds no bytes" and "not an image" in reasons["t/t.parquet::2"]
    assert len(reasons) == 3
    file = tmp_path / "t.parquet"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"no usable image.*t\.parquet: cannot be read"):
        build_index([ImageSet(str(tmp_path / "t.parquet"))])


def test_two_columns_of_text_must_be_chosen(tmp_path):
    shard(tmp_path / "t.parquet", [png(0)], author=pa.array(["x"]), licence=pa.array(["y"]))
    with pytest.raises(UserError, match=r"several columns of text \(author, licence\)"):
        build_index([ImageSet(str(tmp_path / "t.parquet"))])
    assert build_index([ImageSet(str(tmp_path / "t.parquet"), fields=("author",))]).samples[0].captions == ("x",)


def test_memory_is_that_of_a_group(tmp_path, monkeypatch):
    """Groups are read in turn, each once for images in their order, and two are kept; one beyond the limit is refused."""
    shard(tmp_path / "t.parquet", [png(i, 64) for i in range(30)], group=4, text=pa.array([f"{i}" for i in range(30)]))
    module._cells.cache_clear()
    index = build_index([ImageSet(str(tmp_path / "t.parquet"))])
    assert len(index.samples) == 30 and module._cells.cache_info().misses <= 12 and module._cells.cache_info().currsize == 2
    monkeypatch.setattr(module, "MAX_GROUP", 1000)
    module._cells.cache_clear()
    with pytest.raises(UserError, match=r"group of rows has [\d,]+ bytes; the limit is 1,000: write it in smaller groups"):
        build_index([ImageSet(str(tmp_path / "t.parquet"))])


def test_a_recipe_trains_on_a_table_of_images(hub, image_recipe):
    recipe = load_recipe(image_recipe, [f"data.sets.0.path={hub}"])
    assert by_headers(recipe).startswith("16 images by their headers, 16 of them usable")
    assert main(["train", str(image_recipe), "--set", f"data.sets.0.path={hub}"]) == 0
    assert len(look(recipe, lambda line: None).images) == 16
