"""The tiny FLUX folder is what the real ones are, only small."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline

from dedistill.models.flux.tiny import write_tiny_flux


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "schnell"
    write_tiny_flux(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder) -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_folder_layout(folder):
    """The layout of the published folders: safetensors only, a few megabytes."""
    parts = {"transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae", "scheduler"}
    assert {p.name for p in folder.iterdir()} == parts | {"model_index.json"}
    assert not [n for n in files(folder) if n.endswith((".bin", ".pt", ".ckpt", ".pkl"))]
    assert sum(len(raw) for raw in files(folder).values()) < 3e6
    assert type(DiffusionPipeline.from_pretrained(folder, local_files_only=True)) is FluxPipeline


def test_the_folder_follows_the_seed(folder, tmp_path):
    """Same seed, same bytes; another seed, other weights and the same tokenizers; the global generator is untouched."""
    state = torch.get_rng_state()
    write_tiny_flux(tmp_path / "again")
    write_tiny_flux(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = files(folder), files(tmp_path / "again"), files(tmp_path / "other")
    assert first == again and first.keys() == other.keys()
    changed = {n for n in first if first[n] != other[n]}
    assert changed == {n for n in first if n.endswith(".safetensors")}


def test_t5_tokens(pipe):
    """Pad 0, </s> 1 last, one valid token for "", unknown words in letters, cut captions keep their end."""
    tokens = pipe.tokenizer_2(["", "a red cat", "zq"], padding="max_length", max_length=6, truncation=True)
    assert tokens.input_ids[0] == [1, 0, 0, 0, 0, 0] and [sum(m) for m in tokens.attention_mask] == [1, 5, 4]
    assert all(row[sum(mask) - 1] == 1 for row, mask in zip(tokens.input_ids, tokens.attention_mask))
    assert pipe.tokenizer_2.decode(tokens.input_ids[2], skip_special_tokens=True) == "zq"
    assert pipe.tokenizer_2(["red " * 600], truncation=True, max_length=512).input_ids[0][-1] == 1
    assert pipe.tokenizer_2.model_max_length == 512


def test_clip_tokens(pipe):
    """77 tokens with start and end; any text has known letters."""
    tok = pipe.tokenizer
    rows = tok(["", "a cat", "é漢"], padding="max_length", max_length=tok.model_max_length, truncation=True).input_ids
    assert {len(row) for row in rows} == {77} and {row[0] for row in rows} == {tok.bos_token_id}
    assert [row.index(tok.eos_token_id) for row in rows] == [1, 5, 6]
    assert tok.pad_token_id == tok.eos_token_id == max(tok.get_vocab().values())


@torch.no_grad()
def test_texts_are_told_apart(pipe):
    """Both encoders answer to the words, T5 also to padding it is not told to ignore."""
    pooled = pipe._get_clip_prompt_embeds(["a red cat", "a red dog"])
    assert (pooled[0] - pooled[1]).abs().max() > 0.1
    short, long = (pipe._get_t5_prompt_embeds("a red cat", max_sequence_length=n)[0, :5] for n in (8, 256))
    assert (short - long).abs().max() > 0.1


@pytest.mark.parametrize("guidance", [False, True])
def test_draws_a_image(tmp_path, guidance, pipe):
    """Schnell-like takes no guidance and no shift, dev-like answers to both; both draw."""
    if guidance:
        write_tiny_flux(tmp_path / "dev", guidance=True, layers=2, single_layers=1)
        pipe = FluxPipeline.from_pretrained(tmp_path / "dev", local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        assert len(pipe.transformer.transformer_blocks) == 2 and len(pipe.transformer.single_transformer_blocks) == 1
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}
    low, high = (
        pipe("a red cat", guidance_scale=g, generator=torch.Generator().manual_seed(0), **settings).images for g in (1.0, 9.0)
    )
    assert low.shape == (1, 32, 32, 3) and low.std() > 0.01
    assert np.array_equal(low, high) != guidance
    assert (pipe.scheduler.sigmas[1] == 0.5) != guidance
