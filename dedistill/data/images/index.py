"""Every usable image of the user's sources with its captions, kept in a file so that a second look costs next to nothing."""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from dedistill.data.images import caption_files, decode
from dedistill.data.images.caption_files import BadCaption
from dedistill.data.images.duplicates import MOST_CROPPED
from dedistill.data.images.likeness import VERSION as LIKENESS
from dedistill.data.images.likeness import likeness
from dedistill.data.images.listing import images_of, not_read
from dedistill.data.images.rows import is_table, read_row
from dedistill.data.images.types import NOWHERE, Found, ImageSet, Place
from dedistill.distributed.outside import heartbeat
from dedistill.errors import UserError, amount
from dedistill.io.atomic import WholeFile, make_folder

FORMAT = f"dedistill index 4, likeness {LIKENESS}"
CHUNK = 1024
NO_CAPTION = "no caption"
SAVE_EVERY = 60.0
"""Seconds between saves of an unfinished index, so that a killed one goes on where it was."""
READERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Sample:
    """One image. ``name`` is ``<source>/<path>`` or ``<source>/<shard>::<key>``; sizes in pixels, upright.

    ``sha256`` is that of the image's bytes, ``source`` the number of its source, ``place`` where the bytes lie, ``likeness``
    what copies of it are found by (``images.likeness``, packed).
    """

    name: str
    captions: tuple[str, ...]
    width: int
    height: int
    sha256: str
    source: int
    place: Place
    likeness: str = ""


@dataclass(frozen=True)
class Entry:
    """An image as the index file keeps it, usable or not: ``reason`` says why not."""

    sample: Sample
    sidecars: tuple[tuple[str, Place], ...]
    reason: str


@dataclass(frozen=True)
class Limits:
    """crops: whether likenesses are to tell crops of one image."""

    max_pixels: int = decode.MAX_PIXELS
    max_bytes: int = decode.MAX_BYTES
    crops: bool = True

    @property
    def of_decoding(self) -> dict[str, int]:
        return {"max_pixels": self.max_pixels, "max_bytes": self.max_bytes}


