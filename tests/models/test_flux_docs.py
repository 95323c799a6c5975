"""What docs/flux.md says: its snippets run, its recipes load, its numbers are the architecture's."""

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel

from dedistill.flow.path import dynamic_shift
from dedistill.models.flux.network import MASKS
from dedistill.models.flux.published import PUBLISHED, shape_of
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.models.quantize import prepare_base, storage_bytes
from dedistill.recipe.model_tables import Model

PAGE = (Path(__file__).parents[2] / "docs/flux.md").read_text()
GIB = 2**30


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def table(first: str) -> list[dict[str, str]]:
    """The table whose first column is headed ``first``."""
    lines = PAGE[PAGE.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows]


@pytest.mark.parametrize("code", blocks("python"), ids=["result", "others"])
def test_snippets_run(code, tmp_path, monkeypatch):
    """Every snippet, with a small model in place of the large one."""
    monkeypatch.chdir(tmp_path)
    write_tiny_flux(Path(re.search(r'from_pretrained\("(.*?)"', code)[1]))
    small = {'"cuda"': '"cpu"', "1024": "32", "steps=28": "steps=3", "steps=4": "steps=2, height=32, width=32"}
    for large, little in small.items():
        code = code.replace(large, little)
    names = {}
    exec(code, names)
    assert names["image"].size == (32, 32)
    assert (tmp_path / "cat.png").exists() == ("cat.png" in code)


@pytest.mark.parametrize("text", blocks("toml"), ids=["schnell", "libreflux", "redux"])
def test_recipes_load(text):
    """A part of a recipe stands beside the first one's tables."""
    whole = tomllib.loads(blocks("toml")[0])["model"] | tomllib.loads(text)["model"]
    assert Model(**whole).family == "flux"


def test_models_are_the_published_ones():
    """Blocks, guidance and shift as the program knows them."""
    rows = {row["model"].strip("`"): row for row in table("model")}
    assert rows.keys() == {p.id for p in PUBLISHED if "Redux" not in p.id}
    for name, row in rows.items():
        shape = shape_of(name)
        assert row["blocks"] == f"{shape.layers} + {shape.single_layers}"
        assert row["guidance embedding"].startswith("yes") == shape.guidance
        assert row["mask"] in MASKS
    dev = rows["black-forest-labs/FLUX.1-dev"]
    assert f"{dynamic_shift(4096):.2f} at 1024 x 1024" in dev["shift of sigma"] and "Non-Commercial" in dev["licence"]


@cache
def full_size(name: str, quant: str) -> tuple[int, int]:
    """Bytes of a published network, and parameters of a LoRA of rank 16 on all its blocks."""
    shape = shape_of(next(p.id for p in PUBLISHED if name in p.id))
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(num_layers=shape.layers, num_single_layers=shape.single_layers).bfloat16()
    linears = [m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks." in n]
    lora = sum(16 * (m.in_features + m.out_features) for m in linears)
    prepare_base(denoiser, quant, [], "meta")
    return storage_bytes(denoiser), lora


def test_memory_is_arithmetic():
    """Each row from the full-size network on the meta device and 14 bytes per trained parameter."""
    rows = table("base")
    assert len(rows) == 5
    for row in rows:
        name, dtype = row["base"].split(", ")
        millions = float(row["parameters"].split()[0])
        stored, lora = full_size(name, {"int8": "int8", "bf16": "none"}[dtype])
        assert "LoRA" not in row["trained"] or round(lora / 1e6, 1) == millions
        base, adapter, states = stored / GIB, 6e6 * millions / GIB, 8e6 * millions / GIB
        found = [row["base size"], row["adapter and gradient"], row["optimizer"], row["sum"]]
        assert found == [f"{x:.1f}" for x in (base, adapter, states, base + adapter + states)], row


def test_activations_are_arithmetic():
    """57 blocks keep a bf16 input of width 3072 per token."""
    for side, said in ((512, "0.36"), (1024, "1.36")):
        tokens = (side // 16) ** 2 + 80
        assert f"{57 * tokens * 2 * 3072 / GIB:.2f}" == said
        assert f"{said} GiB" in PAGE


def test_size_of_t5():
    sizes = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64, "vocab_size": 32128}
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))
    assert f"{2 * sum(p.numel() for p in t5.parameters()) / GIB:.1f} GiB in bf16" in PAGE
