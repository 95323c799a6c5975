"""From a recipe to a source of samples; images and captions are encoded once, before training."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dedistill.data.cache import Store, sole_writer
from dedistill.data.digits import idx_files, load_digits, load_mnist
from dedistill.data.encoded import FEATURES, EncodedImages, latent_key, read_text, text_key
from dedistill.data.images.buckets import Crop, apply_crop
from dedistill.data.images.index import READERS, Index, Sample
from dedistill.data.pairs import FACTS, PairSource
from dedistill.data.source import Source
from dedistill.data.split import CroppedImage, check_trained
from dedistill.data.usable import Say, Usable, hints, look
from dedistill.distributed.outside import heartbeat
from dedistill.distributed.world import World
from dedistill.errors import UserError, amount, enough_memory
from dedistill.flow import keyed
from dedistill.io.hashing import fingerprint
from dedistill.io.ownership import refuse_foreign
from dedistill.models.conditioning import Conditioning, stored_shapes
from dedistill.models.family import Components, Family
from dedistill.models.image_prompts import parted
from dedistill.models.model import adapted_layers, check_asked, sampled_shape
from dedistill.models.registry import get_family, text_length
from dedistill.recipe import Recipe
from dedistill.recipe.data_tables import Data
from dedistill.recipe.resolve import filled
from dedistill.recipe.schema import shift_in_numbers

# --- from a recipe's [data] table to a source ------------------------------------------------------------------------


def open_source(data: Data) -> Source:
    """The source that ``data`` (a recipe's [data] table) names, which has nothing to encode. Raises UserError if unreadable."""
    if data.source == "pairs":
        return PairSource(Path(filled(data.path, "data.path")))
    if data.source == "mnist":
        return load_mnist(data.path, data.caption_noise)
    if data.source == "digits":
        return load_digits(data.caption_noise)
    raise ValueError(f"'{data.source}' must be encoded first: dedistill.data.encode.open_data")


def check_images(recipe: Recipe, data: tuple[int, ...] | None, network: tuple[int, ...]) -> None:
    """Raises UserError for samples of another shape than ``network`` takes; None: they are of several."""
    if data is not None and tuple(data) != tuple(network):
        raise UserError(
            f"{recipe.where('data.source')}: images are {data[0]} x {data[1]} x {data[2]} (channels, height, width), "
            f"the network takes {network[0]} x {network[1]} x {network[2]}",
            exit_code=2,
        )


def data_files(data: Data) -> list[Path]:
    """The files whose bytes decide what ``data`` draws; pairs.json holds the hash of every shard. Empty for packages."""
    if data.path is None:  # images are bound by what the index says of them
        return []
    return [Path(data.path) / FACTS] if data.source == "pairs" else idx_files(Path(data.path))


# --- what is encoded once, before training ---------------------------------------------------------------------------


IMAGES_PER_SHARD = 32
CAPTIONS_PER_SHARD = 256
Item = TypeVar("Item")


@dataclass
class Prepared:
    """A source to train on, and captions by which the model is asked for images, encoded where they can be."""

    source: Source
    text_cache: dict[str, Conditioning] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    digest: str | None = None
    """Hash of images and captions; None for sources whose files are hashed instead."""


def open_data(
    recipe: Recipe, device: torch.device | str, say: Say, world: World | None = None, usable: Usable | None = None
) -> Prepared:
    """The data that ``recipe`` trains on. Images of the user's own are encoded first, as far as they are not yet.

    The processes of ``world`` share that work; all must come here. usable: what a look at the images found already.
    """
    if recipe.data.source != "pictures":
        return Prepared(open_source(recipe.data))
    family, components = _encoders(recipe)
    components.device = device
    return prepare(recipe, family, components, say=say, world=world or World(), usable=usable)


def _encoders(recipe: Recipe) -> tuple[Family, Components]:
    """What encodes. Raises UserError for model files, and for names of layers, that would end a start later."""
    family = get_family(recipe.model.family, recipe.where("model.family"))
    components = family.load(recipe.model, seed=recipe.run.seed, denoiser=False)
    check_asked(recipe, family, components)
    if components.vae is None:
        raise UserError(f"{recipe.where('data.source')}: {family.spec.name} has no codec that encodes 'pictures'", 2)
    check_shifts(recipe, family, components)
    adapted_layers(recipe, family, family.full_size(recipe.model).denoiser)
    sampled_shape(recipe, family, components)
    return family, components


def check_shifts(recipe: Recipe, family: Family, components: Components) -> None:
    """Raises UserError where a shift is "auto" and the model's scheduler does not say it."""
    for shift in (recipe.timesteps.shift, recipe.sample.shift):
        shift_in_numbers(shift, lambda: family.shift(components, family.tokens(components, components.sample_shape)))


def prepare(
    recipe: Recipe,
    family: Family,
    components: Components,
    *,
    say: Say,
    world: World | None = None,
    usable: Usable | None = None,
) -> Prepared:
    """Encode what the cache lacks, then open it.

    Raises UserError when nothing usable is found, or when the cache was made with other encoders or settings.
    """
    world = world or World()
    say = say if world.main else _silence
    for rank in range(2):  # rank 0 looks first, and leaves the others an index to read
        if min(world.rank, 1) == rank:
            usable = usable or look(recipe, say)
            latents, texts = open_stores(recipe, family, components, usable.cache)
        world.wait()
    assert usable, "each rank has looked in its turn"
    cache, images = usable.cache, usable.images
    check_trained(usable.split, len(recipe.data.sets))
    _check_sizes(recipe, family, components, {(c.height, c.width) for image in images for c in image.crops})
    prompts = _prompts(recipe)
    captions = list(dict.fromkeys([*prompts, *(c for p in images for c in p.sample.captions)]))
    if any(world.gather(bool(_missing_captions(captions, texts) or _missing_images(images, latents)))):
        with sole_writer(cache, say) if world.main else nullcontext():
            world.wait()
            latents, texts = open_stores(recipe, family, components, cache)  # another run may have written meanwhile
            check_encoders(components)
            for hint in hints(usable):
                say(hint)
            mine = slice(world.rank, None, world.size)
            captions_left, images_left = _missing_captions(captions, texts)[mine], _missing_images(images, latents)[mine]
            world.wait()
            length = _length(recipe, family)
            cut = sum(world.gather(_encode_captions(captions_left, texts, family, components, length, say)))
            if cut:
                say(f"{amount(cut, 'caption is', 'captions are')} longer than {length} tokens and cut")
            components.text.unload()
            _encode_images(images_left, usable.index, latents, family, components, say)
            if components.vae:
                components.vae.unload()
            world.wait()
        latents, texts = open_stores(recipe, family, components, cache)
    text_cache = dict(zip(prompts, read_text(texts, prompts, stored_shapes(components.text.widths))))
    weights, latent_shape = [s.weight for s in recipe.data.sets], partial(family.latent_shape, components)
    widths = components.text.widths
    features = components.image_prompts.encoder.shape if components.image_prompts else None
    source = EncodedImages(
        usable.split, weights, latents, texts, latent_shape=latent_shape, text_widths=widths, features=features
    )
    facts = _facts(usable, len(captions)) | {"cache_bytes": latents.bytes() + texts.bytes()}
    return Prepared(source, text_cache, facts, source.digest)


def _facts(usable: Usable, captions: int) -> dict[str, int]:
    crops = [(crop.height, crop.width) for image in usable.images for crop in image.crops]
    return {
        "images": len(usable.images),
        "crops": len(crops),
        "buckets": len(set(crops)),
        "captions": captions,
        "held_out_images": len(usable.split.held),
        "quarantined": len(usable.index.quarantined),
    }


def _check_sizes(recipe: Recipe, family: Family, components: Components, sizes: set[tuple[int, int]]) -> None:
    """Raises UserError, before anything is encoded, for crops of a size that the network cannot have."""
    for height, width in sorted(sizes, reverse=True):
        try:
            family.latent_shape(components, height, width)
        except UserError as e:
            raise UserError(f"{recipe.where('data.resolutions')}: {e}", exit_code=2) from e


def check_encoders(components: Components) -> None:
    """All that encodes is looked at before the first caption is: of hours of work, none is done for a codec that is damaged."""
    components.text.check()
    if components.vae:
        components.vae.check()


def _silence(line: str) -> None:
    """What ranks other than the first say."""


def _prompts(recipe: Recipe) -> list[str]:
    """Captions beside those of images: the empty one, of dropout and guidance, and what previews are made with."""
    return [parted(prompt)[0] for prompt in ("", recipe.sample.negative, *recipe.preview.prompts)]


def check_cached(recipe: Recipe) -> None:
    """Raises UserError for a recipe whose data are not encoded beforehand."""
    if recipe.data.source != "pictures":
        own = f"'{recipe.data.source}' has no cache: only data.source = 'pictures' is encoded"
        raise UserError(f"{recipe.where('data.source')}: {own}", 2)


def check_cache(recipe: Recipe, *, say: Say) -> list[str]:
    """What is wrong with the cache of ``recipe``: one line per problem, nothing is encoded. Reads every shard."""
    check_cached(recipe)
    family, components = _encoders(recipe)
    usable = look(recipe, say)
    images = usable.images
    latents, texts = open_stores(recipe, family, components, usable.cache)
    problems = [f"'{shard}' is damaged: delete it, it is encoded again" for s in (latents, texts) for shard in s.damaged()]
    wanted = {latent_key(p.sample, crop) for p in images for crop in p.crops}
    captions = {text_key(c) for c in [*_prompts(recipe), *(c for p in images for c in p.sample.captions)]}
    for store, keys, what in ((latents, wanted, "crops"), (texts, captions, "captions")):
        missing = sum(key not in store for key in keys)
        unused = len(store) - len(keys) + missing
        say(f"{what}: {len(keys) - missing:,} of {len(keys):,} are encoded, {unused:,} more are not needed now")
        if missing:
            problems.append(f"{missing:,} of {len(keys):,} {what} are not encoded yet: run dedistill prepare")
    return problems


def open_stores(recipe: Recipe, family: Family, components: Components, cache: Path) -> tuple[Store, Store]:
    """(latents, text). Raises UserError, naming what differs, when they were made by other encoders or settings."""
    inputs = _inputs(recipe, family, components, cache)
    return Store(cache / "latents", inputs["latents"]), Store(cache / "text", inputs["text"])


def cached_text(recipe: Recipe, family: Family, components: Components) -> dict[str, Conditioning]:
    """What the cache of ``recipe`` has of the empty prompt, the negative one and those of previews; nothing without a cache.

    A finished model that is given these uses the very tensors it was trained with. Raises as ``open_stores`` does.
    """
    if recipe.data.source != "pictures" or not (cache := Path(filled(recipe.data.cache, "data.cache"))).is_dir():
        return {}
    refuse_foreign(cache, "cache", "data.cache")
    texts = Store(cache / "text", _inputs(recipe, family, components, cache)["text"])
    there = [c for c in _prompts(recipe) if text_key(c) in texts]
    return dict(zip(there, read_text(texts, there, stored_shapes(components.text.widths))))


def _inputs(recipe: Recipe, family: Family, components: Components, cache: Path) -> dict[str, dict[str, object]]:
    """What "latents" and "text" were made with; of files their hash."""
    inputs = family.cache_inputs(components, _length(recipe, family))
    inputs["latents"]["colours"] = "sRGB"  # once they were taken for that, whatever an image's profile said
    for table in inputs.values():
        for key, value in table.items():
            if isinstance(value, list):
                table[key] = fingerprint(value, cache / "hashes.json")
    return inputs


def _length(recipe: Recipe, family: Family) -> int:
    return text_length(family, filled(recipe.model.text_length, "model.text_length"), recipe.where("model.text_length"))


def _missing_captions(captions: list[str], store: Store) -> list[str]:
    return [c for c in captions if text_key(c) not in store]


def _missing_images(images: list[CroppedImage], store: Store) -> list[CroppedImage]:
    return [p for p in images if any(latent_key(p.sample, crop) not in store for crop in p.crops)]


def _encode_captions(captions: list[str], store: Store, family: Family, components: Components, length: int, say: Say) -> int:
    """Returns how many ``captions`` are longer than ``length`` tokens, and so were cut."""
    cut = 0
    for chunk in _with_progress(captions, CAPTIONS_PER_SHARD, "caption", say):
        heartbeat.beat("encoding captions", patient=True)
        cut += sum(tokens > length for tokens in components.text.tokens(chunk))
        text = family.encode_text(components, chunk, length)
        stored = {c: _stored(text.index_select(slice(i, i + 1)), components.mask) for i, c in enumerate(chunk)}
        for caption, tensors in stored.items():
            if not all(t.isfinite().all() for t in tensors.values()):
                raise UserError(
                    f"model.path: the text encoders give numbers that are not finite (NaN or Inf) for {caption[:60]!r}. If "
                    "they do for all captions, their weights are damaged, or too large for fp16: take them in bf16"
                )
        store.write({text_key(caption): tensors for caption, tensors in stored.items()})
    return cut


def _stored(text: Conditioning, mask: str) -> dict[str, Tensor]:
    """One caption as it is kept: without its padding where that is invisible anyway."""
    text = text.trimmed() if mask == "bool" else text
    return {name: tensor[0].cpu() for name, tensor in text.tensors().items()}


def _encode_images(
    images: list[CroppedImage], index: Index, store: Store, family: Family, components: Components, say: Say
) -> None:
    place = {id(sample): i for i, sample in enumerate(index.samples)}

    def pixels(image: CroppedImage) -> list[np.ndarray]:
        with enough_memory(f"decoding '{image.sample.name}'"):
            whole = index.image(place[id(image.sample)])
            return [apply_crop(whole, crop) for crop in image.crops]

    with ThreadPoolExecutor(READERS) as pool:  # decoding and resizing take as long as encoding does
        for chunk in _with_progress(images, IMAGES_PER_SHARD, "image", say):
            entries: dict[str, dict[str, Tensor]] = {}
            heartbeat.beat("decoding images")
            for image, crops in zip(chunk, pool.map(pixels, chunk)):
                heartbeat.beat("encoding images", patient=True)
                for crop, array in zip(image.crops, crops):
                    entry = {"latent": _latent(image.sample, crop, array, family, components)}
                    if components.image_prompts:
                        made = components.image_prompts.encoder([Image.fromarray(array)], components.device)
                        entry[FEATURES] = made[0].to("cpu", torch.bfloat16)
                    entries[latent_key(image.sample, crop)] = entry
                heartbeat.beat("decoding images")
            store.write(entries)
    if components.image_prompts:
        components.image_prompts.encoder.unload()


def _latent(sample: Sample, crop: Crop, pixels: np.ndarray, family: Family, components: Components) -> Tensor:
    """One encoded crop [C, h, w], float16, its posterior sampled with noise that belongs to its key."""
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    shape = family.latent_shape(components, crop.height, crop.width)
    noise = keyed.noise(0, f"vae/{latent_key(sample, crop)}", 0, [0], shape)
    latent = family.encode_images(components, x, noise)[0].to("cpu", torch.float16)
    if not latent.isfinite().all():
        raise UserError(
            f"data: the latents of '{sample.name}' are not finite. Where that is so of all images, the VAE is damaged; else "
            "leave this image out"
        )
    return latent


def _with_progress(items: list[Item], size: int, what: str, say: Say) -> Iterator[list[Item]]:
    """``items`` in chunks of ``size``, saying how far it is and how long it will take."""
    start = reported = time.monotonic()
    for i in range(0, len(items), size):
        yield items[i : i + size]
        now, done = time.monotonic(), min(i + size, len(items))
        if done == len(items) or now - reported > 10:
            left = (len(items) - done) * (now - start) / done
            speed = f"{done / (now - start):.1f} per second, {left / 60:.0f} min left"
            say(f"encoded {done:,} of {amount(len(items), what)}, {speed}")
            reported = now
