"""Hashes of weight files: by content, remembered, and not misled by what was remembered."""

import json
import os
import time

import pytest

from dedistill.io import hashing
from dedistill.io.atomic import read_checksummed
from dedistill.io.hashing import file_sha256, fingerprint


@pytest.fixture
def files(tmp_path):
    (tmp_path / "vae").mkdir()
    found = [tmp_path / "vae" / name for name in ("config.json", "weights.safetensors")]
    for file in found:
        file.write_text(file.name)
    return found


def test_it_follows_names_and_bytes_and_not_the_place(files, tmp_path):
    memo = tmp_path / "cache" / "hashes.json"
    first = fingerprint(files, memo)
    assert fingerprint(reversed(files), memo) == first
    (tmp_path / "vae").rename(tmp_path / "x")
    (tmp_path / "moved").mkdir()
    (tmp_path / "x").rename(tmp_path / "moved" / "vae")
    moved = [tmp_path / "moved" / "vae" / file.name for file in files]
    assert fingerprint(moved, memo) == first
    moved[1].write_text("other")
    assert fingerprint(moved, memo) != first != fingerprint(moved[:1], memo)


def test_a_file_is_read_once_until_its_stamp_changes(files, tmp_path, files_read):
    """By one process, and by the next one, which has the memo; other times of the same bytes are read and found the same."""
    memo = tmp_path / "hashes.json"
    first = [fingerprint(files, memo) for _ in range(3)]
    assert len(set(first)) == 1 and files_read == dict.fromkeys(files, 1)
    hashing._known.clear()
    assert fingerprint(files, memo) == first[0] and files_read.total() == 2
    os.utime(files[1], (1, 1))
    assert fingerprint(files, memo) == first[0] and files_read == {files[0]: 1, files[1]: 2}
    link = tmp_path / "link"
    link.symlink_to(files[1])
    assert file_sha256(link) == file_sha256(files[1]) and files_read.total() == 3


@pytest.mark.parametrize("way", ["edited", "replaced"])
def test_an_edit_that_keeps_size_and_mtime_is_noticed(files, tmp_path, files_read, way):
    memo = tmp_path / "hashes.json"
    first, status = fingerprint(files, memo), files[0].stat()
    time.sleep(0.02)  # ticks of a file system's clock are some milliseconds apart
    target = files[0] if way == "edited" else tmp_path / "new"
    target.write_text("CONFIG.JSON")
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    target.replace(files[0])
    assert (files[0].stat().st_size, files[0].stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    second = fingerprint(files, memo)
    hashing._known.clear()
    assert fingerprint(files, memo) == second != first


def test_the_hash_of_a_file_that_has_just_changed_is_not_remembered(files, tmp_path, files_read, monkeypatch):
    """Another edit within the same tick leaves the very same stamp; neither this process nor the next one is misled."""
    monkeypatch.setattr(hashing, "SETTLED_NS", 10**12)
    memo = tmp_path / "hashes.json"
    for _ in range(2):
        fingerprint(files, memo)
    assert set(files_read.values()) == {2}
    monkeypatch.setattr(hashing, "SETTLED_NS", 0)
    fingerprint(files, memo)
    assert set(files_read.values()) == {3}


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "DAMAGED"])
def test_a_damaged_memory_is_made_anew(files, tmp_path, text):
    memo = tmp_path / "hashes.json"
    first = fingerprint(files, memo)
    memo.write_text(text if text != "DAMAGED" else json.dumps(dict.fromkeys(read_checksummed(memo), 3)))
    assert fingerprint(files, memo) == first and len(read_checksummed(memo)) == 2
