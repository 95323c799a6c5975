"""What a source holds, before any image is read: folders, tar shards, and lists in tables."""

import errno
import os
import stat
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from dedistill.data.images import caption_files, decode
from dedistill.data.images.caption_files import read_table
from dedistill.data.images.rows import image_column, is_table, rows_of
from dedistill.data.images.shards import samples_of
from dedistill.data.images.splits import DEEPEST, is_folder, other_splits
from dedistill.data.images.types import Found, ImageSet, Place
from dedistill.errors import UserError, amount
from dedistill.io.hashing import Stamp
from dedistill.io.ownership import written_in

TABLES = ("jsonl", "csv", "parquet")
METADATA = frozenset(f"metadata.{kind}" for kind in TABLES)
"""The list that describes its folder."""
OTHER_TABLES = ("tsv", "xlsx", "arrow")


Known = Callable[[Place], list[Found] | None]
"""Given a whole shard: what it held when it was last listed, if it has not changed since."""


def images_of(source: ImageSet, known: Known) -> Iterator[Found]:
    """Everything the source lists, in a stable order. Raises ``UserError`` when its path is of no known kind."""
    path = Path(source.path)
    extension = _extension(path.name)
    if path.is_dir():
        return _of_folder(source, path, known)
    if source.split:
        raise UserError(f"data: source '{source.title}': data.sets.split chooses among splits of a folder; '{path}' is none", 2)
    if not path.exists():
        raise UserError(f"data: source '{source.title}': '{path}' does not exist")
    if extension == "tar":
        return _of_shards(path.parent, [path.name], known)
    if extension in TABLES:
        return _of_images_in(source, path.name) or _of_table(source, path)
    packed = path.name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))
    way_out = "; compressed shards cannot be read at random: unpack them to plain .tar" if packed else ""
    raise UserError(
        f"data: source '{source.title}': '{path}' is none of: a folder, a .tar shard, a .jsonl, .csv or .parquet list{way_out}"
    )


def _of_folder(source: ImageSet, path: Path, known: Known) -> Iterator[Found]:
    """By the table of the folder itself, else by its shards, else file by file; what these do not cover is left out by name."""
    names = sorted(os.listdir(path))
    table = _table_in(source, path, names)
    if table and source.split:
        raise UserError(
            f"data: source '{source.title}': data.sets.split does not go with '{path / table}', which lists the set", 2
        )
    others = {} if table else other_splits(source)
    shards = [name for name in names if _extension(name) == "tar" and not name.startswith(".") and name not in others]
    if not table and not shards:
        yield from _of_files(source, path, "", set(), others)
        return
    yield from (Found(name, problem=others[name]) for name in names if name in others and _extension(name) == "tar")
    covered: set[str] = set()
    for found in _of_table(source, path / table) if table else _of_shards(path, shards, known):
        covered |= {found.name, found.about}
        yield found
    for found in _of_files(source, path, "", set(), others, tables=False):
        if found.name not in covered:
            reason = f"no good row of {table} names it" if table else "it lies beside the shards of this folder, not in one"
            yield Found(found.name, problem=found.problem or f"{reason}")


def not_read(source: ImageSet) -> str:
    """For a message, tables in the folder of a source that are not read, but for those about a shard of the same name."""
    if not Path(source.path).is_dir():
        return ""
    names = sorted(os.listdir(source.path))
    shards = {_stem(name) for name in names if _extension(name) == "tar"}
    some = [name for name in names if _extension(name) in (*TABLES, *OTHER_TABLES) and _stem(name) not in shards]
    some = [name for name in some if name.lower() not in METADATA and not _of_images_in(source, name)]
    if not some:
        return ""
    named = ", ".join(some[:3]) + (" ..." if len(some) > 3 else "")
    way_out = "a list of images is called metadata.csv, .jsonl or .parquet, or is itself the path of the set"
    return f"; {amount(len(some), 'table is', 'tables are')} not read: {named} ({way_out})"


