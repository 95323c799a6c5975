"""A shard of the cache that is not what was encoded ends training, by its name; deleted, it is encoded again."""

import hashlib
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from dedistill.train import main

Tensors = dict[str, torch.Tensor]


def zeroed(raw: bytes) -> bytes:
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    return raw[:start] + bytes(len(raw) - start)


def noise(raw: bytes) -> bytes:
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    return raw[:start] + bytes(b & 0x3B for b in random.Random(0).randbytes(len(raw) - start))  # finite in every type


def one_bit_in_the_middle(raw: bytes) -> bytes:
    at = len(raw) // 2
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def cut(raw: bytes) -> bytes:
    return raw[:-100]


def rewritten(change: Callable[[Tensors], Tensors]) -> Callable[[bytes], bytes]:
    def damage(raw: bytes) -> bytes:
        return save({name: t.contiguous() for name, t in change(load(raw)).items()}, metadata={"format": "pt"})

    damage.__name__ = change.__name__
    return damage


@rewritten
def keys_swapped(tensors: Tensors) -> Tensors:
    """Every entry under the key of the next one."""
    keys = sorted({name.partition(".")[0] for name in tensors})
    other = dict(zip(keys, [*keys[1:], keys[0]]))
    return {f"{other[name.partition('.')[0]]}.{name.partition('.')[2]}": t for name, t in tensors.items()}


@rewritten
def not_finite(tensors: Tensors) -> Tensors:
    return {name: t * float("nan") if t.is_floating_point() else t for name, t in tensors.items()}


@rewritten
def part_missing(tensors: Tensors) -> Tensors:
    """Under its name, that is."""
    return {name.replace(".pooled", ".other").replace(".latent", ".other"): t for name, t in tensors.items()}


@rewritten
def part_added(tensors: Tensors) -> Tensors:
    return tensors | {f"{name.partition('.')[0]}.more": torch.zeros(1) for name in tensors}


@rewritten
def half_of_each(tensors: Tensors) -> Tensors:
    return {name: t[: len(t) // 2].clone() for name, t in tensors.items()}


@rewritten
def wider(tensors: Tensors) -> Tensors:
    return {name: torch.cat([t, t], -1) if t.ndim > 1 else t for name, t in tensors.items()}


DAMAGES = (zeroed, noise, one_bit_in_the_middle, cut, keys_swapped, not_finite, part_missing, half_of_each)
FORGERIES = (part_missing, part_added, half_of_each, wider)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, tiny_flux, photos) -> Path:
    """A whole cache that no test may change."""
    from tiny_recipes import IMAGES

    folder = tmp_path_factory.mktemp("encoded")
    recipe = folder / "r.toml"
    recipe.write_text(IMAGES.format(out=folder, base=tiny_flux, images=photos, cache=folder / "cache"))
    assert main([str(recipe), "--cache-only"]) == 0
    return folder / "cache"


@pytest.fixture
def cache(encoded, image_recipe, tmp_path) -> Path:
    return shutil.copytree(encoded, tmp_path / "cache")


def refused(recipe: Path, shard: Path, capsys, *settings: str) -> str:
    """What a start says that must end by naming ``shard``, and what to do."""
    capsys.readouterr()
    assert main([str(recipe), *settings]) == 1
    err = capsys.readouterr().err
    assert str(shard) in err and "delete this file, it is encoded again" in err and "internal error" not in err
    return err


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_shard_is_refused_and_heals(cache, image_recipe, tmp_path, capsys, kind, damage):
    shard = next((cache / kind).glob("*.safetensors"))
    good = shard.read_bytes()
    spoilt = damage(good)
    assert spoilt != good
    shard.write_bytes(spoilt)
    refused(image_recipe, shard, capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not (tmp_path / "run" / "metrics.jsonl").read_text()
    shard.unlink()
    assert main([str(image_recipe)]) == 0 and shard.read_bytes() == good


@pytest.mark.parametrize("damage", FORGERIES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_shard_of_other_contents_under_its_own_hash_is_refused(cache, image_recipe, capsys, kind, damage):
    """As another program might write it: the name fits the bytes, and the entries do not fit what asks for them."""
    shard = next((cache / kind).glob("*.safetensors"))
    spoilt = damage(shard.read_bytes())
    shard.unlink()
    forged = cache / kind / f"{hashlib.sha256(spoilt).hexdigest()[:16]}.safetensors"
    forged.write_bytes(spoilt)
    assert "is not of this cache: '" in refused(image_recipe, forged, capsys)


def test_a_shard_of_another_data_set_is_refused_in_the_place_of_one(cache, image_recipe, tmp_path, photos, capsys):
    """Beside the others, under its own name, it only lies there."""
    other = tmp_path / "other"
    settings = ["--set", f"data.cache={other}", "--set", "data.resolutions=[48]"]
    assert main([str(image_recipe), "--cache-only", *settings]) == 0
    (foreign,) = (other / "latents").glob("*.safetensors")
    shutil.copy(foreign, cache / "latents")
    assert main([str(image_recipe)]) == 0
    shard = next(f for f in (cache / "latents").glob("*.safetensors") if f.name != foreign.name)
    shutil.copy(foreign, shard)
    (cache / "latents" / foreign.name).unlink()
    assert main([str(image_recipe), "--check-cache"]) == 1 and f"'{shard}' is damaged" in capsys.readouterr().err
    assert main([str(image_recipe)]) == 0 and main([str(image_recipe), "--check-cache"]) == 0


def test_a_shard_damaged_between_two_starts_is_refused_on_resume(cache, image_recipe, capsys, files_read):
    """The same size and, as far as the user can set it, the same time."""
    assert main([str(image_recipe)]) == 0
    shard = next((cache / "latents").glob("*.safetensors"))
    status = shard.stat()
    shard.write_bytes(one_bit_in_the_middle(shard.read_bytes()))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    refused(image_recipe, shard, capsys, "--set", "train.steps=4")


def test_a_shard_is_read_whole_once_however_often_it_is_drawn_from(cache, image_recipe, files_read):
    assert main([str(image_recipe), "--set", "train.steps=12"]) == 0
    shards = [file for file in files_read if file.suffix == ".safetensors" and file.is_relative_to(cache)]
    assert {file.parent.name for file in shards} == {"latents", "text"}
    assert all(files_read[file] == 1 for file in shards)
