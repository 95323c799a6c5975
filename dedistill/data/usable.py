"""The images of a recipe: what can be used, what is left out and why. Nothing is encoded, and no torch."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dedistill.data.images.buckets import Sized, crops_of, needed_upscale, too_small
from dedistill.data.images.decode import BadImage, size_by_header
from dedistill.data.images.duplicates import MOST_CROPPED, near_duplicates
from dedistill.data.images.index import NO_CAPTION, Index, Sample, build_index, read_bytes
from dedistill.data.images.likeness import Likeness
from dedistill.data.images.listing import images_of
from dedistill.data.images.rows import is_table
from dedistill.data.images.scan import caption_warnings
from dedistill.data.images.types import Found, ImageSet
from dedistill.data.split import CroppedImage, Split, split
from dedistill.distributed.outside import heartbeat
from dedistill.errors import UserError, amount
from dedistill.io.atomic import make_folder, replace_file, replace_json
from dedistill.io.json_files import read_object
from dedistill.io.ownership import claim
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import filled

UPSCALES = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Values of data.max_upscale that are proposed; more makes images of blur."""
LARGE = 0.2
"""Share of all images from which on one group of near-duplicates is told."""
VERSION = 2
"""To be raised when near-duplicates are found in another way."""
SPLIT_LINES = {"auto": None, "always": True, "never": False}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Usable:
    """cache: the folder; images: those that crops can be made of; small: those too small for any; index: of the images, with
    reasons for all that are left out."""

    cache: Path
    index: Index
    images: list[CroppedImage]
    small: list[Sample]
    split: Split


def image_sets(recipe: Recipe) -> list[ImageSet]:
    """The recipe's [[data.sets]] with the settings they share."""
    data = recipe.data
    return [
        ImageSet(
            s.path,
            name=s.name or "",
            fields=tuple(s.captions or ()),
            file_column=s.file_column or "file_name",
            split=s.split,
            split_lines=SPLIT_LINES[filled(data.split_lines, "data.split_lines")],
            missing_captions=filled(data.missing_captions, "data.missing_captions"),
        )
        for s in data.sets
    ]


def without_captions(recipe: Recipe) -> list[str]:
    """Names of images that have no caption of any kind, in all sets; lists files and reads none of them."""
    everything = (found for s in image_sets(recipe) for found in images_of(s, lambda *stamp: None))
    return [found.name for found in everything if not found.problem and not found.captions and not found.sidecars]


def look(recipe: Recipe, say: Say) -> Usable:
    """What of the recipe's sets can be used. Raises UserError where nothing can."""
    data, cache = recipe.data, Path(filled(recipe.data.cache, "data.cache"))
    claim(cache, "cache", "data.cache")
    index = build_index(image_sets(recipe), file=cache / "index.jsonl", say=say, limit=data.limit)
    resolutions, most = filled(data.resolutions, "data.resolutions"), filled(data.max_upscale, "data.max_upscale")
    modes, each = filled(data.crops, "data.crops"), filled(data.crops_per_picture, "data.crops_per_picture")
    images, small = [], []
    for sample in index.samples:
        # a fixed seed: runs with other seeds share what is encoded
        crops = crops_of(sample, modes=modes, per_image=each, seed=0, resolutions=resolutions, max_upscale=most)
        if crops:
            images.append(CroppedImage(sample, tuple(crops)))
        else:
            small.append(sample)
            index.quarantined.append((sample.name, too_small(sample, resolutions=resolutions, max_upscale=most)))
    index.samples = [p.sample for p in images]
    for name, reason in index.quarantined[:5]:
        say(f"left out: {name}: {reason}")
    if len(index.quarantined) > 5:
        say(f"left out: {len(index.quarantined) - 5:,} more (all in '{_write_quarantine(cache, index)}')")
    total = len(images) + len(index.quarantined)
    words = small_words(small, total, recipe)
    if not images:
        way_out = f". {words}" if words else ""
        raise UserError(f"{recipe.where('data.sets')}: no usable image; e.g. {': '.join(index.quarantined[0])}{way_out}")
    if words:
        say(f"left out: {words}")
    near = near_groups(images, cache / "duplicates.json")
    halves = split(images, filled(data.held_out, "data.held_out"), near, data.fold)
    if data.fold and not halves.held:
        parts = amount(data.fold[1], "part")
        raise UserError(f"{recipe.where('data.fold')}: too few different images for {parts}: some would be empty", 2)
    return Usable(cache, index, images, small, halves)


def small_words(small: Sequence[Sized], total: int, recipe: Recipe) -> str:
    """How many of all images are too small, and which key takes how many of them; empty where none is."""
    if not small:
        return ""
    resolutions, modes = filled(recipe.data.resolutions, "data.resolutions"), filled(recipe.data.crops, "data.crops")
    needed = [needed_upscale(sample, resolutions=resolutions, modes=modes) for sample in small]
    counts = {upscale: sum(n <= upscale for n in needed) for upscale in UPSCALES}
    most = max(counts.values())
    said = f"{len(small):,} of {amount(total, 'image')} {'is' if len(small) == 1 else 'are'} too small"
    if not most:
        return f"{said} for data.resolutions = {resolutions}: lower ones take them"
    upscale = next(upscale for upscale, count in counts.items() if count >= 0.8 * most)
    return f"{said}; data.max_upscale = {upscale:g} would take {counts[upscale]:,} of them"