def _table_in(source: ImageSet, folder: Path, names: Collection[str]) -> str | None:
    """The name of the table that describes ``folder``, if there is one."""
    tables = sorted(name for name in names if name.lower() in METADATA)
    if len(tables) > 1:
        raise UserError(f"data: source '{source.title}': '{folder}' holds {' and '.join(tables)}; give the path of one")
    return tables[0] if tables else None


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _of_files(
    source: ImageSet,
    root: Path,
    folder: str,
    seen: set[tuple[int, int]],
    others: Mapping[str, str],
    *,
    tables: bool = True,
) -> Iterator[Found]:
    """Images of ``root``/``folder`` and below, name by name. Links to folders are followed, each folder once (``seen``).

    others: files and folders that are left out, and why.
    tables: a folder below that has a table of its own, as each split has in Hugging Face's layout, is listed by it.
    """
    if folder.count("/") > DEEPEST:
        yield Found(folder.rstrip("/")[-100:], problem=f"a folder below more than {DEEPEST} others is not looked into")
        return
    status = os.stat(root / folder)
    if (identity := (status.st_dev, status.st_ino)) in seen:
        return
    seen.add(identity)
    entries = sorted((e for e in os.scandir(root / folder) if not e.name.startswith(".")), key=lambda e: e.name)
    ours = written_in(root / folder)
    yield from (Found(f"{folder}{e.name}/", problem=MADE) for e in entries if ours(e.name) and _holds_images(e))
    entries = [e for e in entries if not ours(e.name)]
    beside = _Captions(entries)
    table = _table_in(source, root / folder, {e.name for e in entries}) if tables and folder else None
    covered: set[str] = set()
    for found in _of_table(source, root / folder / table, folder) if table else ():
        covered |= {found.name, found.about}
        yield found
    for entry in entries:
        name = f"{folder}{entry.name}"
        if name in others:
            if _extension(name) != "tar":
                yield Found(name, problem=others[name])
        elif is_folder(entry):
            if entry.name != "__MACOSX":
                yield from _of_files(source, root, f"{name}/", seen, others, tables=tables)
        elif tables and is_table(entry.name) and (rows := _of_images_in(source, name)):
            yield from rows
        elif folder and _extension(entry.name) == "tar":
            yield Found(name, problem="a shard below the folder of this set; give its own folder as a set")
        elif name in covered or _extension(entry.name) not in decode.EXTENSIONS:
            continue
        elif table:
            yield Found(name, problem=f"no good row of {folder}{table} names it")
        else:
            texts = beside.of(entry.name)
            if out := [
                e.name for e in (entry, *(e for _, e in texts)) if e.is_symlink() and leads_out(root, f"{folder}{e.name}")
            ]:
                yield Found(name, problem=f"'{out[0]}' {LEADS_OUT}")
                continue
            try:
                sidecars = tuple((kind, whole(f"{folder}{e.name}", e.stat())) for kind, e in texts)
                yield Found(name, whole(name, entry.stat()), sidecars)
            except OSError as e:
                yield Found(name, problem=f"cannot be read: {e.strerror}")


MADE = "dedistill made what is in it; to train on that, give it as a set of its own"


def _holds_images(entry: os.DirEntry[str]) -> bool:
    files = Path(entry.path).rglob("*") if is_folder(entry) else ()
    return any(_extension(file.name) in decode.EXTENSIONS for file in files)