class Index:
    """``samples``: the usable images, in the order their sources list them. ``quarantined``: the others, with reasons."""

    def __init__(self, sources: Sequence[ImageSet], limits: Limits, entries: Sequence[Entry], *, complete: bool = True):
        self.sources, self.limits, self.entries, self.complete = list(sources), limits, list(entries), complete
        self.samples: list[Sample] = []
        self.quarantined: list[tuple[str, str]] = []
        self.without_caption: list[str] = []
        for entry in entries:
            sample, policy = entry.sample, self.sources[entry.sample.source].missing_captions
            if entry.reason:
                self.quarantined.append((sample.name, entry.reason))
            elif sample.captions:
                self.samples.append(sample)
            elif policy == "empty":
                self.samples.append(replace(sample, captions=("",)))
            else:
                self.quarantined.append((sample.name, NO_CAPTION))
                self.without_caption += [sample.name] if policy == "error" else []

    def read(self, i: int) -> bytes:
        """The bytes of sample i. Raises ``UserError`` when they are no longer what was indexed."""
        sample = self.samples[i]
        try:
            data = read_bytes(self.sources[sample.source], sample.place)
        except (OSError, decode.BadImage) as e:
            raise UserError(f"data: '{sample.name}' cannot be read: {e}") from e
        if hashlib.sha256(data).hexdigest() != sample.sha256:
            raise UserError(f"data: '{sample.name}' has changed since it was indexed; start again to index it anew")
        return data

    def image(self, i: int) -> Image.Image:
        """Sample i decoded, upright RGB. Raises as ``read`` does."""
        return decode.decode(self.read(i), **self.limits.of_decoding)

    def save(self, path: Path) -> None:
        """Write JSON lines: a header, one entry per line, and a hash of all that. Old or new, never a part of either."""
        header = {"format": FORMAT, "complete": self.complete, "limits": asdict(self.limits)}
        header["sources"] = [asdict(source) for source in self.sources]
        make_folder(path.parent)
        digest = hashlib.sha256()
        with WholeFile(path) as file:
            for row in (header, *map(_row, self.entries)):
                line = json.dumps(row).encode() + b"\n"
                digest.update(line)
                file.write(line)
            file.write(json.dumps({"sha256": digest.hexdigest()}).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read a saved index. Raises ``UserError`` when there is none, or any byte of it has changed since."""
        try:
            lines = path.read_bytes().splitlines(keepends=True)
            header = json.loads(lines[0])
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']!r}, expected {FORMAT!r}")
            if json.loads(lines.pop()) != {"sha256": hashlib.sha256(b"".join(lines)).hexdigest()}:
                raise ValueError("it differs from what was written")
            sources = [ImageSet(**source | {"fields": tuple(source["fields"])}) for source in header["sources"]]
            entries = [_entry(*json.loads(line)) for line in lines[1:]]
            return cls(sources, Limits(**header["limits"]), entries, complete=header["complete"])
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as e:
            raise UserError(f"data: the index '{path}' cannot be read ({e}); delete it to have it made anew") from e


def _row(entry: Entry) -> list[object]:
    s = entry.sample
    return [s.name, s.captions, s.width, s.height, s.sha256, s.source, s.place, s.likeness, entry.sidecars, entry.reason]


def _entry(
    name: str,
    captions: list[str],
    width: int,
    height: int,
    sha256: str,
    source: int,
    place: list[Any],
    likeness: str,
    sidecars: list[tuple[str, list[Any]]],
    reason: str,
) -> Entry:
    """The inverse of :func:`_row`, as JSON gives it back."""
    sample = Sample(name, tuple(captions), width, height, sha256, source, Place(*place), likeness)
    return Entry(sample, tuple((kind, Place(*p)) for kind, p in sidecars), reason)


def build_index(
    sources: Sequence[ImageSet],
    *,
    file: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    limits: Limits | None = None,
    limit: int | None = None,
) -> Index:
    """Look at every image of ``sources``: decode it once, find its captions, quarantine what cannot be used.

    ``file`` keeps the index: images and captions whose file has the same stamp as there are not read again. Bad
    ones are looked at anew each time. ``limit`` takes only the first images of each source. Raises ``UserError`` when
    nothing usable is left, when two sources share a name, and for images without a caption where the source's
    ``missing_captions`` is "error".
    """
    _check_names(sources)
    limits = limits or Limits()
    known = _Known(sources, limits, file, say)
    found = [
        (number, item)
        for number, source in enumerate(sources)
        for item in islice(images_of(source, known.listing(number)), limit)
    ]
    if len(found) > MOST_CROPPED:
        limits = replace(limits, crops=False)
    known.forget_without(limits)
    keep = file if limit is None else None  # a few first images never replace a whole index
    entries: list[Entry] = []
    saved = reported = time.monotonic()
    with ThreadPoolExecutor(READERS) as pool:
        for chunk in _chunks(found):
            jobs = [
                known.reuse(number, item) or pool.submit(_look, sources, number, item, known, limits) for number, item in chunk
            ]
            for job in jobs:
                heartbeat.beat("looking at images")
                entries.append(job if isinstance(job, Entry) else job.result())
            now = time.monotonic()
            if keep and now - saved > SAVE_EVERY:
                Index(sources, limits, known.entries + entries, complete=False).save(keep)
                saved = now
            if now - reported > 10:
                say(f"data: looked at {len(entries):,} of {amount(len(found), 'image')}")
                reported = now
    index = Index(sources, limits, entries)
    if keep and not known.covers(index):
        index.save(keep)
    _judge(index, say)
    return index


def _check_names(sources: Sequence[ImageSet]) -> None:
    if not sources:
        raise UserError("data: no source is given", 2)
    if slashed := next((source.title for source in sources if "/" in source.title), None):
        raise UserError(f"data: the source name '{slashed}' holds a slash", 2)
    for name, count in Counter(source.title for source in sources).items():
        if count > 1:
            raise UserError(f"data: {count} sources are called '{name}'; give each a 'name' of its own", 2)


Item = TypeVar("Item")


def _chunks(items: list[Item]) -> Iterator[list[Item]]:
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))


class _Known:
    """What an earlier index says about files that have not changed."""

    def __init__(self, sources: Sequence[ImageSet], limits: Limits, file: Path | None, say: Callable[[str], None]):
        self.titles = [source.title for source in sources]
        self.old: Index | None = None
        self.entries: list[Entry] = []
        if file and file.exists():
            try:
                self.old = Index.load(file)
            except UserError as e:
                say(f"{e}; it is made anew now")
        if self.old and self.old.limits.of_decoding == limits.of_decoding:
            now = _same_sources(self.old.sources, sources)
            titles = [source.title for source in self.old.sources]
            for entry in self.old.entries:
                if (to := now[entry.sample.source]) is not None:
                    name = f"{self.titles[to]}/{entry.sample.name.removeprefix(f'{titles[entry.sample.source]}/')}"
                    self.entries.append(replace(entry, sample=replace(entry.sample, source=to, name=name)))
        self.by_name = {entry.sample.name: entry for entry in self.entries}

    def forget_without(self, limits: Limits) -> None:
        """Look at every image again where crops are to be told and the earlier index cannot."""
        if self.old and limits.crops and not self.old.limits.crops:
            self.entries, self.by_name = [], {}

    def covers(self, index: Index) -> bool:
        """Whether the file on disk says just what ``index`` says."""
        old = self.old
        if old is None or not old.complete:
            return False
        return old.sources == index.sources and old.limits == index.limits and old.entries == index.entries

    def listing(self, source: int) -> Callable[[Place], list[Found] | None]:
        """A lookup of whole shards. Of an unfinished index none is known: it may hold half a shard."""
        shards: dict[Place, list[Found]] = {}
        for entry in self.by_name.values() if self.old and self.old.complete else ():
            place = entry.sample.place
            if entry.sample.source == source and place != NOWHERE:
                name = entry.sample.name.removeprefix(f"{self.titles[source]}/")
                problem = "" if place.size else entry.reason
                shard = place._replace(offset=0, size=place.file_size)
                shards.setdefault(shard, []).append(Found(name, place, entry.sidecars, problem=problem))
        return shards.get

    def reuse(self, source: int, found: Found) -> Entry | None:
        """The earlier entry, when the image and its captions are as they were and nothing was wrong with them."""
        old = self.by_name.get(f"{self.titles[source]}/{found.name}")
        if old is None or old.reason or found.problem or (old.sample.place, old.sidecars) != (found.place, found.sidecars):
            return None
        if found.captions is None or found.captions == old.sample.captions:
            return old
        return replace(old, sample=replace(old.sample, captions=found.captions))


def _same_sources(old: Sequence[ImageSet], new: Sequence[ImageSet]) -> list[int | None]:
    """For each source of an index its number now. One whose place is none of today's may be another of the same settings that
    was moved: whether its files are the same is seen by their names and stamps, and then by their bytes."""
    numbers = {_settings(source): number for number, source in enumerate(new)}
    found = [numbers.get(_settings(source)) for source in old]
    free = [number for number in numbers.values() if number not in found]
    for i, source in enumerate(old):
        fitting = [n for n in free if _settings(new[n])[2:] == _settings(source)[2:]]
        if found[i] is None and fitting:
            moved = next((n for n in fitting if new[n].title == source.title), fitting[0])
            free.remove(moved)
            found[i] = moved
    return found


def _settings(source: ImageSet) -> tuple[object, ...]:
    return source.title, source.path, source.fields, source.split_lines, source.file_column


def _look(sources: Sequence[ImageSet], number: int, found: Found, known: _Known, limits: Limits) -> Entry:
    """The entry of one image, from its bytes; from the earlier entry where only its captions have changed."""
    source = sources[number]
    name = f"{source.title}/{found.name}"
    sample = Sample(name.encode("utf-8", "backslashreplace").decode(), (), 0, 0, "", number, found.place)
    problem = found.problem or ("its name is not UTF-8" if sample.name != name else "")
    if problem:
        return Entry(sample, found.sidecars, problem)
    old = known.by_name.get(name)
    try:
        if old and not old.reason and old.sample.place == found.place:
            sample = old.sample
        else:
            sample = _with_facts(sample, source, limits, old)
        captions = found.captions if found.captions is not None else _captions(source, found.sidecars)
        return Entry(replace(sample, captions=captions), found.sidecars, "")
    except (decode.BadImage, BadCaption) as e:
        return Entry(sample, found.sidecars, str(e))
    except OSError as e:
        return Entry(sample, found.sidecars, f"cannot be read: {e.strerror or e}")


def _with_facts(sample: Sample, source: ImageSet, limits: Limits, old: Entry | None) -> Sample:
    """The sample with what its bytes say.

    Of an image that another stamp was put on, but whose bytes are those of its ``old`` entry, nothing is decoded.
    """
    if sample.place.size > limits.max_bytes:
        raise decode.BadImage(f"{sample.place.size:,} bytes; the limit is {limits.max_bytes:,}")
    data = read_bytes(source, sample.place)
    sha256 = hashlib.sha256(data).hexdigest()
    if old and not old.reason and old.sample.sha256 == sha256:
        return replace(old.sample, place=sample.place, captions=(), source=sample.source)
    image = decode.decode(data, **limits.of_decoding)
    like = likeness(image, places=limits.crops).packed()
    return replace(sample, width=image.width, height=image.height, sha256=sha256, likeness=like)


def _captions(source: ImageSet, sidecars: tuple[tuple[str, Place], ...]) -> tuple[str, ...]:
    """The captions of all files beside an image, each once.

    A text file that says what the .json says, as img2dataset writes both, is that caption, not one for each of its lines.
    """
    captions: list[str] = []
    whole = set(_captions(source, tuple(s for s in sidecars if s[0] == "json"))) if len(sidecars) > 1 else set()
    for kind, place in sidecars:
        try:
            if place.size > caption_files.MAX_BYTES:
                raise BadCaption(f"{place.size:,} bytes; the limit is {caption_files.MAX_BYTES:,}")
            data = read_bytes(source, place)
            split_lines = False if _as_one(data) in whole else source.split_lines
            captions += caption_files.captions_in(data, kind, fields=source.fields, split_lines=split_lines)
        except BadCaption as e:
            raise BadCaption(f"its .{kind} file: {e}") from None
    return tuple(dict.fromkeys(captions))


def _as_one(data: bytes) -> str:
    return data.decode("utf-8-sig", "replace").strip()


def read_bytes(source: ImageSet, place: Place) -> bytes:
    """The bytes at ``place`` of a source. Raises OSError or BadImage."""
    if is_table(place.file):
        return read_row(source.root / place.file, place, source.file_column)
    with open(source.root / place.file, "rb") as f:
        f.seek(place.offset)
        return f.read(place.size)


def _judge(index: Index, say: Callable[[str], None]) -> None:
    """Say what each source holds; raise for missing captions, and for a source without a usable image."""
    if index.without_caption:
        count, total = len(index.without_caption), len(index.entries)
        raise UserError(
            f"data: {count:,} of {total:,} images {'has' if count == 1 else 'have'} no caption: "
            f"{', '.join(index.without_caption[:3])}{' ...' if count > 3 else ''}. "
            "Put a .txt, .caption or .json file of the same name beside each, or set "
            'data.missing_captions to "quarantine" (leave them out) or "empty" (train on an empty caption)'
            + "".join(map(not_read, index.sources))
        )
    for number, source in enumerate(index.sources):
        usable = [sample for sample in index.samples if sample.source == number]
        bad = [f"{name}: {reason}" for name, reason in index.quarantined if name.startswith(f"{source.title}/")]
        examples = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
        if not usable:
            held = f"{len(bad):,} cannot be used: {examples}" if bad else "it holds none by name"
            raise UserError(f"data: source '{source.title}': no usable image in '{source.path}' ({held}){not_read(source)}")
        say(
            f"data: source '{source.title}': {amount(len(usable), 'image')}"
            + (f"; left out {len(bad):,}: {examples}" if bad else "")
            + not_read(source)
        )
