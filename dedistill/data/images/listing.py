"""What a source holds, before any image is read: folders, tar shards, and lists in tables."""

import errno
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from dedistill.data.images import caption_files, decode
from dedistill.data.images.caption_files import read_table
from dedistill.data.images.types import Found, ImageSet, Place
from dedistill.errors import UserError, amount
from dedistill.io.hashing import Stamp

TABLES = ("jsonl", "csv", "parquet")


Known = Callable[[Place], list[Found] | None]
"""Given a whole shard: what it held when it was last listed, if it has not changed since."""


def images_of(source: ImageSet, known: Known) -> Iterator[Found]:
    """Everything the source lists, in a stable order. Raises ``UserError`` when its path is of no known kind."""
    path = Path(source.path)
    extension = _extension(path.name)
    if path.is_dir():
        return _of_folder(source, path, known)
    if not path.exists():
        raise UserError(f"data: source '{source.title}': '{path}' does not exist")
    if extension == "tar":
        return _of_shards(path.parent, [path.name], known)
    if extension in TABLES:
        return _of_table(source, path)
    packed = path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))
    way_out = "; compressed shards cannot be read at random: unpack them to plain .tar" if packed else ""
    raise UserError(
        f"data: source '{source.title}': '{path}' is none of: a folder, a .tar shard, a .jsonl, .csv or .parquet list{way_out}"
    )


def _of_folder(source: ImageSet, path: Path, known: Known) -> Iterator[Found]:
    names = sorted(os.listdir(path))
    tables = [name for name in names if name in {f"metadata.{kind}" for kind in TABLES}]
    if len(tables) > 1:
        raise UserError(f"data: source '{source.title}': '{path}' holds {' and '.join(tables)}; give the path of one of them")
    if tables:
        return _of_table(source, path / tables[0])
    shards = [name for name in names if _extension(name) == "tar" and not name.startswith(".")]
    return _of_shards(path, shards, known) if shards else _of_files(path, "", set())


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _of_files(root: Path, folder: str, above: set[tuple[int, int]]) -> Iterator[Found]:
    """Images of ``root``/``folder`` and below, name by name. Links to folders are followed, but never in a circle."""
    status = os.stat(root / folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    entries = sorted((e for e in os.scandir(root / folder) if not e.name.startswith(".")), key=lambda e: e.name)
    by_name = {e.name: e for e in entries}
    for entry in entries:
        name = f"{folder}{entry.name}"
        if _is_folder(entry):
            if entry.name != "__MACOSX":
                yield from _of_files(root, f"{name}/", above | {identity})
        elif _extension(entry.name) in decode.EXTENSIONS:
            stem = entry.name.rpartition(".")[0]
            beside = [(e, by_name[f"{stem}.{e}"]) for e in caption_files.EXTENSIONS if f"{stem}.{e}" in by_name]
            try:
                sidecars = tuple((kind, whole(f"{folder}{e.name}", e.stat())) for kind, e in beside)
                yield Found(name, whole(name, entry.stat()), sidecars)
            except OSError as e:
                yield Found(name, problem=f"cannot be read: {e.strerror}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def whole(file: str, status: os.stat_result) -> Place:
    """The place of a whole file. Raises OSError for a pipe, a device or a folder: reading it might never end."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    return Place(file, 0, status.st_size, *Stamp.of(status))


def _of_shards(root: Path, shards: list[str], known: Known) -> Iterator[Found]:
    for shard in shards:
        try:
            place = whole(shard, os.stat(root / shard))
        except OSError as e:
            yield Found(shard, problem=f"cannot be read: {e.strerror}")
            continue
        yield from known(place) or _of_shard(root, place)


def _of_shard(root: Path, shard: Place) -> Iterator[Found]:
    """Samples of one shard: members with the same name up to the first dot of the last part (webdataset's rule)."""
    samples: dict[str, list[tuple[str, Place]]] = {}
    problem = ""
    try:
        with tarfile.open(root / shard.file, "r:") as tar:  # "r:" is plain tar only; nothing is extracted
            for member in tar:
                if not member.isfile() or member.issparse():
                    continue
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                place = shard._replace(offset=member.offset_data, size=member.size)
                if key and place.offset + place.size <= shard.size:
                    samples.setdefault(f"{folder}/{key}" if folder else key, []).append((extension.lower(), place))
            # tarfile takes a header that it cannot read, or that is zeroed, for the end: the rest would be lost without a word
            if not _only_zeros_from(cast(BinaryIO, tar.fileobj), tar.offset):
                raise tarfile.ReadError(f"no end mark at offset {tar.offset:,}")
    except OSError as e:
        yield Found(shard.file, problem=f"cannot be read: {e.strerror or e}")
        return
    except (tarfile.TarError, ValueError) as e:
        problem = f"damaged, or not a plain tar file; {amount(len(samples), 'sample stands', 'samples stand')} before that: {e}"
    problem = problem or ("" if samples else "it holds no files")
    for key, members in samples.items():
        yield _of_members(f"{shard.file}::{key}", members, shard)
    if problem:
        yield Found(shard.file, shard._replace(size=0), problem=problem)


def _only_zeros_from(file: BinaryIO, offset: int) -> bool:
    """Whether a file goes on to its end in zeros, a block of them at least."""
    file.seek(offset)
    found = False
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            return False
        found = found or len(block) >= tarfile.BLOCKSIZE
    return found


def _of_members(name: str, members: list[tuple[str, Place]], shard: Place) -> Found:
    images = [(extension, place) for extension, place in members if extension in decode.EXTENSIONS]
    if len(images) != 1:
        names = ", ".join(extension for extension, _ in members)
        problem = f"{len(images) or 'no'} images among its members ({names}); expected one"
        return Found(name, shard._replace(size=0), problem=problem)
    order = caption_files.EXTENSIONS
    texts = sorted((m for m in members if m[0] in order), key=lambda m: order.index(m[0]))
    return Found(f"{name}.{images[0][0]}", images[0][1], tuple(texts))


def _of_table(source: ImageSet, path: Path) -> Iterator[Found]:
    for file, captions, problem in read_table(source, path):
        if problem:
            yield Found(file, problem=problem)
            continue
        inside = os.path.normpath(os.path.relpath(file, path.parent) if os.path.isabs(file) else file)
        if inside.startswith(".."):
            yield Found(file, problem=f"lies outside '{path.parent}', the folder of {path.name}")
            continue
        try:
            yield Found(inside, whole(inside, os.stat(path.parent / inside)), captions=captions)
        except (OSError, ValueError) as e:
            yield Found(inside, problem=f"listed in {path.name}, but cannot be read: {getattr(e, 'strerror', e)}")
