"""Text encoders, VAE and small bases are loaded whole or refused by name, and none of their folders runs code."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from image_files import write_image, write_images
from safetensors.torch import load_file, save_file
from tiny_recipes import ADAPTER, IMAGES
from torch import Tensor
from transformers import T5EncoderModel

from dedistill.cli.main import main as cli
from dedistill.data.images.index import build_index
from dedistill.data.images.listing import ImageSet
from dedistill.data.images.scan import scan
from dedistill.errors import UserError
from dedistill.models.flux.encoders import FluxText
from dedistill.models.flux.pipeline import MaskedFluxPipeline
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.train import main

Tensors = dict[str, Tensor]
CAPTIONS = ["the red sun", "two cats"]


@pytest.fixture(scope="module")
def two_images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "images", 2)


@pytest.fixture
def model(tiny_flux, tmp_path) -> Path:
    """A whole model, free to be damaged."""
    return shutil.copytree(tiny_flux, tmp_path / "model")


@pytest.fixture
def refused(model, two_images, tmp_path, capsys) -> Callable[[], str]:
    """Encodes captions and images with ``model``, which must fail before any is kept; returns what was said."""

    def run() -> str:
        recipe = tmp_path / "r.toml"
        recipe.write_text(IMAGES.format(out=tmp_path, base=model, images=two_images, cache=tmp_path / "cache"))
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
    denoiser = kind.from_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    denoiser.save_pretrained(folder, max_shard_size="60KB")
    return next(folder.glob("*.index.json"))


def dropped(word: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if word not in name}


SCALE = "encoder.block.0.layer.0.SelfAttention.q.scale_weight"
FAULTS = [
    ("text_encoder_2", dropped("block.1.layer.1"), "4 tensors are missing: encoder.block.1.layer.1.DenseReluDense.wi_0.weight"),
    ("text_encoder_2", dropped("shared"), "2 tensors are missing: encoder.embed_tokens.weight, shared.weight"),
    ("text_encoder_2", lambda t: t | {SCALE: torch.ones(1)}, f"1 tensor is unknown: {SCALE}"),
    ("text_encoder", lambda t: {f"te.{name}": v for name, v in t.items()}, "36 tensors are unknown: te.embeddings"),
    (
        "text_encoder",
        lambda t: t | {"final_layer_norm.bias": torch.zeros(31)},
        "1 tensor is of another shape: final_layer_norm.bias (31,) for (32,)",
    ),
    ("vae", dropped("encoder.mid_block"), "26 tensors are missing: encoder.mid_block.attentions.0.group_norm.bias"),
    (
        "vae",
        lambda t: t | {"decoder.conv_in.bias": torch.zeros(3)},
        "1 tensor is of another shape: decoder.conv_in.bias (3,) for (8,)",
    ),
    ("vae", lambda t: t | {"quant_conv.bias": torch.zeros(32)}, "1 tensor is unknown: quant_conv.bias"),
]


@pytest.mark.parametrize(("part", "edit", "told"), FAULTS, ids=[f"{part}-{told[:30]}" for part, _, told in FAULTS])
def test_a_part_that_is_not_whole_is_refused_by_its_tensors(model, refused, tmp_path, part, edit, told):
    """The libraries would fill in random numbers, or leave the place without memory."""
    change(model / part, edit)
    said = refused()
    assert told in said and f"{model / part}' (" in said and "model.safetensors" in said
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "nothing is encoded before all is looked at"


@pytest.mark.parametrize(("part", "edit", "told"), [FAULTS[0], FAULTS[4], FAULTS[5]], ids=["T5", "CLIP", "VAE"])
def test_a_plan_and_a_rehearsal_look_as_a_start_does(model, image_recipe, capsys, part, edit, told):
    change(model / part, edit)
    for command, code in (("plan", 2), ("rehearse", 1)):
        settings = [f"model.path={model}", "train.steps=4"]
        assert cli([command, str(image_recipe), *(word for s in settings for word in ("--set", s))]) == code
        assert told in capsys.readouterr().err


def _spoilt(name: str, value: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.full_like(tensors[name], value)}


def _cut(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(t) for name, t in tensors.items()}


NUMBERS = [
    ("text_encoder", _spoilt("encoder.layers.1.mlp.fc1.weight", float("nan")), "fc1.weight' holds numbers that are not finite"),
    ("text_encoder", _spoilt("final_layer_norm.bias", float("inf")), "final_layer_norm.bias' holds numbers"),
    ("text_encoder_2", _spoilt("shared.weight", float("-inf")), "shared.weight' holds numbers that are not finite"),
    ("text_encoder_2", _cut, "matrices are zero throughout"),
    ("vae", _spoilt("decoder.conv_in.bias", float("nan")), "decoder.conv_in.bias' holds numbers that are not finite"),
]


@pytest.mark.parametrize(("part", "edit", "told"), NUMBERS, ids=[told[:20] for _, _, told in NUMBERS])
def test_a_plan_looks_at_numbers_as_well(model, image_recipe, capsys, part, edit, told):
    change(model / part, edit)
    assert cli(["plan", str(image_recipe), "--no-forecast", "--set", f"model.path={model}"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "keys", "told"),
    [
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1,000,000,000; at most"),
        ("text_encoder_2", {"num_layers": 5000}, "num_layers = 5,000; at most"),
        ("text_encoder", {"text_config": {"num_hidden_layers": 2000}}, "num_hidden_layers = 2,000; at most"),
        ("vae", {"layers_per_block": 10**7}, "layers_per_block = 10,000,000; at most"),
        ("vae", {"block_out_channels": [8000] * 4}, "numbers, and its files hold"),
    ],
)
def test_sizes_that_the_files_do_not_have_cost_neither_time_nor_memory(model, refused, part, keys, told):
    configure(model / part, **keys)
    assert told in refused()


SCHEDULER = "scheduler/scheduler_config.json"
CONTRADICTIONS = [
    (SCHEDULER, {"shift": float("nan")}, "gives a shift of nan"),
    (SCHEDULER, {"shift": [3]}, "does not describe a shift"),
    ("transformer/config.json", {"num_layers": 5}, "has num_layers = 5, and the files hold 1 block 'transformer_blocks'"),
    ("transformer/config.json", {"num_single_layers": 7}, "has num_single_layers = 7, and the files hold"),
]


@pytest.mark.parametrize(("file", "keys", "told"), CONTRADICTIONS)
def test_a_plan_refuses_what_configs_contradict(model, image_recipe, capsys, file, keys, told):
    path = model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    settings = [f"model.path={model}", "timesteps.shift=auto"]
    assert cli(["plan", str(image_recipe), "--no-forecast", *(word for s in settings for word in ("--set", s))]) == 2
    assert f"{path}'" in (said := capsys.readouterr().err) and told in said


@pytest.mark.parametrize("count", [1, 5])
def test_a_set_that_is_held_out_whole_is_refused_before_anything_is_encoded(model, tmp_path, image_recipe, capsys, count):
    """Copies of one image are held out together."""
    folder = tmp_path / "copies"
    folder.mkdir()
    for i in range(count):
        write_image(folder / f"{i}.png", 96, 96, 0)
        (folder / f"{i}.txt").write_text(f"copy {i}")
    changed = [f"data.sets.0.path={folder}", f"model.path={model}", f"data.cache={tmp_path / 'new'}", "data.held_out=auto"]
    settings = [word for s in changed for word in ("--set", s)]
    for command, code in ((["plan", "--no-forecast"], 2), (["train"], 1)):
        assert cli([*command, str(image_recipe), *settings]) == code
        assert "no image of this set is left to train on" in capsys.readouterr().err
    assert not list((tmp_path / "new").rglob("*.safetensors"))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
@pytest.mark.parametrize(
    ("content", "told"), [(POINTER, "a pointer of Git LFS"), ("<!doctype html>", "a web page"), ("", "is empty")]
)
def test_a_download_that_failed_is_named_and_not_the_cache(model, two_images, tmp_path, capsys, part, content, told):
    """Whoever deleted a cache that is called stale would encode for hours, to be told the same."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(IMAGES.format(out=tmp_path, base=model, images=two_images, cache=tmp_path / "cache"))
    assert main([str(recipe), "--cache-only"]) == 0
    file = next((model / part).glob("*.safetensors"))
    file.write_text(content)
    capsys.readouterr()
    assert main([str(recipe), "--cache-only"]) == 1
    said = capsys.readouterr().err
    assert f"'{file}' cannot be read as safetensors: it is" in said and told in said and "stale" not in said


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("edit", [lambda t: torch.ones_like(t), lambda t: t * 1e-30], ids=["ones", "next to nothing"])
def test_an_encoder_that_tells_no_words_apart_is_refused(model, refused, part, edit):
    """Its weights are finite, and not zero."""
    change(model / part, lambda tensors: {name: edit(t) for name, t in tensors.items()})
    assert f"what '{model / part}' makes of 'blue' and 'bird' is the same" in refused()


