"""Tar shards (webdataset, img2dataset): random access gives what tarfile and webdataset give, damage stays local."""

import io
import json
import tarfile
import time

import numpy as np
import pytest
import webdataset
from PIL import Image

from dedistill.data.images import index as module
from dedistill.data.images import listing
from dedistill.data.images.index import Index, build_index
from dedistill.data.images.shards import members
from dedistill.data.images.types import ImageSet
from dedistill.errors import UserError


def image(seed: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """img2dataset's layout: two shards, text and JSON beside each image, a table and statistics beside each shard."""
    root = tmp_path / "laion"
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as tar:
            for i in range(4):
                key = f"{shard:05d}{i:04d}"
                facts = {"caption": f"caption {key}", "url": "http://x/y.jpg", "status": "success", "sha256": "0"}
                add(tar, f"{key}.jpg", image(10 * shard + i))
                add(tar, f"{key}.json", json.dumps(facts).encode())
                add(tar, f"{key}.txt", f"caption {key}".encode())
        (root / f"{shard:05d}_stats.json").write_text("{}")
        (root / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return root


def test_random_access_is_what_tarfile_reads(shards):
    index = build_index([ImageSet(str(shards))])
    assert len(index.samples) == 8 and index.quarantined == []
    for i in np.random.default_rng(0).permutation(8):
        sample = index.samples[i]
        shard, _, member = sample.name.removeprefix("laion/").partition("::")
        with tarfile.open(shards / shard) as tar:
            assert index.read(i) == tar.extractfile(member).read()
            key = member.removesuffix(".jpg")
            assert sample.captions == (tar.extractfile(f"{key}.txt").read().decode(),)


def test_samples_are_those_of_webdataset(shards):
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    theirs = [(s["__key__"], s["jpg"], s["txt"].decode()) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    index = build_index([ImageSet(str(shards))])
    ours = [(s.name.partition("::")[2].removesuffix(".jpg"), index.read(i), s.captions[0]) for i, s in enumerate(index.samples)]
    assert ours == theirs


def test_one_shard_by_its_path(shards):
    index = build_index([ImageSet(str(shards / "00001.tar"))])
    assert [s.name for s in index.samples] == [f"00001/00001.tar::00001{i:04d}.jpg" for i in range(4)]


def test_an_unchanged_shard_is_not_opened(shards, tmp_path, monkeypatch):
    file = tmp_path / "index.jsonl"
    opened = []
    real, read = listing.samples_of, module.read_bytes
    monkeypatch.setattr(listing, "samples_of", lambda root, shard: opened.append(shard.file) or real(root, shard))
    monkeypatch.setattr(module, "read_bytes", lambda source, place: opened.append(place.file) or read(source, place))
    first = build_index([ImageSet(str(shards))], file=file)
    opened.clear()
    assert build_index([ImageSet(str(shards))], file=file).samples == first.samples and opened == []
    with tarfile.open(shards / "00001.tar", "a") as tar:
        add(tar, "new.png", image(99, "PNG"))
        add(tar, "new.txt", b"new")
    index = build_index([ImageSet(str(shards))], file=file)
    assert len(index.samples) == 9 and index.samples[-1].captions == ("new",) and set(opened) == {"00001.tar"}


def test_half_a_shard_from_an_unfinished_index_is_completed(shards, tmp_path):
    file = tmp_path / "index.jsonl"
    whole = build_index([ImageSet(str(shards))])
    Index(whole.sources, whole.limits, whole.entries[:3], complete=False).save(file)
    assert build_index([ImageSet(str(shards))], file=file).samples == whole.samples


def test_odd_members(tmp_path):
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        add(tar, "dir.x/a.b.jpg", b"an extension of two parts is no image")
        add(tar, "dir.x/k.JPG", image(0))
        add(tar, "dir.x/k.caption", b"upper case")
        add(tar, "other/k.png", image(1, "PNG"))
        add(tar, "other/k.txt", b"same key elsewhere")
        add(tar, "two.jpg", image(2))
        add(tar, "two.png", image(2, "PNG"))
        add(tar, "text.txt", b"no image")
        add(tar, "bad.jpg", image(3)[:200])
        add(tar, "bad.txt", b"cut short")
        add(tar, "x" * 150 + ".jpg", image(4))
        add(tar, "x" * 150 + ".txt", b"a long name")
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    file = tmp_path / "index.jsonl"
    for _ in range(2):  # the second time from the index
        index = build_index([ImageSet(str(tmp_path / "odd.tar"))], file=file)
        assert {s.name.partition("::")[2][-12:]: s.captions for s in index.samples} == {
            "dir.x/k.jpg": ("upper case",),
            "other/k.png": ("same key elsewhere",),
            "xxxxxxxx.jpg": ("a long name",),
        }
        reasons = {name.partition("::")[2]: reason for name, reason in index.quarantined}
        assert reasons.keys() == {"dir.x/a", "two", "text", "bad.jpg", "link"}
        assert reasons["two"].startswith("2 images") and reasons["text"].startswith("no image")


def test_a_damaged_header_does_not_pass_for_the_end(shards):
    data = bytearray((shards / "00000.tar").read_bytes())
    with tarfile.open(shards / "00000.tar") as tar:
        at = tar.getmember("000000002.jpg").offset
    data[at : at + 300] = b"\xff" * 300
    (shards / "00000.tar").write_bytes(data)
    index = build_index([ImageSet(str(shards))])
    assert len(index.samples) == 6
    assert f"no end mark at offset {at:,}" in dict(index.quarantined)["laion/00000.tar"]


@pytest.mark.parametrize("share", [0.35, 0.6, 0.97])
def test_a_shard_cut_short_gives_what_is_whole(shards, tmp_path, share):
    whole = (shards / "00000.tar").read_bytes()
    used = build_index([ImageSet(str(shards / "00000.tar"))]).samples[-1].place
    (shards / "00000.tar").write_bytes(whole[: int(share * (used.offset + used.size))])
    file = tmp_path / "index.jsonl"
    for _ in range(2):
        index = build_index([ImageSet(str(shards), missing_captions="quarantine")], file=file)
        kept = [i for i, s in enumerate(index.samples) if "00000.tar" in s.name]
        assert 1 <= len(kept) <= 3 and len(index.samples) == 4 + len(kept)
        assert all(index.read(i) == image(i) for i in kept)
        assert "damaged" in dict(index.quarantined)["laion/00000.tar"]


def test_compressed_and_foreign_files_are_not_shards(shards, tmp_path):
    with tarfile.open(shards / "00002.tar", "w:gz") as tar:
        add(tar, "a.jpg", image(0))
    (shards / "00003.tar").write_bytes(b"nothing of the kind" * 100)
    index = build_index([ImageSet(str(shards))])
    assert len(index.samples) == 8
    assert [name for name, _ in index.quarantined] == ["laion/00002.tar", "laion/00003.tar"]
    assert all("not a plain tar file" in reason for _, reason in index.quarantined)
    with pytest.raises(UserError, match="no usable image"):
        build_index([ImageSet(str(shards / "00003.tar"))])


def test_what_lies_beside_shards_or_below_is_left_out_by_name(shards, tmp_path):
    (shards / "loose.jpg").write_bytes(image(3))
    index = build_index([ImageSet(str(shards))])
    assert len(index.samples) == 8
    assert index.quarantined == [("laion/loose.jpg", "it lies beside the shards of this folder, not in one")]
    (shards / "loose.jpg").unlink()
    with pytest.raises(UserError, match="a shard below the folder of this set"):
        build_index([ImageSet(str(tmp_path))])


@pytest.mark.parametrize("size", [-1, -1024])
@pytest.mark.parametrize("kind", ["base-256", "pax"])
def test_a_member_of_less_than_nothing_costs_its_shard_alone(shards, size, kind):
    info = tarfile.TarInfo("a.jpg")
    if kind == "pax":
        info.pax_headers = {"size": str(size)}
        head = info.tobuf(tarfile.PAX_FORMAT)
    else:
        head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        head[124:136] = b"\xff" + (2**88 + size).to_bytes(11, "big")
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head[:512])
    (shards / "00002.tar").write_bytes(bytes(head) + bytes(10240))
    index = build_index([ImageSet(str(shards))])
    assert len(index.samples) == 8 and [name for name, _ in index.quarantined] == ["laion/00002.tar"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("text", [b"9" * 300_000, b"20000 comment=" + b"x" * 19_985 + b"\n"])
def test_long_extended_headers_cost_their_shard_alone(shards, kind, text):
    info = tarfile.TarInfo("./PaxHeaders/x")
    info.type, info.size = kind, len(text)
    (shards / "00002.tar").write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + text + bytes(-len(text) % 512 + 10240))
    index = build_index([ImageSet(str(shards))])
    assert len(index.samples) == 8 and [name for name, _ in index.quarantined] == ["laion/00002.tar"]


def test_long_names_are_still_read(shards):
    with tarfile.open(shards / "00002.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "é" * 1500 + ".jpg", image(70))
        add(tar, "é" * 1500 + ".txt", b"a long name")
    assert ("a long name",) in [s.captions for s in build_index([ImageSet(str(shards))]).samples]


def extended(kind: bytes, text: bytes = b"", size: int | None = None) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(text) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + text.ljust(-(-len(text) // 512) * 512, b"\0")


SPARSE = bytearray(tarfile.TarInfo("s.png").tobuf(tarfile.USTAR_FORMAT))
SPARSE[156:157], SPARSE[482] = b"S", 1
SPARSE[148:156] = b" " * 8
SPARSE[148:156] = b"%06o\0 " % sum(SPARSE)


@pytest.mark.parametrize(
    "part",
    [
        extended(tarfile.XGLTYPE, b"20 comment=aaaaaaaa\n"),
        extended(tarfile.XHDTYPE, b"14 path=b.png\n"),
        extended(tarfile.GNUTYPE_LONGNAME, b"z" * 400),
        extended(tarfile.GNUTYPE_LONGLINK, b"z" * 400),
        extended(tarfile.DIRTYPE),
        tarfile.TarInfo("q.png").tobuf(),
        b"\1" * 512,
    ],
)
def test_endless_chains_without_content_cost_their_shard_alone(shards, part):
    head = bytes(SPARSE) if part[0] == 1 else b""
    (shards / "00002.tar").write_bytes(head + part * 30_000 + bytes(1024))
    start = time.process_time()
    index = build_index([ImageSet(str(shards))])
    assert time.process_time() - start < 2
    assert len(index.samples) == 8 and all("00002.tar" in name for name, _ in index.quarantined)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, format):
    path, rng = tmp_path / "x.tar", np.random.default_rng(format)
    with tarfile.open(path, "w", format=format) as tar:
        for name in ("a.png", "é ü/b.txt", "d" * 60 + "/" + "e" * 70 + ".jpg", *(("f" * 300 + ".json",) if format else ())):
            add(tar, name, rng.bytes(int(rng.integers(0, 2000))))
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png" if kind != tarfile.DIRTYPE else ""
            tar.addfile(info)
        add(tar, "last.png", rng.bytes(513))
    with tarfile.open(path) as tar:
        theirs = [
            (m.name, m.offset_data, 0 if m.islnk() else m.size, m.isreg() and not m.islnk()) for m in tar if not m.isdir()
        ]
    with open(path, "rb") as file:
        ours = [(m.name, m.offset, m.size, not m.problem) for m in members(file, path.stat().st_size)]
    assert ours == theirs


@pytest.mark.parametrize("of", ["a.png", "a.txt"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_what_is_no_file_in_a_shard_is_told(shards, of, kind):
    with tarfile.open(shards / "00002.tar", "w") as tar:
        for name in ("a.png", "a.txt"):
            if name == of:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
            else:
                add(tar, name, image(1, "PNG") if name == "a.png" else b"a caption")
    index = build_index([ImageSet(str(shards))])
    assert len(index.samples) == 8
    assert [name for name, _ in index.quarantined] == ["laion/00002.tar::a"] and f"its .{of[2:]} is" in index.quarantined[0][1]
