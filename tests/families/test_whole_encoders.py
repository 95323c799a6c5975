"""Text encoders, VAE and small bases are loaded whole or refused by name, before anything is encoded or trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from picture_files import write_pictures
from safetensors.torch import load_file, save_file
from tiny_recipes import ADAPTER, PICTURES
from torch import Tensor
from transformers import T5EncoderModel

from dedistill.families.flux_text import FluxText
from dedistill.families.pixel_flux import PixelFlux
from dedistill.train import main

Tensors = dict[str, Tensor]
CAPTIONS = ["the red sun", "two cats"]


@pytest.fixture(scope="module")
def two_pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "pictures", 2)


@pytest.fixture
def model(tiny_flux, tmp_path) -> Path:
    """A whole model, free to be damaged."""
    return shutil.copytree(tiny_flux, tmp_path / "model")


@pytest.fixture
def refused(model, two_pictures, tmp_path, capsys) -> Callable[[], str]:
    """Encodes captions and pictures with ``model``, which must fail before any is kept; returns what was said."""

    def run() -> str:
        recipe = tmp_path / "r.toml"
        recipe.write_text(PICTURES.format(out=tmp_path, base=model, pictures=two_pictures, cache=tmp_path / "cache"))
        code = main([str(recipe), "--cache-only"])
        said = capsys.readouterr().err
        assert code == 1 and "Traceback" not in said and "internal error" not in said, said
        return said

    return run


def change(folder: Path, edit: Callable[[Tensors], Tensors | None], file: str = "*.safetensors") -> None:
    weights = sorted(folder.glob(file))[-1]
    tensors = load_file(weights)
    tensors = edit(tensors) or tensors
    save_file({name: t.contiguous() for name, t in tensors.items()}, weights, metadata={"format": "pt"})


def configure(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def in_shards(folder: Path, kind: type) -> Path:
    """The same weights as several files; returns their index."""
    net = kind.from_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    net.save_pretrained(folder, max_shard_size="60KB")
    return next(folder.glob("*.index.json"))


def dropped(word: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if word not in name}


SCALE = "encoder.block.0.layer.0.SelfAttention.q.scale_weight"
FAULTS = [
    ("text_encoder_2", dropped("block.1.layer.1"), "4 tensors are missing: encoder.block.1.layer.1.DenseReluDense.wi_0.weight"),
    ("text_encoder_2", dropped("shared"), "2 tensors are missing: encoder.embed_tokens.weight, shared.weight"),
    ("text_encoder_2", lambda t: t | {SCALE: torch.ones(1)}, f"1 tensors are unknown: {SCALE}"),
    ("text_encoder", lambda t: {f"te.{name}": v for name, v in t.items()}, "36 tensors are unknown: te.embeddings"),
    (
        "text_encoder",
        lambda t: t | {"final_layer_norm.bias": torch.zeros(31)},
        "1 tensors are of another shape: final_layer_norm.bias (31,) for (32,)",
    ),
    ("vae", dropped("encoder.mid_block"), "26 tensors are missing: encoder.mid_block.attentions.0.group_norm.bias"),
    (
        "vae",
        lambda t: t | {"decoder.conv_in.bias": torch.zeros(3)},
        "1 tensors are of another shape: decoder.conv_in.bias (3,) for (8,)",
    ),
    ("vae", lambda t: t | {"quant_conv.bias": torch.zeros(32)}, "1 tensors are unknown: quant_conv.bias"),
]


@pytest.mark.parametrize(("part", "edit", "told"), FAULTS, ids=[f"{part}-{told[:30]}" for part, _, told in FAULTS])
def test_a_part_that_is_not_whole_is_refused_by_its_tensors(model, refused, tmp_path, part, edit, told):
    """The libraries would fill in random numbers, or leave the place without memory."""
    change(model / part, edit)
    said = refused()
    assert told in said and f"{model / part}' (" in said and "model.safetensors" in said
    assert not list((tmp_path / "cache" / ("latents" if part == "vae" else "text")).glob("*.safetensors")), "nothing is kept"


def test_blocks_that_the_config_leaves_out_are_refused(model, refused):
    """A config of fewer blocks than the file holds makes another encoder."""
    configure(model / "text_encoder_2", num_layers=1)
    assert "9 tensors are unknown: encoder.block.1." in refused()


@pytest.mark.parametrize(("part", "kind"), [("text_encoder_2", T5EncoderModel), ("vae", AutoencoderKL)])
@pytest.mark.parametrize("fault", ["tensor", "shard", "index"])
def test_shards_that_lack_something_are_refused(model, refused, part, kind, fault):
    """A shard without a tensor that the index names, a shard that is gone, an index that knows only one shard."""
    index = in_shards(model / part, kind)
    told = json.loads(index.read_text())
    last = max(told["weight_map"].values())
    lost = sorted(name for name, file in told["weight_map"].items() if file == last)[0]
    if fault == "tensor":
        change(model / part, dropped(lost), last)
    elif fault == "shard":
        (model / part / last).unlink()
    else:
        told["weight_map"] = {name: file for name, file in told["weight_map"].items() if file != last}
        index.write_text(json.dumps(told))
    assert (last if fault == "shard" else f"missing: {lost}") in refused()


def embeddings(folder: Path) -> list[Tensor]:
    text = FluxText(folder, t5_mask=True)(CAPTIONS, 16)
    return [text.embeds, text.pooled]


def larger(tensors: Tensors) -> Tensors:
    return tensors | {"decoder.block.0.layer.0.layer_norm.weight": torch.ones(32), "lm_head.weight": torch.ones(3, 32)}


def saved_as_clip(tensors: Tensors) -> Tensors:
    text = {f"text_model.{name}": t for name, t in tensors.items()}
    other = {"logit_scale": torch.ones(()), "vision_model.embeddings.class_embedding": torch.ones(8)}
    return text | other | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


HARMLESS = [
    ("text_encoder_2", larger),
    ("text_encoder_2", lambda t: {name.replace("shared", "encoder.embed_tokens"): v for name, v in t.items()}),
    ("text_encoder_2", lambda t: t | {"encoder.embed_tokens.weight": t["shared.weight"].clone()}),
    ("text_encoder", saved_as_clip),
]


@pytest.mark.parametrize(
    ("part", "edit"), HARMLESS, ids=["the whole of T5", "one name of the tied table", "both names of it", "the whole of CLIP"]
)
def test_whole_parts_in_other_files_are_the_same_encoder(tiny_flux, model, part, edit):
    change(model / part, edit)
    assert all(map(torch.equal, embeddings(model), embeddings(tiny_flux)))


def test_whole_shards_are_the_same_encoder(tiny_flux, model):
    in_shards(model / "text_encoder_2", T5EncoderModel)
    assert all(map(torch.equal, embeddings(model), embeddings(tiny_flux)))


@pytest.mark.parametrize("edit", [dropped("proj_out.weight"), lambda t: t | {"proj_out.bias": torch.zeros(5)}])
def test_a_small_base_that_is_not_whole_is_refused(tmp_path, capsys, edit):
    PixelFlux().save(PixelFlux().tiny(0), tmp_path / "base")
    change(tmp_path / "base" / "transformer", edit)
    recipe = tmp_path / "r.toml"
    recipe.write_text(ADAPTER.format(out=tmp_path, base=tmp_path / "base"))
    assert main([str(recipe)]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / 'base' / 'transformer'}' (diffusion_pytorch_model.safetensors)" in said and "proj_out." in said