FACTORS = [("scaling_factor", v) for v in ("0", "-0.3", "NaN", "1e999", "null", '"x"', "true")]
FACTORS += [("shift_factor", v) for v in ("NaN", "-Infinity", '"x"', "[1]")]


@pytest.mark.parametrize(("key", "value"), FACTORS)
def test_factors_of_a_codec_are_numbers(model, refused, tmp_path, key, value):
    """By them latents would be zeros, turned around or not finite, or an internal error after all captions."""
    file = model / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "here"}).replace('"here"', value))
    assert f"the VAE's '{file}' has {key} = " in refused() and not (tmp_path / "cache").exists()


GROWING = {"use_dynamic_shifting": True}
SHIFTS = [{"shift": 0}, {"shift": -3.0}, {"shift": float("nan")}, {"shift": 1e9}]
SHIFTS += [GROWING | {"max_shift": 99}, GROWING | {"max_shift": float("nan")}, GROWING | {"base_image_seq_len": 4096}]


@pytest.mark.parametrize("keys", SHIFTS)
def test_a_scheduler_that_shifts_by_no_number_is_refused(model, refused, keys):
    """Images would be made from noise alone, or from none."""
    file = model / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    said = refused()
    assert f"'{file}' gives a shift of" in said or f"'{file}' does not describe a shift" in said


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
    return [text.tokens.embeds, text.vectors["pooled"]]


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


