"""Tar shards in every kind of disrepair."""

import bz2
import gzip
import io
import lzma
import random
import tarfile
from pathlib import Path

from bad_samples import encoded

from dedistill.data.images.index import build_index
from dedistill.data.images.types import ImageSet
from dedistill.errors import UserError

SAMPLES = 8
_BLOCK = tarfile.BLOCKSIZE


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def good_shard(first: int = 0) -> bytes:
    """``SAMPLES`` images with their captions."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for i in range(first, first + SAMPLES):
            add(tar, f"{i:05d}.jpg", encoded("JPEG", seed=i))
            add(tar, f"{i:05d}.txt", f"caption {i:05d}".encode())
    return out.getvalue()


def _headers(data: bytes) -> list[int]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [member.offset for member in tar]


def _signed(header: bytearray) -> bytes:
    """A header with its check sum made right again."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def _with_header(data: bytes, at: int, place: slice, value: bytes) -> bytes:
    header = bytearray(data[at : at + _BLOCK])
    header[place] = value.ljust(place.stop - place.start, b"\0")
    return data[:at] + _signed(header) + data[at + _BLOCK :]


def _over(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def _extended(rng: random.Random, data: bytes) -> bytes:
    """With a pax header that gives a member another path or size."""
    out = io.BytesIO()
    headers = rng.choice(
        [
            *({"path": "../../../tmp/escaped.jpg"}, {"path": "a\0b.jpg"}, {"path": "x" * 3000}, {"mtime": "nan"}),
            *({"size": "99999999"}, {"size": str(-rng.randrange(1, 1 << 40))}, {"size": "9" * 40}, {"size": "many"}),
        ]
    )
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "odd.jpg", encoded("JPEG"), pax_headers=headers)
    return out.getvalue()[: -2 * _BLOCK].rstrip(b"\0").ljust(4096, b"\0") + data


def _long_header(rng: random.Random, data: bytes) -> bytes:
    """With an extended header that takes far longer to read than any member does: of digits, or without a line's end."""
    body = rng.choice([b"1", b"9 a=b\n", b"\0", b"x"]) * rng.randrange(20_000, 200_000)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        add(tar, "././@PaxHeader", body, type=rng.choice([tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE]))
    return out.getvalue().rstrip(b"\0").ljust(-(-(_BLOCK + len(body)) // _BLOCK) * _BLOCK, b"\0") + data


DAMAGES = {
    "cut at a block": lambda r, d: d[: r.randrange(len(d) // _BLOCK) * _BLOCK],
    "cut anywhere": lambda r, d: d[: r.randrange(len(d))],
    "without its end mark": lambda r, d: d.rstrip(b"\0"),
    "a header zeroed": lambda r, d: _over(d, r.choice(_headers(d)), bytes(_BLOCK)),
    "a header of noise": lambda r, d: _over(d, r.choice(_headers(d)), r.randbytes(_BLOCK)),
    "a bit of a header": lambda r, d: _flip(d, r.choice(_headers(d)) + r.randrange(_BLOCK), r),
    "a bit anywhere": lambda r, d: _flip(d, r.randrange(_used(d)), r),
    "a page zeroed": lambda r, d: _over(d, r.randrange(_used(d) // 4096) * 4096, bytes(4096)),
    "a page of noise": lambda r, d: _over(d, r.randrange(_used(d) // 4096) * 4096, r.randbytes(4096)),
    "a block lost": lambda r, d: _without(d, r.randrange(_used(d) // _BLOCK) * _BLOCK),
    "a block twice": lambda r, d: _twice(d, r.randrange(_used(d) // _BLOCK) * _BLOCK),
    "another size": lambda r, d: _resized(d, r.choice(_headers(d)), r.choice([0, 1, 600, 8**9])),
    "a size below zero": lambda r, d: _binary_size(d, r.choice(_headers(d)), -r.choice([1, _BLOCK, 1 << 40, 1 << 87])),
    "a size of many bits": lambda r, d: _binary_size(d, r.choice(_headers(d)), r.choice([1 << 40, 1 << 63, 1 << 86])),
    "another type": lambda r, d: _with_header(
        d, r.choice(_headers(d)), slice(156, 157), r.choice([b"1", b"2", b"5", b"S", b"x"])
    ),
    "a name that climbs": lambda r, d: _with_header(d, r.choice(_headers(d)), slice(0, 100), b"../../../tmp/escaped.jpg"),
    "an absolute name": lambda r, d: _with_header(d, r.choice(_headers(d)), slice(0, 100), b"/tmp/escaped.jpg"),
    "a header of pax": _extended,
    "a long extended header": _long_header,
    "two shards as one": lambda r, d: d + good_shard(100),
    "noise at the end": lambda r, d: d + r.randbytes(3000),
    "gzip": lambda r, d: gzip.compress(d),
    "bzip2": lambda r, d: bz2.compress(d),
    "xz": lambda r, d: lzma.compress(d),
    "empty": lambda r, d: b"",
    "zeros": lambda r, d: bytes(len(d)),
}


def _resized(data: bytes, at: int, size: int) -> bytes:
    return _with_header(data, at, slice(124, 136), b"%011o" % size)


def _binary_size(data: bytes, at: int, size: int) -> bytes:
    """As GNU tar writes what octal digits have no room for: 95 bits, the first of them its sign."""
    sign = b"\xff" if size < 0 else b"\x80"
    return _with_header(data, at, slice(124, 136), sign + (size % (1 << 88)).to_bytes(11, "big"))


def _used(data: bytes) -> int:
    return len(data.rstrip(b"\0"))


def _flip(data: bytes, at: int, rng: random.Random) -> bytes:
    return _over(data, at, bytes([data[at] ^ (1 << rng.randrange(8))]))


def _without(data: bytes, at: int) -> bytes:
    return data[:at] + data[at + _BLOCK :]


def _twice(data: bytes, at: int) -> bytes:
    return data[: at + _BLOCK] + data[at:]


def silently_short(folder: Path, number: int) -> str:
    """Damage one shard beside a good one, and look; what is wrong then with the index, empty when nothing is."""
    rng = random.Random(number)
    kind = list(DAMAGES)[number % len(DAMAGES)]
    folder.mkdir()
    whole = good_shard()
    (folder / "0.tar").write_bytes(DAMAGES[kind](rng, whole))
    (folder / "1.tar").write_bytes(good_shard(50))
    try:
        index = build_index([ImageSet(str(folder), missing_captions="quarantine")])
    except UserError as e:
        return f"{kind}: the whole set was refused: {e}"
    kept = [s for s in index.samples if "/0.tar::" in s.name]
    told = [name for name, _ in index.quarantined if "/0.tar" in name]
    if sum("/1.tar::" in s.name for s in index.samples) != SAMPLES:
        return f"{kind}: the good shard beside it suffered"
    if len({s.name for s in kept}) < SAMPLES and not told:
        return f"{kind}: {len(kept)} of {SAMPLES} samples, and not a word"
    if any(index.read(index.samples.index(s)) is None for s in kept):
        return f"{kind}: a sample cannot be read"
    return ""
