"""Encoding beforehand, and training from what was encoded, on a tiny FLUX with images written here."""

import json
import multiprocessing
import random
import shutil
import time

import numpy as np
import pytest
import torch
from image_files import write_image, write_images
from samplings import at
from test_run import metrics, run, same, weights

from dedistill.data import encode as module
from dedistill.data.cache import Store
from dedistill.data.encode import open_data, open_stores, prepare
from dedistill.data.encoded import latent_key, read_text, text_key
from dedistill.data.images.buckets import apply_crop
from dedistill.data.images.decode import decode
from dedistill.data.images.index import build_index
from dedistill.data.usable import image_sets, look
from dedistill.distributed.world import World
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.io.atomic import checksummed, read_checksummed
from dedistill.io.hashing import Stamp
from dedistill.models.conditioning import Widths, stored_shapes
from dedistill.models.flux.family import Flux
from dedistill.models.model import build_model
from dedistill.objectives.base import objective_for
from dedistill.recipe import load_recipe
from dedistill.runs.model import open_finished
from dedistill.sampling.sampler import sample, start_noise
from dedistill.train import main

WIDTHS = Widths((32,), {"pooled": 32})


def encode(file, *settings):
    """(Prepared, what was said) of a recipe file."""
    recipe, said = load_recipe(file, settings), []
    return prepare(recipe, Flux(), Flux().load(recipe.model, seed=0, denoiser=False), say=said.append), said


def stores(file, *settings) -> tuple[Store, Store]:
    recipe = load_recipe(file, settings)
    return open_stores(recipe, Flux(), Flux().load(recipe.model, seed=0, denoiser=False), type(file)(recipe.data.cache))


def encoded(said: list[str]) -> list[str]:
    """What was encoded, e.g. ["25 captions", "12 images"]."""
    return [" ".join(line.split()[3:5]).rstrip(",") for line in said if line.startswith("encoded") and _complete(line.split())]


def _complete(words: list[str]) -> bool:
    return words[1] == words[3]


# --- what is encoded ---


UNKNOWN = {
    "a target": ("adapter.targets=[{preset='attention', rank=2}, {pattern='blocks.*', rank=2}]", "1.pattern: 'blocks.*'"),
    "a target of none left": (
        "adapter.targets=[{preset='attention', rank=2}, {pattern='**.to_q', rank=2}]",
        "earlier targets took all",
    ),
    "a rank": ("adapter.targets=[{preset='attention', rank=33}]", "targets.0.rank: 33 is more than"),
    "a layer to exclude": ("base.exclude=['*.norm1']", "base.exclude.0: '*.norm1' matches no linear"),
    "blocks to compute again": ("train.gradient_checkpointing=9", "9 blocks, and the network has 3"),
}