# --- code of the folder's own ---


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """What foreign code would leave behind; whoever asks whether to run it is told yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    return tmp_path / "mark"


def ask_for_code(folder: Path, config: str, **more: object) -> None:
    file, mark = folder / config, folder.parent.parent / "mark"
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Own: pass\n")
    kinds = ("AutoConfig", "AutoModel", "AutoTokenizer")
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {"auto_map": dict.fromkeys(kinds, "own.Own")} | more))


@pytest.mark.parametrize(
    ("part", "config", "more"),
    [
        ("tokenizer_2", "tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": ["own.Own", "own.Own"]}),
        ("tokenizer", "tokenizer_config.json", {}),
        ("tokenizer", "config.json", {"model_type": "own"}),
        ("text_encoder_2", "config.json", {"model_type": "own"}),
        ("vae", "config.json", {"_class_name": "Own"}),
    ],
)
def test_a_folder_with_code_of_its_own_is_refused_without_a_question(model, refused, mark, capsys, part, config, more):
    ask_for_code(model / part, config, **more)
    said = refused()
    assert f"{model / part}' comes with code of its own ('auto_map' in {config})" in said and not mark.exists()
    assert "trust" not in said and "[y/N]" not in said + capsys.readouterr().out


def test_a_tokenizer_with_code_is_not_measured_with(two_images, model, mark, tmp_path):
    ask_for_code(model / "tokenizer_2", "tokenizer_config.json", tokenizer_class="Own")
    index = build_index([ImageSet(str(two_images))], file=tmp_path / "index.jsonl", say=lambda line: None)
    with pytest.raises(UserError, match=r"--tokenizer: .*tokenizer_2' comes with code of its own") as e:
        scan(index, resolutions=[64], tokenizer=model / "tokenizer_2")
    assert e.value.exit_code == 2 and not mark.exists()


def test_the_pipeline_runs_no_code_of_a_folder(model, mark):
    """model_index.json may name a loader that asks."""
    ask_for_code(model / "tokenizer_2", "tokenizer_config.json", tokenizer_class="Own")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"tokenizer_2": ["transformers", "AutoTokenizer"]}))
    with pytest.raises(UserError, match="tokenizer_2' comes with code of its own"):
        MaskedFluxPipeline.from_pretrained(model, local_files_only=True)
    assert not mark.exists()


def pickled(folder: Path) -> tuple[Path, Path]:
    """The same weights as a pickle under the name that the libraries fall back to; returns where they were and are."""
    weights = next(folder.glob("*.safetensors"))
    pickle = folder / ("diffusion_pytorch_model.bin" if folder.name == "vae" else "pytorch_model.bin")
    torch.save(load_file(weights), pickle)
    weights.unlink()
    return weights, pickle


def test_the_pipeline_reads_no_pickles(model):
    _, pickle = pickled(model / "text_encoder")
    with pytest.raises(UserError, match=f"{pickle.name}' cannot be read as safetensors: it is a pickle"):
        MaskedFluxPipeline.from_pretrained(model, local_files_only=True)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
@pytest.mark.parametrize("named_by", ["its name", "an index"])
def test_pickles_are_not_read(model, refused, part, named_by):
    """Neither under the name that the libraries fall back to, nor as a shard that a safetensors index names."""
    weights, pickle = pickled(model / part)
    if named_by == "an index":
        index = {"metadata": {}, "weight_map": dict.fromkeys(torch.load(pickle), pickle.name)}
        weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    said = refused()
    assert f"{model / part}" in said and "safetensors" in said
    assert named_by == "its name" or pickle.name in said


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/elsewhere.safetensors", 7])
def test_shards_outside_the_folder_are_not_read(model, refused, name):
    index = in_shards(model / "text_encoder_2", T5EncoderModel)
    told = json.loads(index.read_text())
    told["weight_map"]["shared.weight"] = name
    index.write_text(json.dumps(told))
    assert f"{index}' names {name!r}" in refused()


def test_an_adapter_beside_the_weights_is_not_put_onto_them(model, refused):
    (model / "text_encoder" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "holds an adapter (adapter_config.json)" in refused()


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000, b"\xff"], ids=["list", "torn", "nested", "not UTF-8"])
@pytest.mark.parametrize(
    "file", ["text_encoder/config.json", "text_encoder_2/config.json", "tokenizer_2/tokenizer_config.json"]
)
def test_a_config_that_is_none_is_named(model, refused, file, content):
    (model / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"'{model / file}'" in refused()


@pytest.mark.parametrize("number", ["1e999", "-Infinity", "NaN"])
@pytest.mark.parametrize("size", ["vae latent_channels", "text_encoder hidden_size", "text_encoder_2 d_model"])
def test_numbers_that_no_size_is_are_named(model, refused, size, number):
    """Python's JSON takes them."""
    part, key = size.split()
    file = model / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: "here"}).replace('"here"', number))
    said = refused()
    assert f"'{model}'" in said or f"'{model / part}'" in said


