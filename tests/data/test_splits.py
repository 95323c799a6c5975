"""Sets that are divided as the Hugging Face hub divides them: one split is a set, and what is left out is told."""

import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from image_files import write_images
from test_parquet_images import png, shard

from dedistill.cli.main import main
from dedistill.data.images.index import build_index
from dedistill.data.images.splits import split_of
from dedistill.data.images.types import ImageSet
from dedistill.data.usable import by_headers, look
from dedistill.errors import UserError
from dedistill.recipe import load_recipe

COUNTS = {"train": 4, "validation": 3, "test": 2}


def tables(root, names):
    for number, (split, name) in enumerate(zip(COUNTS, names)):
        captions = pa.array([f"{split} {i}" for i in range(COUNTS[split])])
        shard(root / name, [png(10 * number + i) for i in range(COUNTS[split])], text=captions)


def hub(root):
    tables(root, [f"data/{split}-00000-of-00001.parquet" for split in COUNTS])


def converted(root):
    """As the hub's own conversion to parquet has it, under other words."""
    tables(root, [f"default/{split}/0000.parquet" for split in ("train", "val", "test")])


def named(root):
    tables(root, ["cats_train.parquet", "cats.valid.2.parquet", "TEST.parquet"])


def folders(root):
    for number, (split, name) in enumerate(zip(COUNTS, ("training", "dev", "Test"))):
        write_images(root / name, COUNTS[split], first=10 * number)
        for file in (root / name).glob("*.txt"):
            file.write_text(f"{split} {file.stem}")


def tars(root):
    folders(root.parent / "plain")
    root.mkdir()
    for split, name in zip(COUNTS, ("training", "dev", "Test")):
        with tarfile.open(root / f"cats-{split}-0001.tar", "w") as tar:
            for file in sorted((root.parent / "plain" / name).iterdir()):
                tar.add(file, arcname=file.name)


LAYOUTS = [hub, converted, named, folders, tars]


def captions(root, **options) -> set[str]:
    """The splits of all images, by their captions."""
    samples = build_index([ImageSet(str(root), **options)]).samples
    found = {caption.split()[0] for s in samples for caption in s.captions}
    assert len(samples) == sum(COUNTS[split] for split in found)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_is_taken_unless_another_is_asked_for(tmp_path, layout):
    layout(tmp_path / "set")
    assert captions(tmp_path / "set") == {"train"}
    assert captions(tmp_path / "set", split="test") == {"test"}
    assert captions(tmp_path / "set", split="dev") == captions(tmp_path / "set", split="validation") == {"validation"}
    assert captions(tmp_path / "set", split="all") == {*COUNTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_left_out_is_told(tmp_path, layout):
    layout(tmp_path / "set")
    reasons = build_index([ImageSet(str(tmp_path / "set"))]).quarantined
    assert len(reasons) == 2 and all("'train' is taken" in reason and "data.sets.split" in reason for _, reason in reasons)
    with pytest.raises(UserError, match=r"has the splits test, train, validation and none 'full': choose one with"):
        build_index([ImageSet(str(tmp_path / "set"), split="full")])


@pytest.mark.parametrize("layout", [hub, folders])
def test_the_path_of_a_split_is_that_split(tmp_path, layout):
    layout(tmp_path / "set")
    path = next(p for p in (tmp_path / "set").rglob("*") if p.name.lower().startswith("test"))
    assert captions(path) == {"test"}


def test_without_train_one_is_to_be_chosen(tmp_path):
    tables(tmp_path / "set", ["data/cats-00000-of-00001.parquet", "data/dogs-00000-of-00001.parquet"])
    with pytest.raises(UserError, match=r"has the splits cats, dogs and none 'train'"):
        build_index([ImageSet(str(tmp_path / "set"))])
    assert len(build_index([ImageSet(str(tmp_path / "set"), split="dogs")]).samples) == COUNTS["validation"]
    (tmp_path / "set/data/dogs-00000-of-00001.parquet").unlink()
    assert len(build_index([ImageSet(str(tmp_path / "set"))]).samples) == COUNTS["train"], "one alone is the set"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00003-of-00010-0123456789abcdef.parquet", "train"),
        ("default.v2-00000-of-00001.parquet", "default.v2"),
        ("eval.tar", "test"),
        ("shard-000001.tar", ""),
        ("portrait.tar", ""),  # train is a part of no word
        ("trains-1.tar", ""),
        ("00000.parquet", ""),
    ],
)
def test_words_of_names(name, split):
    assert split_of(name) == split


def test_images_called_so_are_images(tmp_path):
    """Names of single images and of other folders divide nothing."""
    write_images(tmp_path / "set/testimonials", 2)
    write_images(tmp_path / "set/train", 2, first=5)
    (tmp_path / "set/testimonials/p00.png").rename(tmp_path / "set/testimonials/test.png")
    (tmp_path / "set/testimonials/p00.txt").rename(tmp_path / "set/testimonials/test.txt")
    assert len(build_index([ImageSet(str(tmp_path / "set"))]).samples) == 4


def test_a_recipe_names_the_split(tmp_path, image_recipe, capsys):
    hub(tmp_path / "set")
    settings = [f"data.sets=[{{path='{tmp_path / 'set'}', split='val'}}]"]
    recipe = load_recipe(image_recipe, settings)
    assert len(look(recipe, print).images) == COUNTS["validation"]
    assert by_headers(recipe).startswith(
        "3 images by their headers, 3 of them usable; 2 left out, e.g. data/test-00000-of-00001.parquet: of split 'test'"
    )
    assert main(["scan", str(tmp_path / "set"), "--split", "test"]) == 0
    assert "2 images" in capsys.readouterr().out
    assert main(["scan", str(tmp_path / "set/data/test-00000-of-00001.parquet"), "--split", "test"]) == 2
    assert "data.sets.split chooses among splits of a folder" in capsys.readouterr().err


def test_folders_within_folders_have_an_end(tmp_path, monkeypatch):
    """As deep as a path can be written; Python's own stack is not."""
    write_images(tmp_path / "set", 2)
    monkeypatch.chdir(tmp_path / "set")
    for _ in range(1200):
        os.mkdir("a")
        os.chdir("a")
    index = build_index([ImageSet(str(tmp_path / "set"))])
    assert len(index.samples) == 2 and ["not looked into" in reason for _, reason in index.quarantined] == [True]
    while Path.cwd() != tmp_path / "set":  # pytest could not remove them
        os.chdir("..")
        os.rmdir("a")
