"""Lists of images: .jsonl, .csv and .parquet say the same, and a wrong row or column is named."""

import csv
import io
import json
import os
import time
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import write_image
from PIL import Image

from dedistill.data.images import caption_files
from dedistill.data.images import index as module
from dedistill.data.images.index import build_index
from dedistill.data.images.types import ImageSet
from dedistill.errors import UserError

ROWS = [
    {"file_name": "a.png", "caption": "a cat", "short_caption": "cat", "license": "mit"},
    {"file_name": "sub/b.png", "caption": 'a dog, "big"\nand black', "short_caption": "", "license": "mit"},
]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "train"
    (root / "sub").mkdir(parents=True)
    for name, colour in (("a", "red"), ("sub/b", "blue")):
        Image.new("RGB", (16, 8), colour).save(root / f"{name}.png")
    return root


def write(folder, kind: str, rows: list[dict], name: str = "metadata"):
    path = folder / f"{name}.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif kind == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        path.write_text("\ufeff" + out.getvalue(), newline="")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("by", ["folder", "path"])
def test_lists(folder, kind, by):
    path = write(folder, kind, ROWS, "metadata" if by == "folder" else "mine")
    index = build_index([ImageSet(str(folder if by == "folder" else path), name="train")])
    assert {s.name: s.captions for s in index.samples} == {
        "train/a.png": ("a cat", "cat"),
        "train/sub/b.png": ('a dog, "big"\nand black',),
    }
    assert index.read(1) == (folder / "sub" / "b.png").read_bytes()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_of_captions(folder, kind):
    write(
        folder, kind, [{"file_name": "a.png", "captions": ["one", "two", "one"]}, {"file_name": "sub/b.png", "captions": ["x"]}]
    )
    assert [s.captions for s in build_index([ImageSet(str(folder))]).samples] == [("one", "two"), ("x",)]


def test_columns_can_be_chosen(folder):
    write(folder, "csv", ROWS)
    one = build_index([ImageSet(str(folder), fields=("license", "caption"))])
    assert one.samples[0].captions == ("mit", "a cat")
    other = ImageSet(str(folder), fields=("license",), file_column="file_name", split_lines=True)
    assert build_index([other]).samples[1].captions == ("mit",)


def test_the_only_column_of_text_holds_the_captions(folder):
    rows = [{"file_name": name, "beschreibung": "x", "width": 16} for name in ("a.png", "sub/b.png")]
    write(folder, "parquet", rows)
    assert [s.captions for s in build_index([ImageSet(str(folder))]).samples] == [("x",), ("x",)]


def test_several_rows_of_one_image_are_joined(folder):
    write(folder, "jsonl", [*ROWS, {"file_name": "a.png", "caption": "again"}])
    assert build_index([ImageSet(str(folder))]).samples[0].captions == ("a cat", "cat", "again")


def test_a_new_caption_in_the_list_reads_no_image(folder, tmp_path, monkeypatch):
    file = tmp_path / "index.jsonl"
    write(folder, "jsonl", ROWS)
    build_index([ImageSet(str(folder))], file=file)
    write(folder, "jsonl", [ROWS[0] | {"caption": "renamed"}, ROWS[1]])
    reads = []
    real = module.read_bytes
    monkeypatch.setattr(module, "read_bytes", lambda source, place: reads.append(place) or real(source, place))
    assert build_index([ImageSet(str(folder))], file=file).samples[0].captions == ("renamed", "cat")
    assert reads == []


