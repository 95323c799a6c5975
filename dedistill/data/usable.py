"""The images of a recipe: what can be used, what is left out and why. Nothing is encoded, and no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dedistill.data.images.buckets import crops_of, too_small
from dedistill.data.images.index import Index, build_index
from dedistill.data.images.listing import images_of
from dedistill.data.images.types import ImageSet
from dedistill.data.split import CroppedImage, Split, split
from dedistill.errors import UserError
from dedistill.io.atomic import replace_file
from dedistill.io.ownership import claim
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import filled

SPLIT_LINES = {"auto": None, "always": True, "never": False}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Usable:
    """cache: the folder; images: those that crops can be made of; index: all, with reasons for those that are left out."""

    cache: Path
    index: Index
    images: list[CroppedImage]
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
            small.append((sample.name, too_small(sample, resolutions=resolutions, max_upscale=most)))
    index.quarantined += small
    for name, reason in index.quarantined[:5]:
        say(f"left out: {name}: {reason}")
    if len(index.quarantined) > 5:
        say(f"left out: {len(index.quarantined) - 5:,} more (all in '{_write_quarantine(cache, index)}')")
    if not images:
        raise UserError(f"{recipe.where('data.sets')}: no usable image; e.g. {': '.join(index.quarantined[0])}")
    return Usable(cache, index, images, split(images, filled(data.held_out, "data.held_out")))


def _write_quarantine(cache: Path, index: Index) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / "quarantine.txt"
    replace_file(file, "".join(f"{name}: {reason}\n" for name, reason in index.quarantined).encode())
    return file
