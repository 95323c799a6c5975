"""Hashes of large files, remembered by size and time of change."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from dedistill.files import file_sha256, replace_json


def fingerprint(files: Iterable[Path], memo: Path) -> str:
    """One SHA-256 over names and bytes of ``files``; ``memo`` keeps each file's hash until its size or mtime changes."""
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):
        known = None
    known = known if isinstance(known, dict) else {}
    digest, before = hashlib.sha256(), dict(known)
    for file in sorted(files):
        status = file.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        place = str(file.resolve())
        entry = known.get(place)
        if not isinstance(entry, list) or entry[:-1] != stamp:
            known[place] = [*stamp, file_sha256(file)]
        digest.update(f"{file.parent.name}/{file.name} {known[place][-1]}\n".encode())
    if known != before:
        memo.parent.mkdir(parents=True, exist_ok=True)
        replace_json(memo, known)
    return digest.hexdigest()