def test_wrong_rows_are_left_out(folder):
    lines = [json.dumps(row) for row in ROWS]
    wrong = [
        "{",
        "[1]",
        '{"caption": "no file"}',
        '{"file_name": "a.png", "caption": 3}',
        '{"file_name": "gone.png", "caption": "x"}',
    ]
    wrong += ['{"file_name": "../../etc/passwd", "caption": "x"}', '{"file_name": "/etc/passwd", "caption": "x"}']
    wrong += ['{"file_name": "a\\u0000.png", "caption": "x"}', '{"file_name": "sub", "caption": "x"}']
    (folder / "metadata.jsonl").write_text("\n".join([lines[1], *wrong]))
    index = build_index([ImageSet(str(folder))])
    assert [s.name for s in index.samples] == ["train/sub/b.png"]
    reasons = {name.removeprefix("train/"): reason for name, reason in index.quarantined}
    assert "not JSON" in reasons["metadata.jsonl line 2"] and "JSON object" in reasons["metadata.jsonl line 3"]
    assert "no 'file_name'" in reasons["metadata.jsonl line 4"] and "line 5: 'caption' holds a int" in reasons["a.png"]
    assert "cannot be read: No such file" in reasons["gone.png"]
    assert all("lies outside" in reasons[name] for name in ("../../etc/passwd", "/etc/passwd"))
    assert "null" in reasons["a\0.png"] and "directory" in reasons["sub"]
    assert len(reasons) == len(wrong)


def test_csv_rows_of_the_wrong_length(folder):
    (folder / "metadata.csv").write_text("file_name,caption\na.png,a cat, black\nsub/b.png\nsub/b.png,ok\n")
    index = build_index([ImageSet(str(folder))])
    assert [s.captions for s in index.samples] == [("ok",)]
    assert [reason for _, reason in index.quarantined] == ["expected 2 fields"] * 2


def test_absolute_paths_inside_the_folder_are_fine(folder):
    write(folder, "csv", [{"file_name": str(folder / "a.png"), "text": "x"}])
    assert [s.name for s in build_index([ImageSet(str(folder))]).samples] == ["train/a.png"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"image": "a.png", "caption": "x"}], {}, r"no column 'file_name' that names the image \(columns: image, caption\)"),
        ([{"file_name": "a.png", "licence": "x", "author": "y"}], {}, r"several columns of text \(licence, author\)"),
        ([{"file_name": "a.png", "caption": "x"}], {"fields": ("blip",)}, r"no column 'blip'"),
        ([{"file_name": "a.png", "width": 3}], {}, r"no column with captions \(columns: file_name"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_wrong_columns(folder, kind, rows, options, message):
    write(folder, kind, rows)
    with pytest.raises(UserError, match=message):
        build_index([ImageSet(str(folder), **options)])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_unreadable_lists(folder, kind):
    (folder / f"metadata.{kind}").write_bytes(b"\xff\xfe\x00 no text")
    with pytest.raises(UserError, match=f"metadata.{kind}' cannot be read"):
        build_index([ImageSet(str(folder))])


TWO = {"train/a.png": ("a fox, red",), "train/sub/b.png": ("an owl",)}


@pytest.mark.parametrize(
    "text",
    [
        ',file_name,caption\n0,a.png,"a fox, red"\n1,sub/b.png,an owl\n',
        'file_name,,caption,,\na.png,7,"a fox, red",,\nsub/b.png,,an owl,8,\n',
        'file_name, caption\na.png, "a fox, red"\nsub/b.png, an owl\n',
        ' ,file_name , caption,\n,"a.png","a fox, red",\n\n,"sub/b.png",an owl,\n',
    ],
)
def test_columns_without_a_name_and_blanks_between_fields(folder, text):
    (folder / "metadata.csv").write_text(text)
    index = build_index([ImageSet(str(folder))])
    assert {s.name: s.captions for s in index.samples} == TWO and not index.quarantined


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file_name;caption\na.png;x\n", "separated by semicolons: save it with commas"),
        (b"file_name\tcaption\na.png\tx\n", "separated by tabs"),
        ("file_name,caption\na.png,x\n".encode("utf-16"), "UTF-16: save it as UTF-8"),
        (b"image,caption\na.png,x\n", r"file_column in \[\[data.sets\]\]"),
        (b"file_name,caption,caption\na.png,x,y\n", "two columns are called 'caption'"),
    ],
)
def test_tables_of_another_form_say_so(folder, content, message):
    (folder / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        build_index([ImageSet(str(folder))])


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.large_string()])
def test_text_in_parquet_however_it_is_kept(folder, kind):
    columns = {"file_name": ["a.png", "sub/b.png"], "text": ["a fox, red", "an owl"]}
    table = pa.table({name: pa.array(values).cast(kind) for name, values in columns.items()})
    pq.write_table(table, folder / "metadata.parquet")
    assert {s.name: s.captions for s in build_index([ImageSet(str(folder))]).samples} == TWO


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nulls_in_lists_of_captions(folder, kind):
    write(folder, kind, [{"file_name": "a.png", "captions": [None, "x", None]}, {"file_name": "sub/b.png", "captions": ["y"]}])
    assert [s.captions for s in build_index([ImageSet(str(folder))]).samples] == [("x",), ("y",)]


