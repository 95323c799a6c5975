"""Hashes of weight files: by content, remembered, and not misled by what was remembered."""

import json
import os

import pytest

from dedistill.fingerprint import fingerprint


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


def test_a_file_is_read_once_until_its_size_or_time_changes(files, tmp_path):
    """Same size and time: what was remembered holds, though the bytes are others (this is how it is told apart)."""
    memo = tmp_path / "hashes.json"
    first, status = fingerprint(files, memo), files[0].stat()
    files[0].write_text("CONFIG.JSON")
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(files, memo) == first
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert fingerprint(files, memo) != first


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "DAMAGED"])
def test_a_damaged_memory_is_made_anew(files, tmp_path, text):
    memo = tmp_path / "hashes.json"
    first = fingerprint(files, memo)
    memo.write_text(text if text != "DAMAGED" else json.dumps(dict.fromkeys(json.loads(memo.read_text()), 3)))
    assert fingerprint(files, memo) == first and len(json.loads(memo.read_text())) == 2