# --- vocabularies ---


@pytest.mark.parametrize(("part", "files"), [("tokenizer", "vocab.json and merges.txt"), ("tokenizer_2", "spiece.model")])
def test_a_tokenizer_without_its_vocabulary_is_refused(model, refused, part, files):
    """A download of weights and configs alone: every caption would become the same."""
    (model / part / "tokenizer.json").unlink()
    said = refused()
    assert f"'{model / part}' has no vocabulary; it needs tokenizer.json, or {files}." in said


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_its_config_is_refused(model, refused, part):
    """Its words are there, the padding token is not."""
    (model / part / "tokenizer_config.json").unlink()
    assert f"'{model / part}' has no 'pad_token'; tokenizer_config.json must name one" in refused()


def shorten(folder: Path, kept: int) -> None:
    """Keep the first entries of a vocabulary."""
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    words = told["model"]["vocab"]
    told["model"]["vocab"] = words[:kept] if isinstance(words, list) else dict(list(words.items())[:kept])
    file.write_text(json.dumps(told))


def test_a_tokenizer_that_knows_no_words_is_refused(model, refused):
    """The file is there; what it holds are the special tokens."""
    shorten(model / "tokenizer_2", 4)
    assert "gives 'blue' and 'bird' the same tokens: its vocabulary is missing" in refused()


@pytest.mark.parametrize(
    ("part", "entries", "told"),
    [
        ("tokenizer_2", 125, "a tokenizer of 123 entries for a text encoder of 125"),
        ("tokenizer_2", 122, "a tokenizer of 123 entries for a text encoder of 122"),
        ("tokenizer", 515, "a tokenizer of 514 entries for a text encoder of 515"),
        ("tokenizer", 513, "a tokenizer of 514 entries for a text encoder of 513"),
    ],
)
def test_a_tokenizer_of_another_encoder_is_refused(model, refused, part, entries, told):
    """An encoder whose table is longer than its tokenizer's vocabulary, or shorter."""
    encoder, name = {
        "tokenizer_2": (model / "text_encoder_2", "shared.weight"),
        "tokenizer": (model / "text_encoder", "embeddings.token_embedding.weight"),
    }[part]
    change(encoder, lambda t: t | {name: torch.ones(entries, t[name].shape[1])})
    configure(encoder, vocab_size=entries)
    assert f"'{model / part}' holds {told}" in refused()


def test_a_padded_table_is_the_same_encoder(tiny_flux, model):
    """Published tables are rounded up: 32,128 rows for 32,100 entries."""
    change(model / "text_encoder_2", lambda t: t | {"shared.weight": torch.cat([t["shared.weight"], torch.zeros(1, 32)])})
    configure(model / "text_encoder_2", vocab_size=124)
    assert all(map(torch.equal, embeddings(model), embeddings(tiny_flux)))


def test_a_vocabulary_in_two_files_is_the_same(tiny_flux, model):
    """As the published folders keep CLIP's: vocab.json and merges.txt; one of them alone is none."""
    file = model / "tokenizer" / "tokenizer.json"
    (model / "tokenizer" / "vocab.json").write_text(json.dumps(json.loads(file.read_text())["model"]["vocab"]))
    file.unlink()
    with pytest.raises(UserError, match=r"has no vocabulary; it needs tokenizer\.json, or vocab\.json and merges\.txt"):
        FluxText(model, t5_mask=True)
    (model / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    assert all(map(torch.equal, embeddings(model), embeddings(tiny_flux)))