def test_tables_have_bounds(folder, monkeypatch):
    write(folder, "parquet", [{"file_name": "a.png", "text": "x" * 100}] * 50)
    monkeypatch.setattr(caption_files, "MAX_ROWS", 49)
    with pytest.raises(UserError, match="50 rows; the limit is 49"):
        build_index([ImageSet(str(folder))])
    monkeypatch.setattr(caption_files, "MAX_ROWS", 50)
    monkeypatch.setattr(caption_files, "MAX_TABLE_BYTES", 3000)  # the file itself is shorter, its texts are longer
    with pytest.raises(UserError, match="split it into several sets"):
        build_index([ImageSet(str(folder))])


@pytest.mark.parametrize(
    ("kind", "cell"),
    [(pa.binary(), b"x"), (pa.list_(pa.list_(pa.string())), [["x"]]), (pa.struct([("en", pa.string())]), {"en": "x"})],
)
@pytest.mark.parametrize("column", ["file_name", "text"])
def test_columns_that_hold_no_text_are_named(folder, kind, cell, column):
    cells = {"file_name": pa.array(["a.png"]), "text": pa.array(["x"])} | {column: pa.array([cell], kind)}
    pq.write_table(pa.table(cells), folder / "metadata.parquet")
    with pytest.raises(UserError, match=rf"metadata\.parquet.* no column .*no text: {column} of (binary|list|struct)"):
        build_index([ImageSet(str(folder))])


@pytest.mark.parametrize(
    ("rows", "good", "line"),
    [
        ('a.png,"he said\nsub/b.png,two\n', [], 2),
        ('a.png,"he said\nsub/b.png,"two"\n', [], 2),
        ('a.png,"one"\nsub/b.png,"a "sign" there"\n', ["one"], 3),
        (
            'a.png,"she said ""hi""\r\nand left"\r\nsub/b.png,no "quotes" here\r\n',
            ['she said "hi"\r\nand left', 'no "quotes" here'],
            0,
        ),
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_rows(folder, rows, good, line):
    (folder / "metadata.csv").write_text("file_name,caption\n" + rows, newline="")
    if good:
        index = build_index([ImageSet(str(folder))])
        assert [caption for s in index.samples for caption in s.captions] == good
        assert bool(line) == any(f"metadata.csv line {line}" in name and "quotes" in why for name, why in index.quarantined)
    else:
        with pytest.raises(UserError, match=f"metadata.csv' cannot be read: line {line}: its quotes do not match"):
            build_index([ImageSet(str(folder))])


@pytest.mark.parametrize("name", ["METADATA.CSV", "Metadata.csv"])
def test_the_list_of_a_folder_in_other_letters(folder, name):
    (folder / name).write_text("file_name,caption\na.png,one\nsub/b.png,two\n")
    assert [s.captions for s in build_index([ImageSet(str(folder))]).samples] == [("one",), ("two",)]


@pytest.mark.parametrize("name", ["captions.csv", "train.tsv", "meta.jsonl"])
def test_tables_that_are_not_read_are_told(folder, name):
    (folder / name).write_text("file_name,caption\na.png,one\n")
    with pytest.raises(UserError, match=f"no caption.* 1 table is not read: {name} .*metadata.csv"):
        build_index([ImageSet(str(folder))])
    for image in ("a", "sub/b"):
        (folder / f"{image}.txt").write_text(image)
    said: list[str] = []
    build_index([ImageSet(str(folder))], say=said.append)
    assert f"not read: {name}" in said[-1]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "data.parquet"])