class _Captions:
    """The caption files of one folder, by the images that they belong to."""

    def __init__(self, entries: list[os.DirEntry[str]]):
        files = [e for e in entries if _extension(e.name) in caption_files.EXTENSIONS]
        self._exact: dict[str, list[os.DirEntry[str]]] = {}
        self._same: dict[str, list[os.DirEntry[str]]] = {}
        for e in sorted(files, key=lambda e: caption_files.EXTENSIONS.index(_extension(e.name))):
            self._exact.setdefault(_stem(e.name), []).append(e)
            self._same.setdefault(one_spelling(_stem(e.name)), []).append(e)

    def of(self, image: str) -> list[tuple[str, os.DirEntry[str]]]:
        """(kind, file) for all of this image's name, their extension in any case; else for those whose name reads the same."""
        found = self._exact.get(_stem(image)) or self._same.get(one_spelling(_stem(image)), [])
        return [(_extension(e.name), e) for e in found]


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def one_spelling(name: str) -> str:
    """The same for all ways to write a letter with an accent: macOS takes it apart, others do not."""
    return unicodedata.normalize("NFC", name)


LEADS_OUT = "is a link that leads out of this folder: put a copy in its place"


def leads_out(root: Path, name: str) -> bool:
    """Whether file ``name`` is a link to outside of ``root`` and of the folder that it stands in.

    Else whoever makes a data set could have any file read as a caption, and shown. Links to whole folders are the user's own
    doing; in the cache of the Hugging Face hub the files are links to the blobs beside the snapshot.
    """
    path = root / name
    try:
        if not path.is_symlink():
            return False
        top, real = Path(os.path.realpath(root)), Path(os.path.realpath(path))
        blobs = [above.parent / "blobs" for above in top.parents if above.name == "snapshots"]
        return not any(real.is_relative_to(home) for home in (top, Path(os.path.realpath(path.parent)), *blobs))
    except (OSError, ValueError):  # whoever reads it says what is wrong
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
            yield from known(place) or samples_of(root, place)
        except OSError as e:
            yield Found(shard, problem=f"cannot be read: {e.strerror or e}")


def _of_images_in(source: ImageSet, file: str) -> Iterator[Found] | None:
    """The images that a table holds itself; None for one that holds none, or names files."""
    path = source.root / file
    try:
        if is_table(file) and (place := whole(file, os.stat(path))) and image_column(path, source.file_column):
            return rows_of(source, path, place)
    except (OSError, ValueError) as e:
        return iter([Found(file, problem=f"cannot be read: {getattr(e, 'strerror', None) or e}")])
    return None


def _of_table(source: ImageSet, path: Path, folder: str = "") -> Iterator[Found]:
    """The images of a list. folder: of the list, below the source's root, with a slash at its end."""
    places: dict[str, Found] = {}
    for file, captions, problem, about in read_table(source, path):
        if problem:
            yield Found(f"{folder}{file}", problem=problem, about=about and f"{folder}{os.path.normpath(about)}")
            continue
        inside = os.path.normpath(os.path.relpath(file, path.parent) if os.path.isabs(file) else file)
        inside = next((name for name in _spellings(inside) if _exists(path.parent / name)), inside)
        name = f"{folder}{inside}"
        if inside.startswith(".."):
            yield Found(file, problem=f"lies outside '{path.parent}', the folder of {path.name}")
        elif leads_out(path.parent, inside):
            yield Found(name, problem=f"'{inside}' {LEADS_OUT}")
        elif name in places:  # under another spelling
            both = tuple(dict.fromkeys((*(places[name].captions or ()), *captions)))
            places[name] = replace(places[name], captions=both)
        else:
            try:
                places[name] = Found(name, whole(name, os.stat(path.parent / inside)), captions=captions)
            except (OSError, ValueError) as e:
                yield Found(name, problem=f"listed in {path.name}, but cannot be read: {getattr(e, 'strerror', e)}")
    yield from places.values()


def _spellings(file: str) -> list[str]:
    """A file as a table names it, and what it is called on this disk where another system wrote the table."""
    slashed = os.path.normpath(file.replace("\\", "/"))
    return [name if form is None else unicodedata.normalize(form, name) for name in (file, slashed) for form in _FORMS]


_FORMS: tuple[Literal["NFC", "NFD"] | None, ...] = (None, "NFC", "NFD")


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except (OSError, ValueError):  # too long a name, or a NUL in it
        return False
