"""The index of images: what it finds, what it leaves out and why, and how little a second look reads."""

import hashlib
import io
import json
import os
import tarfile
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dedistill.data.images import index as module
from dedistill.data.images.index import Index, Limits, build_index
from dedistill.data.images.types import ImageSet
from dedistill.data.usable import caption_words
from dedistill.errors import UserError


def jpeg(seed: int = 0, size: tuple[int, int] = (24, 16)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Five images in two folders, each with a caption."""
    root = tmp_path / "photos"
    (root / "deep" / "er").mkdir(parents=True)
    for i, name in enumerate(["b", "a", "deep/c", "deep/er/d", "deep/e.f"]):
        (root / f"{name}.jpg").write_bytes(jpeg(i, (24 + i, 16)))
        (root / f"{name}.txt").write_text(f"caption of {name}")
    return root


@pytest.fixture
def reads(monkeypatch):
    """Counts what is read, by file."""
    counter = Counter()
    real = module.read_bytes

    def counting(root, place):
        counter[place.file] += 1
        return real(root, place)

    monkeypatch.setattr(module, "read_bytes", counting)
    return counter


def touch(path, content: bytes | str) -> None:
    """Write, with a time of change that differs for certain."""
    before = path.stat().st_mtime_ns if path.exists() else time.time_ns()
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def names(index) -> list[str]:
    return [sample.name.removeprefix("photos/") for sample in index.samples]


def test_folder(folder):
    index = build_index([ImageSet(str(folder))])
    assert names(index) == ["a.jpg", "b.jpg", "deep/c.jpg", "deep/e.f.jpg", "deep/er/d.jpg"]
    assert index.quarantined == []
    for i, sample in enumerate(index.samples):
        data = (folder / sample.name.removeprefix("photos/")).read_bytes()
        assert index.read(i) == data and sample.sha256 == hashlib.sha256(data).hexdigest()
        assert (sample.width, sample.height) == Image.open(io.BytesIO(data)).size
        assert sample.captions == (f"caption of {sample.name.removeprefix('photos/').removesuffix('.jpg')}",)
        assert sample.source == 0


def test_captions_of_all_files_are_joined(folder):
    (folder / "a.txt").write_text("short\nlonger")
    (folder / "a.caption").write_text("third")
    (folder / "a.json").write_text(json.dumps({"caption": "short", "captions": ["fourth"], "mine": "fifth"}))
    assert build_index([ImageSet(str(folder))]).samples[0].captions == ("short", "longer", "third", "fourth")
    one = ImageSet(str(folder), fields=("mine",), split_lines=False)
    assert build_index([one]).samples[0].captions == ("short\nlonger", "third", "fifth")


def test_lines_as_captions_are_told_once_and_to_who_scans_or_encodes(folder):
    (folder / "a.txt").write_text("one\ntwo")
    (folder / "b.txt").write_text("three\nfour")
    said = []
    index = build_index([ImageSet(str(folder))], say=said.append)
    assert not any("split_lines" in line for line in said)
    told = caption_words(index)
    assert sum("one | two" in line for line in told) == 1 and not any("three" in line for line in told)
    assert any("set data.split_lines = 'never'" in line for line in told)
    (folder / "c.json").write_text('{"captions": ["several", "of a list"]}')
    for name in "ab":
        (folder / f"{name}.txt").write_text("one")
    assert not any("split_lines" in line for line in caption_words(build_index([ImageSet(str(folder))])))


def test_bad_files_are_left_out_with_reasons(folder):
    whole = jpeg(9, (64, 64))
    hurt = {
        "cut.jpg": whole[: len(whole) // 2],
        "empty.png": b"",
        "page.webp": b"<html>",
        "phone.heic": b"\0\0\0\x18ftypheic" + bytes(100),
        "wrong.jpg": whole,
        "broken.jpg": whole,
        "big.jpg": whole + bytes(20_000),
        "wide.jpg": jpeg(1, (400, 8)),
    }
    for name, data in hurt.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text("a caption")
    (folder / "wrong.txt").write_bytes("café".encode("latin-1"))
    (folder / "broken.json").write_text("{")
    said = []
    index = build_index([ImageSet(str(folder))], say=said.append, limits=Limits(max_pixels=3000, max_bytes=10_000))
    reasons = {name.removeprefix("photos/"): reason for name, reason in index.quarantined}
    limits_hit = {"wide.jpg": "400 x 8 pixels", "big.jpg": "the limit is 10,000"}
    reasons_64 = {"wrong.jpg", "broken.jpg", "cut.jpg"}  # 64 x 64 is over 3,000 pixels
    assert reasons.keys() == hurt.keys() and names(index) == ["a.jpg", "b.jpg", "deep/c.jpg", "deep/e.f.jpg", "deep/er/d.jpg"]
    for name, reason in limits_hit.items():
        assert reason in reasons[name]
    assert all("64 x 64 pixels" in reasons[name] for name in reasons_64)
    assert "left out 8" in said[0]
    reasons = dict(build_index([ImageSet(str(folder))]).quarantined)
    assert "truncated" in reasons["photos/cut.jpg"] and "empty" in reasons["photos/empty.png"]
    assert "not an image" in reasons["photos/page.webp"] and "not an image" in reasons["photos/phone.heic"]
    assert (
        "its .txt file: not UTF-8" in reasons["photos/wrong.jpg"] and "its .json file: not JSON" in reasons["photos/broken.jpg"]
    )
    assert "photos/big.jpg" not in reasons and "photos/wide.jpg" not in reasons


def test_missing_captions(folder, tmp_path):
    for name in ("a.txt", "b.txt"):
        (folder / name).unlink()
    file = tmp_path / "index.jsonl"
    with pytest.raises(UserError, match=r"2 of 5 images have no caption: photos/a.jpg, photos/b.jpg\. .*missing_captions"):
        build_index([ImageSet(str(folder))], file=file)
    quarantine = build_index([ImageSet(str(folder), missing_captions="quarantine")], file=file)
    assert quarantine.quarantined == [("photos/a.jpg", "no caption"), ("photos/b.jpg", "no caption")]
    assert len(quarantine.samples) == 3
    empty = build_index([ImageSet(str(folder), missing_captions="empty")], file=file)
    assert [s.captions for s in empty.samples[:2]] == [("",), ("",)] and len(empty.samples) == 5
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="no caption"):
        build_index([ImageSet(str(folder))], file=file)


def test_a_rerun_reads_only_what_changed(folder, tmp_path, reads):
    file = tmp_path / "index.jsonl"
    sources = [ImageSet(str(folder))]
    first = build_index(sources, file=file)
    assert len(reads) == 10 and set(reads.values()) == {1}
    reads.clear()
    stamp = file.stat().st_mtime_ns
    again = build_index(sources, file=file)
    assert not reads and again.samples == first.samples
    assert file.stat().st_mtime_ns == stamp, "an unchanged index was written again"

    touch(folder / "a.txt", "a new caption")
    assert build_index(sources, file=file).samples[0].captions == ("a new caption",)
    assert reads == {"a.txt": 1}, "the image was read again for a new caption"
    reads.clear()

    touch(folder / "b.jpg", jpeg(77))
    (folder / "deep" / "c.jpg").unlink()
    (folder / "deep" / "new.jpg").write_bytes(jpeg(5))
    (folder / "deep" / "new.json").write_text('{"caption": "new"}')
    index = build_index(sources, file=file)
    assert names(index) == ["a.jpg", "b.jpg", "deep/e.f.jpg", "deep/er/d.jpg", "deep/new.jpg"]
    assert index.samples[1].sha256 == hashlib.sha256(jpeg(77)).hexdigest()
    assert set(reads) == {"b.jpg", "b.txt", "deep/new.jpg", "deep/new.json"}
    assert Index.load(file).samples == index.samples


def test_bad_files_are_looked_at_again(folder, tmp_path, reads):
    """A disk that failed once must not cost an image for ever."""
    file = tmp_path / "index.jsonl"
    (folder / "a.jpg").write_bytes(b"not yet there")
    build_index([ImageSet(str(folder))], file=file)
    reads.clear()
    build_index([ImageSet(str(folder))], file=file)
    assert set(reads) == {"a.jpg"}


def test_other_settings_read_anew(folder, tmp_path, reads):
    file = tmp_path / "index.jsonl"
    build_index([ImageSet(str(folder))], file=file)
    reads.clear()
    build_index([ImageSet(str(folder))], file=file, limits=Limits(max_pixels=10_000))
    assert len(reads) == 10
    reads.clear()
    build_index([ImageSet(str(folder), split_lines=False)], file=file, limits=Limits(max_pixels=10_000))
    assert len(reads) == 10


def test_order_of_sources_may_change(folder, tmp_path, reads):
    other = tmp_path / "others"
    other.mkdir()
    (other / "z.png").write_bytes(jpeg(3))
    (other / "z.txt").write_text("z")
    sources, file = [ImageSet(str(folder)), ImageSet(str(other))], tmp_path / "index.jsonl"
    first = build_index(sources, file=file)
    reads.clear()
    second = build_index(sources[::-1], file=file)
    assert not reads
    assert [s.name for s in second.samples] == ["others/z.png", *(s.name for s in first.samples[:5])]
    assert [s.source for s in second.samples] == [0, 1, 1, 1, 1, 1] and second.read(0) == jpeg(3)


def test_save_and_load(folder, tmp_path):
    (folder / "a.jpg").write_bytes(b"x")
    index = build_index([ImageSet(str(folder), name="mine", fields=("caption",))], file=tmp_path / "i.jsonl")
    loaded = Index.load(tmp_path / "i.jsonl")
    assert (loaded.samples, loaded.quarantined) == (index.samples, index.quarantined)
    assert (loaded.sources, loaded.limits, loaded.complete) == (index.sources, index.limits, True)
    assert loaded.read(0) == index.read(0)


def test_a_full_disk_leaves_the_old_index(folder, tmp_path, monkeypatch):
    file = tmp_path / "index.jsonl"
    old = build_index([ImageSet(str(folder))], file=file)
    (folder / "a.jpg").unlink()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        build_index([ImageSet(str(folder))], file=file)
    assert Index.load(file).samples == old.samples and [p.name for p in tmp_path.glob("*index*")] == ["index.jsonl"]


def test_names_of_sources(folder, tmp_path):
    (tmp_path / "set.v2").mkdir()
    assert ImageSet(str(tmp_path / "set.v2")).title == "set.v2" and ImageSet(str(tmp_path / "a.tar")).title == "a"
    assert ImageSet(f"{folder}/", name="x").title == "x" and ImageSet(f"{folder}/").title == "photos"


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[:-40],
        lambda t: "{}\n" + t,
        lambda t: "",
        lambda t: t.replace("index 4", "index 3"),
        lambda t: t.replace("a", "b", 9),
    ],
)
def test_a_damaged_index_is_made_anew(folder, tmp_path, damage):
    file = tmp_path / "index.jsonl"
    good = build_index([ImageSet(str(folder))], file=file)
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match="delete it"):
        Index.load(file)
    said = []
    assert build_index([ImageSet(str(folder))], file=file, say=said.append).samples == good.samples
    assert "made anew" in said[0] and Index.load(file).samples == good.samples


def test_a_killed_index_goes_on(folder, tmp_path, monkeypatch, reads):
    """What was read before the end is kept, old entries not reached yet too."""
    file = tmp_path / "index.jsonl"
    (folder / "deep" / "er" / "d.jpg").unlink()
    build_index([ImageSet(str(folder))], file=file)
    (folder / "0.jpg").write_bytes(jpeg(8))
    (folder / "0.txt").write_text("zero")
    (folder / "1.jpg").write_bytes(jpeg(9))
    (folder / "1.txt").write_text("one")
    monkeypatch.setattr(module, "CHUNK", 1)
    monkeypatch.setattr(module, "SAVE_EVERY", -1.0)
    real, seen = module._look, []

    def killed(*arguments):
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_look", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index([ImageSet(str(folder))], file=file)
    assert not Index.load(file).complete
    reads.clear()
    monkeypatch.setattr(module, "_look", real)
    assert len(build_index([ImageSet(str(folder))], file=file).samples) == 6
    assert set(reads) == {"1.jpg", "1.txt"} and Index.load(file).complete


def test_the_first_images_of_each_source(folder, tmp_path):
    file = tmp_path / "index.jsonl"
    assert names(build_index([ImageSet(str(folder))], file=file, limit=2)) == ["a.jpg", "b.jpg"]
    assert not file.exists()
    build_index([ImageSet(str(folder))], file=file)
    build_index([ImageSet(str(folder))], file=file, limit=2)
    assert len(Index.load(file).samples) == 5


def test_changed_bytes_are_not_read_as_the_old_image(folder):
    index = build_index([ImageSet(str(folder))])
    touch(folder / "a.jpg", jpeg(50))
    with pytest.raises(UserError, match=r"'photos/a.jpg' has changed since it was indexed"):
        index.read(0)
    (folder / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"'photos/b.jpg' cannot be read"):
        index.read(1)


def test_folders_that_lead_in_circles_and_hidden_files(folder, tmp_path):
    (folder / "deep" / "up").symlink_to(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.jpg").write_bytes(jpeg())
    (elsewhere / "x.txt").write_text("x")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "._a.jpg").write_bytes(b"a file of a file system")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.jpg").write_bytes(b"another")
    (folder / "gone.jpg").symlink_to(folder / "nothing")
    (folder / os.fsdecode(b"na\xefve.jpg")).write_bytes(jpeg())
    index = build_index([ImageSet(str(folder))])
    assert names(index)[-1] == "linked/x.jpg" and len(index.samples) == 6
    reasons = dict(index.quarantined)
    assert "cannot be read" in reasons["photos/gone.jpg"]
    assert [r for n, r in index.quarantined if "ve.jpg" in n] == ["its name is not UTF-8"]
    assert all(name.encode() for name in reasons)


def test_errors(folder, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"x")
    (tmp_path / "x.tar.gz").write_bytes(b"x")
    for sources, message in (
        ([], "no source"),
        ([ImageSet(str(tmp_path / "nowhere"))], "'.*nowhere' does not exist"),
        ([ImageSet(str(tmp_path / "none"))], "source 'none': no usable image"),
        ([ImageSet(str(tmp_path / "bad"))], "1 cannot be used: bad/x.jpg: not an image"),
        ([ImageSet(str(tmp_path / "x.tar.gz"))], "unpack them to plain .tar"),
        ([ImageSet(str(folder)), ImageSet(str(folder))], "2 sources are called 'photos'"),
        ([ImageSet(str(folder), name="a/b")], "holds a slash"),
    ):
        with pytest.raises(UserError, match=message):
            build_index(sources)
    (folder / "metadata.csv").write_text("file_name,text\n")
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match=r"holds metadata.csv and metadata.jsonl"):
        build_index([ImageSet(str(folder))])


@pytest.mark.parametrize(
    ("image", "texts"),
    [
        ("DSC_7.JPG", ("DSC_7.TXT",)),
        ("DSC_7.jpg", ("DSC_7.Caption", "DSC_7.JSON")),
        (unicodedata.normalize("NFC", "Übung é.jpg"), (unicodedata.normalize("NFD", "Übung é.Txt"),)),
        (unicodedata.normalize("NFD", "가나.JPEG"), (unicodedata.normalize("NFC", "가나.txt"),)),
    ],
)
def test_captions_are_found_however_their_names_are_spelt(tmp_path, image, texts):
    (tmp_path / image).write_bytes(jpeg())
    for text in texts:
        (tmp_path / text).write_text('{"caption": "json"}' if text.endswith("JSON") else text[-4:])
    index = build_index([ImageSet(str(tmp_path))])
    assert [len(sample.captions) for sample in index.samples] == [len(texts)]


def test_a_caption_of_the_very_same_name_comes_before_one_that_reads_the_same(tmp_path):
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é")
        (tmp_path / f"{name}.jpg").write_bytes(jpeg())
        (tmp_path / f"{name}.txt").write_text(form)
    assert {s.captions for s in build_index([ImageSet(str(tmp_path))]).samples} == {("NFC",), ("NFD",)}


def test_a_folder_that_many_links_lead_to_is_read_once(folder, tmp_path):
    for i in range(40):  # 2^40 ways to the last one
        (tmp_path / f"d{i}").mkdir()
        for name in "ab" if i else "":
            (tmp_path / f"d{i - 1}" / name).symlink_to(tmp_path / f"d{i}")
    (tmp_path / "d39" / "x.jpg").write_bytes(jpeg())
    (tmp_path / "d39" / "x.txt").write_text("x")
    assert len(build_index([ImageSet(str(tmp_path / "d0"))]).samples) == 1
    (folder / "deep" / "again").symlink_to(folder / "deep" / "er")
    assert len(build_index([ImageSet(str(folder))]).samples) == 5


@pytest.mark.parametrize("kind", ["caption", "image", "listed"])
def test_links_to_files_elsewhere_are_left_out(folder, tmp_path, kind):
    """Else a data set could have any file of this machine read as a caption, and shown on a page."""
    (tmp_path / "secret").write_text("password")
    (tmp_path / "mine.jpg").write_bytes(jpeg())
    place, target = {"caption": ("a.txt", "secret"), "image": ("z.jpg", "mine.jpg"), "listed": ("z.jpg", "mine.jpg")}[kind]
    (folder / place).unlink(missing_ok=True)
    (folder / place).symlink_to(tmp_path / target)
    if kind == "listed":
        (folder / "metadata.csv").write_text("file_name,text\nz.jpg,x\nb.jpg,y\n")
    index = build_index([ImageSet(str(folder))])
    assert f"'{place}' is a link that leads out of this folder" in dict(index.quarantined)[f"photos/{place[0]}.jpg"]
    assert not [s for s in index.samples if "password" in s.captions or s.name == "photos/z.jpg"]


def test_links_inside_to_folders_and_to_the_hubs_blobs_are_followed(folder, tmp_path):
    (folder / "again.jpg").symlink_to("a.jpg")
    (folder / "again.txt").symlink_to(folder / "a.txt")
    assert "again.jpg" in names(build_index([ImageSet(str(folder))]))
    hub = tmp_path / "datasets--x--y"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "abc" / "train").mkdir(parents=True)
    for name, data in (("x.jpg", jpeg()), ("x.txt", b"from the hub")):
        (hub / "blobs" / name.replace(".", "")).write_bytes(data)
        (hub / "snapshots" / "abc" / "train" / name).symlink_to(f"../../../blobs/{name.replace('.', '')}")
    for root in (hub / "snapshots" / "abc", hub / "snapshots" / "abc" / "train"):
        assert [s.captions for s in build_index([ImageSet(str(root))]).samples] == [("from the hub",)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a fox\nin the snow", ("a fox\nin the snow",)),
        ("\ufeff a fox\nin the snow \n", ("a fox\nin the snow",)),
        ("a fox\nanother", ("a fox", "another", "a fox\nin the snow")),
    ],
)
def test_what_img2dataset_writes_is_one_caption(tmp_path, packed, text, wanted):
    """Its .txt repeats the caption of its .json, beside facts of the download: lines of that are no captions of their own."""
    facts = {
        "url": "https://a",
        "caption": "a fox\nin the snow",
        "key": "000000000",
        "status": "success",
        "error_message": None,
    }
    root = tmp_path / "00000"
    root.mkdir()
    Image.new("RGB", (64, 64), "red").save(root / "000000000.jpg")
    (root / "000000000.txt").write_text(text, encoding="utf-8")
    (root / "000000000.json").write_text(json.dumps(facts))
    source = root
    if packed:
        source = tmp_path / "00000.tar"
        with tarfile.open(source, "w") as tar:
            for file in sorted(root.iterdir()):
                tar.add(file, file.name)
    assert [s.captions for s in build_index([ImageSet(str(source))]).samples] == [wanted]
