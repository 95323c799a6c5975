"""Tar shards: which samples one holds, and where their bytes lie. Headers are read one after the other; nothing is extracted.

Python's own tarfile follows chains of extended headers by recursion, and keeps every member it has seen.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dedistill.data.images import caption_files, decode
from dedistill.data.images.types import Found, Place
from dedistill.errors import amount

BLOCK = 512
MAX_EXTENDED = 1 << 14
"""Bytes of an extended header, which holds a file's name and attributes."""
MAX_QUIET = 4096
"""Headers in a row without a byte of a file: empty files, folders, links, extended headers."""
_EXTENDED, _LONG_NAME, _LONG_LINK = (b"x", b"X", b"g"), b"L", b"K"
_FILES, _LINKS, _FOLDER, _SPARSE = (b"0", b"\0", b"7"), (b"1", b"2"), b"5", b"S"
_WITHOUT_BYTES = (*_LINKS, b"3", b"4", _FOLDER, b"6")


class BadShard(Exception):
    """What is wrong with a shard from some place on."""


class Member(NamedTuple):
    """problem: why it is no file whose bytes stand there; empty where they do."""

    name: str
    offset: int
    size: int
    problem: str = ""


Part = tuple[str, Place, str]
"""Of a sample: the extension of a member, its place, and what is wrong with it."""


def samples_of(root: Path, shard: Place) -> Iterator[Found]:
    """Samples of one shard: members with the same name up to the first dot of the last part (webdataset's rule).

    Of a damaged one, those before the damage, and the shard itself as a problem. Raises OSError.
    """
    samples: dict[str, list[Part]] = {}
    problem = ""
    with open(root / shard.file, "rb") as file:
        try:
            for member in members(file, shard.file_size):
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                if key:
                    place = shard._replace(offset=member.offset, size=member.size)
                    name = f"{folder}/{key}" if folder else key
                    samples.setdefault(name, []).append((extension.lower(), place, member.problem))
        except BadShard as e:
            stand = amount(len(samples), "sample stands", "samples stand")
            problem = f"damaged, or not a plain tar file; {stand} before that: {e}"
    problem = problem or ("" if samples else "it holds no files")
    for key, parts in samples.items():
        yield _of_parts(f"{shard.file}::{key}", parts, shard)
    if problem:
        yield Found(shard.file, shard._replace(size=0), problem=problem)


def _of_parts(name: str, parts: list[Part], shard: Place) -> Found:
    images = [(extension, place) for extension, place, _ in parts if extension in decode.EXTENSIONS]
    order = caption_files.EXTENSIONS
    wrong = [f"its .{kind} is {problem}" for kind, _, problem in parts if problem and kind in (*decode.EXTENSIONS, *order)]
    if wrong or len(images) != 1:
        names = ", ".join(extension for extension, _, _ in parts)
        problem = f"{len(images) or 'no'} images among its members ({names}); expected one"
        return Found(name, shard._replace(size=0), problem=wrong[0] if wrong else problem)
    texts = sorted(((kind, place) for kind, place, _ in parts if kind in order), key=lambda part: order.index(part[0]))
    return Found(f"{name}.{images[0][0]}", images[0][1], tuple(texts))


def members(file: BinaryIO, length: int) -> Iterator[Member]:
    """All but folders, in their order. length: of the file. Raises BadShard behind the last that can be told."""
    at = quiet = 0
    said: dict[str, str] = {}  # by extended headers, of the next member
    while any(header := _read(file, at, BLOCK)):
        start, at, kind, size = at, at + BLOCK, header[156:157], _checked_size(header, at)
        if kind in (*_EXTENDED, _LONG_NAME, _LONG_LINK):
            if not 0 <= size <= MAX_EXTENDED:
                raise BadShard(f"an extended header of {size:,} bytes; the limit is {MAX_EXTENDED:,}")
            said |= _records(_read(file, at, size), start) if kind in _EXTENDED else {}
            said |= {"path": _text(_read(file, at, size))} if kind == _LONG_NAME else {}
        else:
            more = kind == _SPARSE and header[482]
            while more:  # blocks of its table of holes
                more, at = (_read(file, at, BLOCK).ljust(BLOCK, b"\0"))[504], at + BLOCK
            name = said.get("path") or _name(header)
            problem = _no_file(kind, said)
            size = 0 if kind in _WITHOUT_BYTES else _number(said["size"].encode(), start, 10) if "size" in said else size
            if size < 0 or at + size > length:
                raise BadShard(f"a member of {size:,} bytes at offset {start:,}")
            if kind != _FOLDER and not name.endswith("/"):
                yield Member(name, at, size, problem)
            said = {}
        quiet = 0 if kind in _FILES and size else quiet + 1
        if quiet > MAX_QUIET:
            raise BadShard(f"more than {MAX_QUIET:,} headers in a row without content, at offset {start:,}")
        at += -(-size // BLOCK) * BLOCK
    if not _only_zeros_from(file, at):
        raise BadShard(f"no end mark at offset {at:,}")


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _checked_size(header: bytes, start: int) -> int:
    """Of a header whose check sum is right, the size."""
    wanted = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if len(header) < BLOCK or _number(header[148:156], start) != wanted:
        raise BadShard(f"no header and no end mark at offset {start:,}")
    return _number(header[124:136], start)


def _number(field: bytes, start: int, base: int = 8) -> int:
    """In digits; or, as GNU tar writes what they have no room for, in binary after a first byte of 0x80 or 0xff."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    if field[:1] == b"\xff":
        return int.from_bytes(field, "big", signed=True)
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", base)
    except ValueError:
        raise BadShard(f"no number where one belongs, in the header at offset {start:,}") from None


def _name(header: bytes) -> str:
    folder = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{folder}/{_text(header[:100])}" if folder else _text(header[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _records(text: bytes, start: int) -> dict[str, str]:
    """The records "<length> <key>=<value>\\n" of an extended header."""
    found, at = {}, 0
    while at < len(text) and text[at]:
        space = text.find(b" ", at, at + 8)
        end = at + _number(text[at : max(at, space)], start, 10)
        key, equals, value = text[space + 1 : end - 1].partition(b"=")
        if not at < space < end <= len(text) or not equals:
            raise BadShard(f"an extended header that cannot be read at offset {start:,}")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = end
    return found


def _no_file(kind: bytes, said: dict[str, str]) -> str:
    if kind in _LINKS:
        return "a link: put the file itself into the shard"
    if kind == _SPARSE or any(key.startswith("GNU.sparse") for key in said):
        return "a sparse file, which is not read"
    return "" if kind in _FILES else "not a regular file"


def _only_zeros_from(file: BinaryIO, offset: int) -> bool:
    """Whether a file goes on to its end in zeros, a block of them at least."""
    file.seek(offset)
    found = False
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            return False
        found = found or len(block) >= BLOCK
    return found