def test_a_pipe_in_the_place_of_a_table_is_not_waited_for(folder, name):
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f"{name}.*not a regular file|no caption"):
        build_index([ImageSet(str(folder))])


@pytest.mark.parametrize("name", ["sub\\b.png", ".\\sub\\b.png", "./sub/../sub/b.png"])
def test_places_as_other_systems_write_them(folder, name):
    write(folder, "jsonl", [{"file_name": name, "text": "x"}, {"file_name": "sub/b.png", "text": "y"}])
    index = build_index([ImageSet(str(folder))])
    assert {s.name: s.captions for s in index.samples} == {"train/sub/b.png": ("x", "y")}


def test_backslashes_lead_out_of_no_folder(folder):
    Image.new("RGB", (16, 8)).save(folder.parent / "x.png")
    write(folder, "jsonl", [{"file_name": "..\\x.png", "text": "x"}, {"file_name": "a.png", "text": "y"}])
    assert "lies outside" in dict(build_index([ImageSet(str(folder))]).quarantined)["train/..\\x.png"]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_the_table_and_of_the_disk(folder, forms):
    on_disk, listed = (unicodedata.normalize(form, "Füchse.png") for form in forms)
    Image.new("RGB", (16, 8)).save(folder / on_disk)
    write(folder, "csv", [{"file_name": listed, "text": "foxes"}])
    assert [s.captions for s in build_index([ImageSet(str(folder))]).samples] == [("foxes",)]


def test_images_that_a_table_does_not_list_are_left_out_by_name(folder):
    write(folder, "jsonl", [{"file_name": "a.png", "text": "x"}])
    (folder / "sub" / "b.txt").write_text("an owl")
    index = build_index([ImageSet(str(folder))])
    assert index.quarantined == [("train/sub/b.png", "no good row of metadata.jsonl names it")]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_of_folders_below(folder, kind):
    """Hugging Face's layout: each split's table in its folder."""
    Image.new("RGB", (16, 8), "green").save(folder / "sub" / "c.png")
    (folder / "a.txt").write_text("a cat")
    write(folder / "sub", kind, [{"file_name": "b.png", "text": "an owl"}])
    index = build_index([ImageSet(str(folder))])
    assert {s.name: s.captions for s in index.samples} == {"train/a.png": ("a cat",), "train/sub/b.png": ("an owl",)}
    assert index.quarantined == [("train/sub/c.png", f"no good row of sub/metadata.{kind} names it")]
    assert index.read(1) == (folder / "sub" / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,text," + ",".join(f"c{i}" for i in range(100_000)) + "\nx.png,a" + ",b" * 100_000 + "\n"),
        ("metadata.csv", ",".join(f"c{i}" for i in range(100_000)) + "\n" + "a," * 99_999 + "b\n"),
        ("metadata.jsonl", "".join(json.dumps({"file_name": "x.png", f"k{i}": "y"}) + "\n" for i in range(30_000))),
    ],
    ids=["columns", "other columns", "keys"],
)
def test_many_columns_take_no_time_and_no_screen(tmp_path, name, text):
    write_image(tmp_path / "x.png", 96, 96, 0)
    (tmp_path / name).write_text(text)
    started = time.process_time()
    try:
        said = str(build_index([ImageSet(str(tmp_path))]).samples)
    except UserError as e:
        said = str(e)
        assert " more)" in said
    assert time.process_time() - started < 5 and len(said) < 2000, "0.5 s where it was measured"