def by_headers(recipe: Recipe) -> str:
    """How many images the recipe's sets have, and how many of them it can use as far as names and headers tell."""
    data, total, problems, bare, small, fine = recipe.data, 0, list[str](), 0, [], 0
    resolutions, modes = filled(data.resolutions, "data.resolutions"), filled(data.crops, "data.crops")
    for source in image_sets(recipe):
        for found in islice(images_of(source, lambda place: None), data.limit):
            heartbeat.beat("looking at images")
            if found.problem:  # of a whole folder or table, perhaps
                problems.append(f"{found.name}: {found.problem}")
                continue
            total += 1
            try:
                size = size_of(source, found)
            except (OSError, BadImage) as e:
                problems.append(f"{found.name}: {getattr(e, 'strerror', None) or e}")
                continue
            if not found.captions and not found.sidecars and source.missing_captions != "empty":
                bare += 1
            elif needed_upscale(size, resolutions=resolutions, modes=modes) > filled(data.max_upscale, "data.max_upscale"):
                small.append(size)
            else:
                fine += 1
    parts = [
        f"{amount(total, 'image')} by their headers, {fine:,} of them usable",
        f"{len(problems):,} left out, e.g. {problems[0]}" if problems else "",
        f"{bare:,} without a caption (data.missing_captions = 'empty' would take them)" if bare else "",
        small_words(small, total, recipe),
    ]
    return "; ".join(filter(None, parts))


@dataclass(frozen=True)
class Size:
    width: int
    height: int


def size_of(source: ImageSet, found: Found) -> Size:
    """By its header. Raises BadImage or OSError."""
    if found.place.offset or is_table(found.place.file):
        return Size(*size_by_header(io.BytesIO(read_bytes(source, found.place))))
    with open(source.root / found.place.file, "rb") as file:
        return Size(*size_by_header(file))


def left_out_words(usable: Usable, recipe: Recipe) -> list[str]:
    """What the recipe uses and leaves out of its images, and which keys take what it leaves out."""
    total = len(usable.images) + len(usable.index.quarantined)
    bare = sum(reason == NO_CAPTION for _, reason in usable.index.quarantined)
    other = len(usable.index.quarantined) - len(usable.small) - bare
    out = f"{len(usable.index.quarantined):,} left out"
    said = [f"used: {amount(len(usable.images), 'image')}, {len(usable.split.held):,} of them held out; {out}"]
    if words := small_words(usable.small, total, recipe):
        said.append(f"left out: {words}")
    if bare:
        stop = "; training ends with an error for them" if recipe.data.missing_captions == "error" else ""
        said.append(f"left out: {bare:,} without a caption{stop}; data.missing_captions = 'empty' would take them")
    if other:
        said.append(f"left out: {other:,} that cannot be used, for the reasons listed")
    return said


def near_groups(images: Sequence[CroppedImage], file: Path) -> list[list[str]]:
    """Groups of hashes of near-duplicates, of any order of the images the same; kept in ``file``."""
    likenesses = {p.sample.sha256: p.sample.likeness for p in images}
    key = hashlib.sha256(json.dumps([VERSION, sorted(likenesses.items())]).encode()).hexdigest()
    with suppress(UserError):  # not there yet, or damaged
        if (known := read_object(file)).get("key") == key:
            return [list(map(str, group)) for group in known["groups"]]
    names = sorted(likenesses)
    found = near_duplicates([Likeness.unpacked(likenesses[name]) for name in names])
    groups = [[names[i] for i in group] for group in found]
    make_folder(file.parent)
    replace_json(file, {"key": key, "groups": groups})
    return groups


def hints(usable: Usable) -> list[str]:
    """What a user may want to know of a set that is new; nothing of it is wrong."""
    unlooked = [f"data: {len(usable.images):,} images are too many to look for crops among (the limit is {MOST_CROPPED:,})"]
    return near_words(usable) + (unlooked if len(usable.images) > MOST_CROPPED else []) + caption_words(usable.index)


def caption_words(index: Index) -> list[str]:
    """Of images with several captions: where lines were taken for captions, and where all are short or all are long."""
    said = []
    for number, source in enumerate(index.sources):
        own = (entry for entry in index.entries if entry.sample.source == number and len(entry.sample.captions) > 1)
        several = next((e.sample for e in own if {"txt", "caption"} & dict(e.sidecars).keys()), None)
        if several and source.split_lines is None:
            shown = " | ".join(caption[:60] for caption in several.captions[:3])
            said.append(
                f"data: source '{source.title}': each line of a text file is a caption, and one is drawn at a time: "
                f"'{several.name}' has {len(several.captions)}: {shown}. If they are one, set data.split_lines = 'never'"
            )
    if one_sided := caption_warnings(index.samples):
        some = amount(len(one_sided), "image has several captions", "images have several captions")
        said.append(
            f"data: {some}, all of them short or all long, e.g. {': '.join(one_sided[0])}; a model that sees both kinds of an "
            "image follows both kinds of prompts"
        )
    return said


def near_words(usable: Usable) -> list[str]:
    """What of near-duplicates a user must know: how many there are, and of groups that are too large to be held out."""
    groups: dict[str, list[str]] = {}
    for p in usable.images:
        if p.sample.sha256 in usable.split.near:
            groups.setdefault(usable.split.unit(p), []).append(p.sample.name)
    if not groups:
        return []
    largest = max(groups.values(), key=len)
    several = amount(sum(map(len, groups.values())), "image")
    said = [
        f"data: {several} in {amount(len(groups), 'group')} of near-duplicates (copies, crops, mirrored ones) are held out "
        f"together or not at all; e.g. {' = '.join(largest[:3])}"
    ]
    if len(largest) > LARGE * len(usable.images):
        said.append(
            f"data: {len(largest):,} of {amount(len(usable.images), 'image')} are one group, each like some other of it "
            f"('{largest[0]}' to '{largest[-1]}'): they count as one image wherever different ones are counted"
        )
    return said


def _write_quarantine(cache: Path, index: Index) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / "quarantine.txt"
    replace_file(file, "".join(f"{name}: {reason}\n" for name, reason in index.quarantined).encode())
    return file