@pytest.mark.parametrize(("setting", "said"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_the_network_does_not_have_is_refused_before_anything_is_encoded(image_recipe, setting, said):
    recipe = load_recipe(image_recipe, [setting, "base.quant=int8"])
    with pytest.raises(UserError) as refused:
        open_data(recipe, "cpu", print)
    assert said in str(refused.value) and refused.value.exit_code == 2
    assert not (image_recipe.parent / "cache").exists()


def test_what_is_cached_is_what_encoding_gives(image_recipe):
    """Latents are the sampled posterior of each crop to float16's precision, text is bit for bit the encoders' own."""
    settings = ["data.resolutions=[48, 64]", "data.crops=['aspect', 'square']", "data.crops_per_picture=2"]
    encode(image_recipe, *settings)
    recipe = load_recipe(image_recipe, settings)
    latents, texts = stores(image_recipe, *settings)
    components = Flux().load(recipe.model, seed=0, denoiser=False)
    usable = look(recipe, lambda line: None)
    index, images = usable.index, usable.images
    crops = 0
    for i, image in enumerate(images):
        decoded = decode(index.read(i))
        for crop in image.crops:
            key, crops = latent_key(image.sample, crop), crops + 1
            pixels = torch.from_numpy(apply_crop(decoded, crop).astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
            noise = keyed.noise(0, f"vae/{key}", 0, [0], (16, crop.height // 8, crop.width // 8))
            wanted = components.vae.encode(pixels, noise, "cpu")[0]
            stored = latents.read(key)["latent"]
            assert stored.dtype == torch.float16
            torch.testing.assert_close(stored.float(), wanted, rtol=2**-11, atol=2**-24)
            other = components.vae.encode(pixels, -noise, "cpu")[0]
            assert (other - stored.float()).abs().max() > 1e-2, "a sample, not the mode"
        for caption in image.sample.captions:
            (cached,) = read_text(texts, [caption], stored_shapes(components.text.widths))
            live = components.text([caption], 64).trimmed()
            assert torch.equal(cached.tokens.mask, live.tokens.mask)
            torch.testing.assert_close(cached.tensors(), live.tensors(), rtol=0, atol=1e-6)
    assert crops == len(latents) > 3 * len(images)


def test_the_empty_prompt_is_one_token(image_recipe):
    data, _ = encode(image_recipe)
    assert data.text_cache[""].tokens.mask.sum() == data.text_cache[""].tokens.embeds.shape[1] == 1


def test_cached_text_takes_a_fraction_of_padded_text(image_recipe, tmp_path, tiny_flux):
    """At most 0.3 of what 512 padded tokens take, for captions of 80."""
    folder = tmp_path / "eighty"
    write_images(folder, 12)
    words = ["black", "blue", "cat", "dog", "green", "hat", "house", "moon", "photo", "red", "river", "sky", "small"]
    for i, file in enumerate(sorted(folder.glob("*.txt"))):
        file.write_text(" ".join((words[i:] + words * 7)[:79]))
    settings = [f"data.sets.0.path={folder}", "model.text_length=512"]
    encode(image_recipe, *settings)
    texts = stores(image_recipe, *settings)[1]
    captions = [file.read_text() for file in folder.glob("*.txt")]
    lengths = {text.tokens.embeds.shape[1] for text in read_text(texts, captions, stored_shapes(WIDTHS))}
    assert lengths == {80}
    (one,) = read_text(texts, captions[:1], stored_shapes(WIDTHS))
    padded = 512 * one.tokens.embeds.shape[2] * one.tokens.embeds.element_size() + 512 + one.vectors["pooled"].nbytes
    assert texts.bytes() / (len(captions) * padded) < 0.2


@pytest.mark.parametrize("mask", ["none", "libreflux"])
def test_padding_is_kept_where_it_is_seen(image_recipe, mask):
    data, _ = encode(image_recipe, f"model.mask={mask}")
    assert data.text_cache[""].tokens.embeds.shape[1] == 64 and data.text_cache[""].tokens.mask.sum() == 1


# --- what is encoded again, and what is refused ---


def test_only_what_is_new_is_encoded(own):
    recipe, folder = own
    first = encode(recipe)[0]
    assert encoded(encode(recipe)[1]) == []
    write_images(folder, 1, first=60)
    data, said = encode(recipe)
    assert encoded(said) == ["2 captions", "1 image"] and data.digest != first.digest
    write_image(folder / "p03.png", 112, 96, seed=99)
    assert encoded(encode(recipe)[1]) == ["1 image"]
    (folder / "p05.txt").write_text("the moon")
    assert encoded(encode(recipe)[1]) == ["1 caption"]
    (folder / "p60.png").rename(folder / "q60.png")
    (folder / "p60.txt").rename(folder / "q60.txt")
    encode(recipe)  # its crops go by its name, so another window may have to be encoded
    shutil.rmtree(recipe.parent / "cache" / "latents")
    assert encoded(encode(recipe)[1]) == ["13 images"]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("model.text_length=32", "text_length: 64 there, 32 here"),
        ("model.t5_mask=false", "t5_mask: True there, False here"),
        ("model.mask=none", "padding: False there, True here"),
    ],
)
def test_other_settings_are_refused_by_name(image_recipe, capsys, setting, named):
    encode(image_recipe)
    assert main([str(image_recipe), "--set", setting]) == 1
    error = capsys.readouterr().err
    assert named in error and "is stale" in error and "data.cache" in error and error.count("there") == 1


@pytest.mark.parametrize(("part", "named"), [("vae", "vae:"), ("text_encoder_2", "encoders:"), ("tokenizer", "encoders:")])
def test_other_encoders_are_refused_by_name(image_recipe, tiny_flux, tmp_path, part, named):
    encode(image_recipe)
    other = shutil.copytree(tiny_flux, tmp_path / "other")
    assert encode(image_recipe, f"model.path={other}")[1], "a copy is the same model"
    file = next(f for f in sorted((other / part).iterdir()) if f.suffix in (".safetensors", ".json") and "config" not in f.name)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"is stale.*{named}"):
        encode(image_recipe, f"model.path={other}")


def test_bad_images_are_left_out_and_named(own):
    recipe, folder = own
    whole = (folder / "p00.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    write_image(folder / "small.png", 24, 24, seed=3)
    for name in ("cut", "small"):
        (folder / f"{name}.txt").write_text("a dog")
    data, said = encode(recipe)
    assert data.facts["images"] == 12 and data.facts["quarantined"] == 2
    told = "\n".join(said)
    assert "cut.png" in told and "small.png: too small: 24 x 24 pixels" in told


def test_no_usable_image_is_one_clear_error(own, capsys):
    recipe, folder = own
    for file in folder.glob("*.png"):
        write_image(file, 16, 16, seed=0)
    assert main([str(recipe)]) == 1
    assert "data.sets: no usable image; e.g. photos/p00.png: too small" in capsys.readouterr().err
    for file in folder.glob("*.png"):
        file.write_bytes(b"no image")
    assert main([str(recipe)]) == 1
    assert "no usable image" in capsys.readouterr().err


# --- encoding beforehand ---


def test_cache_only_and_check(image_recipe, tmp_path, capsys):
    """--check-cache says what is missing and encodes nothing; --cache-only leaves no run behind."""
    check, fill = [str(image_recipe), "--check-cache"], [str(image_recipe), "--cache-only"]
    assert main(check) == 1 and not (tmp_path / "cache" / "latents").exists()
    assert "12 of 12 crops are not encoded yet" in capsys.readouterr().err
    assert main(fill) == 0 and not (tmp_path / "run").exists()
    assert main(check) == 0
    preview = ["--set", "preview.every=1", "--set", "preview.prompts=['a hat']"]
    assert main([*check, *preview]) == 1
    assert "1 of 26 captions are not encoded yet" in capsys.readouterr().err
    shard = next((tmp_path / "cache" / "latents").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(check) == 1
    assert f"'{shard}' is damaged: delete it" in capsys.readouterr().err
    for argument in ("--check-cache", "--cache-only"):
        assert main([str(image_recipe), argument, "--set", "data.source=digits"]) != 0


def test_a_complete_cache_never_needs_its_encoders(image_recipe, tiny_flux, tmp_path, capsys):
    """Weights that cannot be loaded, under the hashes of those that were: nobody loads them."""
    base = shutil.copytree(tiny_flux, tmp_path / "base")
    settings = ["--set", f"model.path={base}", "--set", "validate.every=1", "--set", "validate.samples=4"]
    assert main([str(image_recipe), "--cache-only", *settings]) == 0
    memo = tmp_path / "cache" / "hashes.json"
    known = read_checksummed(memo)
    for part in ("text_encoder", "text_encoder_2", "vae"):
        for file in (base / part).glob("*.safetensors"):
            file.write_bytes(b"x" * file.stat().st_size)
            known[str(file)] = [*Stamp.of(file.stat()), known[str(file)][-1]]
    memo.write_bytes(checksummed(known))
    assert main([str(image_recipe), *settings]) == 0
    capsys.readouterr()
    assert main([str(image_recipe), *settings, "--set", "sample.negative=new"]) == 1
    assert "text encoders in" in capsys.readouterr().err, "or this test shows nothing"


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 1)
    monkeypatch.setattr(module, "CAPTIONS_PER_SHARD", 3)


def _forked(file):
    process = multiprocessing.get_context("fork").Process(target=encode, args=(file,))
    process.start()
    return process


def test_killed_while_encoding_it_goes_on_and_ends_the_same(image_recipe, tmp_path, small_shards):
    rng = random.Random(1)
    whole = f"data.cache={tmp_path / 'whole'}"
    start = time.monotonic()
    encode(image_recipe, whole)
    took, sizes = time.monotonic() - start, []
    for _ in range(5):
        process, before = _forked(image_recipe), len(list((tmp_path / "cache").glob("*/*.safetensors")))
        end = time.monotonic() + 30
        while process.is_alive() and len(list((tmp_path / "cache").glob("*/*.safetensors"))) <= before:
            assert time.monotonic() < end
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.2) * took)
        process.kill()
        process.join()
        sizes.append(len(list((tmp_path / "cache").glob("*/*.safetensors"))))
    assert sizes == sorted(sizes) and sizes[-1] > 0
    encode(image_recipe)
    wanted, found = ({k: s.read(k) for s in stores(image_recipe, *x) for k in s._shard_of} for x in ([whole], []))
    assert wanted.keys() == found.keys() and all(same(wanted[k], found[k]) for k in wanted)
    assert not list((tmp_path / "cache").glob("*/*.tmp-*"))


def test_two_preparations_at_once_share_one_cache(image_recipe, small_shards):
    both = [_forked(image_recipe) for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    latents, texts = stores(image_recipe)
    assert len(latents) == 12 == len(list(latents.folder.glob("*.safetensors"))), "nothing was encoded twice"
    assert encoded(encode(image_recipe)[1]) == [] and latents.damaged() == texts.damaged() == []


# --- the unconditional branch ---


def test_dropout_and_sampler_use_the_cached_empty_prompt(image_recipe):
    """T5 and CLIP of "" together, the very tensors of the cache, in training, previews and afterwards."""
    recipe = load_recipe(image_recipe)
    data, _ = encode(image_recipe)
    cached = stores(image_recipe)[1].read(text_key(""))
    model = build_model(recipe)
    model.text_cache |= data.text_cache
    empty = model.encode([""])
    assert same({name: tensor[0] for name, tensor in empty.tensors().items()}, cached)
    objective = objective_for(recipe, data.source, model.shift)
    positions = objective.share(0, 4, World())[0][0]
    objective.dropout = 1.0
    dropped = objective.noisy_batch(0, positions)
    for row in range(len(positions)):
        assert same({name: tensor[row] for name, tensor in dropped.text.tensors().items()}, cached)
    objective.dropout = 0.0
    with torch.no_grad():
        assert not torch.equal(objective.loss(model, dropped), objective.loss(model, objective.noisy_batch(0, positions)))
    noise = start_noise(0, 1, (16, 8, 8))
    images = [sample(model, [""], noise, at(2, cfg)) for cfg in (1.0, 4.0)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)  # "" against "": guidance has nothing to steer by
    assert not model.components.text.loaded, "every prompt came from the cache"
    assert main([str(image_recipe)]) == 0
    finished = open_finished(recipe)
    assert same({name: tensor[0] for name, tensor in finished.text_cache[""].tensors().items()}, cached)
    sample(finished, [""], noise, at(2, 4.0))
    assert not finished.components.text.loaded


# --- training from it ---


def test_micro_batches_see_the_same_samples(image_recipe, tmp_path):
    settings = ["data.resolutions=[48, 64]", "train.batch=12", "train.lr=1e-3"]
    big = run(image_recipe, tmp_path / "big", *settings, "train.micro_batch=6")
    small = run(image_recipe, tmp_path / "small", *settings, "train.micro_batch=3")
    a, b = weights(big), weights(small)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-5
    assert all(abs(x["sigma_mean"] - y["sigma_mean"]) < 1e-6 for x, y in zip(metrics(big), metrics(small)))


def test_resumed_equals_uninterrupted(image_recipe, tmp_path):
    """A run made longer is the run that was long from the start, bit for bit; prefetching leaves no trace."""
    settings = ["data.resolutions=[48, 64]", "data.crops_per_picture=2", "validate.every=2", "validate.samples=4"]
    whole = run(image_recipe, tmp_path / "whole", *settings, "train.steps=4")
    run(image_recipe, tmp_path / "parts", *settings, "train.steps=2")
    parts = run(image_recipe, tmp_path / "parts", *settings, "train.steps=4")
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    assert same(weights(whole), weights(parts))


def test_changed_images_on_the_way_are_refused(own, tmp_path, capsys):
    recipe, folder = own
    assert main([str(recipe)]) == 0
    text = (folder / "p01.txt").read_text()
    (folder / "p01.txt").write_text("another caption")
    longer = [str(recipe), "--set", "train.steps=3"]
    capsys.readouterr()
    assert main(longer) == 1
    assert "data.sets: images, captions or crops differ" in capsys.readouterr().err
    (folder / "p01.txt").write_text(text)
    assert main(longer) == 0


def test_encoders_of_another_dtype_train_in_fp32(image_recipe, tiny_flux, tmp_path):
    """Published T5 weights are bf16, and so is the cached text."""
    from transformers import T5EncoderModel

    base = shutil.copytree(tiny_flux, tmp_path / "base")
    T5EncoderModel.from_pretrained(base / "text_encoder_2").to(torch.bfloat16).save_pretrained(base / "text_encoder_2")
    run(image_recipe, tmp_path / "run", f"model.path={base}")
    assert encode(image_recipe, f"model.path={base}")[0].text_cache[""].tokens.embeds.dtype == torch.bfloat16


@pytest.mark.parametrize("column", ["image", "Bild"])
def test_a_recipe_names_the_columns_of_a_table(image_recipe, tmp_path, column):
    images = write_images(tmp_path / "table", 3)
    rows = [json.dumps({column: f"p{i:02d}.png", "llava": f"number {i}", "blip": "x"}) for i in range(3)]
    (images / "metadata.jsonl").write_text("\n".join(rows))
    recipe = load_recipe(image_recipe, [f'data.sets=[{{path="{images}", file_column="{column}", captions=["llava"]}}]'])
    assert [s.captions for s in build_index(image_sets(recipe)).samples] == [(f"number {i}",) for i in range(3)]


@pytest.mark.parametrize("part", ["embeds", "pooled"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_text_that_is_not_finite_is_never_cached(image_recipe, monkeypatch, part, value):
    """As an encoder in fp16 gives for single captions, by an overflow."""
    real = Flux.encode_text

    def overflowing(self, parts, captions, length):
        text = real(self, parts, captions, length)
        for i in [i for i, caption in enumerate(captions) if caption.endswith(" 5")]:
            (text.tokens.embeds if part == "embeds" else text.vectors["pooled"])[i].view(-1)[0] = value
        return text

    monkeypatch.setattr(Flux, "encode_text", overflowing)
    with pytest.raises(UserError, match=r"the text encoders give numbers that are not finite .* for 'the red sun 5'"):
        encode(image_recipe)
    assert len(stores(image_recipe)[1]) == 0
