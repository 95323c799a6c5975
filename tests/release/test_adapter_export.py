"""Adapter files on their way out: header, every format, and who loads how much of it."""

import json
from pathlib import Path

import pytest
import torch
from by_file import tool
from diffusers import FluxPipeline, FluxTransformer2DModel
from lycoris import LycorisNetwork
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dedistill.adapters.attach import Adapter
from dedistill.adapters.compatibility import check_adapter
from dedistill.adapters.formats import by_layer
from dedistill.adapters.targets import Resolved, adaptable
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.models.flux.naming import NAMES as naming
from dedistill.models.flux.published import full_config
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.release.export import check_file, config_for, export_adapter
from dedistill.release.folder import network_config, skeleton

TOOLS = Path(__file__).parent.parent.parent / "tools"
RECIPE = '[run]\nseed = 3\n[model]\npath = "black-forest-labs/FLUX.1-schnell"\n[train]\nlr = 1e-4\n'
BLOCKS = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.proj_mlp"]
OLD = "ai-toolkit, old_lokr_format: true"
EVERYWHERE = [*BLOCKS, "x_embedder", "norm_out.linear"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_flux(folder)
    return folder


def snapshot(base: Path, file: Path, kind: str, names: list[str], mixed: bool = False) -> Path:
    """A snapshot as training writes it, factors drawn at random."""
    denoiser = FluxTransformer2DModel.from_config(network_config(base))
    shapes = adaptable(denoiser)
    form = lambda i: (4 if not mixed else (2, 4, 8)[i % 3], 2 if mixed and i % 2 else None)  # noqa: E731
    targets = [Resolved(n, shapes[n], *(form(i) if kind == "lokr" else (None, 2 + i)), "x") for i, n in enumerate(names)]
    adapter = Adapter(denoiser, kind, targets)
    for name, p in adapter.trainable().items():
        p.data = torch.from_numpy(keyed.generator(0, name).standard_normal(tuple(p.shape), dtype="float32"))
    save_file(adapter.tensors(), file, metadata={"format": "pt", "dedistill.step": "40", "dedistill.recipe": RECIPE})
    return file


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as f:
        return f.metadata()


def loads(file: Path, base: Path) -> dict[str, tuple[int, int]]:
    return {v.program: (len(v.loaded), len(v.ignored)) for v in check_file(file, base).verdicts}


def test_headers(base, tmp_path):
    """What is required, in strings; the snapshot's own facts stay."""
    file = snapshot(base, tmp_path / "a.safetensors", "lokr", EVERYWHERE)
    said = header(export_adapter(file, tmp_path / "out.safetensors", "lycoris", base))
    assert {f"modelspec.{k}" for k in ("sai_model_spec", "implementation", "title", "resolution")} <= said.keys()
    assert said["modelspec.architecture"] == "flux-1-schnell/lora" and said["modelspec.title"] == "out"
    assert (said["ss_steps"], said["ss_learning_rate"], said["ss_seed"]) == ("40", "0.0001", "3")
    assert said["dedistill.recipe"] == RECIPE and said["dedistill.guidance"] == "none" and said["format"] == "pt"
    assert json.loads((tmp_path / "lycoris_config.json").read_text()) == json.loads(said["lycoris_config"])


@pytest.mark.parametrize("kind", ["lokr", "mixed", "lora"])
def test_lycoris_builds_the_same_layers_from_the_config(kind, base, tmp_path):
    """A LyCORIS network made from the header has our tensors' names and shapes, and takes them."""
    file = snapshot(base, tmp_path / "a.safetensors", kind.replace("mixed", "lokr"), EVERYWHERE, kind == "mixed")
    out = export_adapter(file, tmp_path / "out.safetensors", "lycoris", base)
    config = json.loads(header(out)["lycoris_config"])
    before = dict(vars(LycorisNetwork))
    try:
        LycorisNetwork.apply_preset(config["apply_preset"])
        denoiser = FluxTransformer2DModel.from_config(network_config(base))
        theirs = LycorisNetwork(
            denoiser, config["multiplier"], config["linear_dim"], alpha=config["linear_alpha"], network_module=config["algo"]
        )
    finally:  # presets are attributes of the class
        for name, value in before.items():
            if name.isupper() or name in ("USE_FNMATCH",):
                setattr(LycorisNetwork, name, value)
    theirs.apply_to()
    found = {n: tuple(t.shape) for n, t in theirs.state_dict().items()}
    assert found == {n: tuple(t.shape) for n, t in load_file(out).items()}


@pytest.mark.parametrize("format", ["kohya", "peft", "transformer", "lycoris"])
def test_exports_are_undone_by_exports(format, base, tmp_path):
    """A LoRA on every linear, out in each format and back, has its own bytes again; and so has what is made of that."""
    everywhere = list(adaptable(skeleton(network_config(base))))
    own = snapshot(base, tmp_path / "a.safetensors", "lora", everywhere)
    there = export_adapter(own, tmp_path / "there.safetensors", format, base)
    back = export_adapter(there, tmp_path / "back" / "a.safetensors", "lycoris", base)
    again = export_adapter(back, tmp_path / "again.safetensors", format, base) if format != "lycoris" else there
    for one, other in ((own, back), (there, again)):
        one, other = load_file(one), load_file(other)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("kind", "alpha"), [("lora", 1.0), ("mixed", 8.0)])
def test_lycoris_gives_another_alpha_its_strength(kind, alpha, base, tmp_path):
    """The config, from which the scale is made, says the alpha of the tensors; and so does kohya's entry."""
    file = snapshot(base, tmp_path / "a.safetensors", kind.replace("mixed", "lokr"), EVERYWHERE, kind == "mixed")
    tensors = load_file(file)
    tensors |= {name: torch.tensor(alpha) for name in tensors if name.endswith("alpha")}
    save_file(tensors, file, metadata={"format": "pt"})
    said = header(export_adapter(file, tmp_path / "out.safetensors", "lycoris", base))
    layers = json.loads(said["lycoris_config"])["apply_preset"]["name_algo_map"]
    low = {name: layer for name, layer in layers.items() if not layer.get("full_matrix")}
    assert low and all(layer["alpha"] == alpha and layer["dim"] > 1 for layer in low.values())
    assert float(said["ss_network_alpha"]) == alpha


def test_peft_metadata_gives_the_same_adapter(base, tmp_path):
    """With the header's LoraConfig and without it, diffusers ends with the same network."""
    out = export_adapter(
        snapshot(base, tmp_path / "a.safetensors", "lora", EVERYWHERE), tmp_path / "p.safetensors", "peft", base
    )
    answers = []
    for with_metadata in (True, False):
        state, alphas, metadata = FluxPipeline.lora_state_dict(
            str(tmp_path), weight_name=out.name, return_alphas=True, return_lora_metadata=True
        )
        assert metadata and metadata["transformer.r"] == 6
        denoiser = FluxTransformer2DModel.from_pretrained(base / "transformer")
        chosen = {"metadata": metadata} if with_metadata else {"network_alphas": alphas}
        FluxPipeline.load_lora_into_transformer(state, transformer=denoiser, **({"network_alphas": None} | chosen))
        answers.append(
            {n: p for n, p in denoiser.named_parameters() if "lora_" in n} | {"s": denoiser.x_embedder.scaling["default_0"]}
        )
    first, second = answers
    assert first.keys() == second.keys() and len(first) == 2 * len(EVERYWHERE) + 1
    assert first["s"] == second["s"] == 1.0
    assert all(torch.equal(first[n], second[n]) for n in first if n != "s")


def test_who_loads_what(base, tmp_path):
    """The tables, on our own files in every format."""
    lokr = snapshot(base, tmp_path / "lokr.safetensors", "lokr", BLOCKS)
    mixed = snapshot(base, tmp_path / "mixed.safetensors", "lokr", BLOCKS, mixed=True)
    lora = snapshot(base, tmp_path / "lora.safetensors", "lora", EVERYWHERE)
    n, m = len(load_file(lokr)), len(load_file(mixed))
    found = loads(lokr, base)
    assert found["ComfyUI"] == found["LyCORIS"] == found["SimpleTuner"] == found[OLD] == (n, 0)
    assert found["diffusers, dedistill.load_lokr"] == (n, 0)
    assert found["diffusers, load_lora_weights"] == found["kohya sd-scripts"] == found["ai-toolkit"] == (0, n)
    found = loads(export_adapter(mixed, tmp_path / "t.safetensors", "transformer", base), base)
    k = m - len(BLOCKS)  # without alphas
    assert found["ComfyUI"] == found["diffusers, dedistill.load_lokr"] == (k, 0)
    assert found["LyCORIS"] == found["diffusers, transformer.load_lora_adapter"] == (0, k)
    found = loads(export_adapter(lokr, tmp_path / "t2.safetensors", "transformer", base), base)
    assert found["diffusers, transformer.load_lora_adapter"] == (2 * len(BLOCKS), 0)
    found = loads(export_adapter(lora, tmp_path / "p.safetensors", "peft", base), base)
    assert found["diffusers, load_lora_weights"] == found["ComfyUI"] == found["SimpleTuner"] == (2 * len(EVERYWHERE), 0)
    found = loads(export_adapter(lora, tmp_path / "k.safetensors", "kohya", base), base)
    assert found["ComfyUI"] == (12, 0)  # q and k are one fused layer
    assert found["diffusers, load_lora_weights"] == (6, 6) and found["kohya sd-scripts"] == (9, 3)  # not the final layer


def test_the_table_for_load_lora_weights_is_what_diffusers_does(base, tmp_path):
    """Its own converter and its filter, on kohya's names in and outside the blocks, and on LyCORIS' LoRA."""
    lora = snapshot(base, tmp_path / "lora.safetensors", "lora", [n for n in EVERYWHERE if "single" not in n])
    kohya = export_adapter(lora, tmp_path / "k.safetensors", "kohya", base)
    (verdict,) = (v for v in check_file(kohya, base).verdicts if v.program == "diffusers, load_lora_weights")
    state = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="k.safetensors")
    kept = {k for k in state if k.startswith("transformer.") and "lora" in k}
    assert {k.split(".lora_")[0] for k in kept} == {f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"}
    assert {k.partition(".")[0] for k in verdict.loaded} == {"lora_unet_double_blocks_0_img_attn_qkv"}
    assert {k.partition(".")[0] for k in verdict.ignored} == {"lora_unet_img_in", "lora_unet_final_layer_adaLN_modulation_1"}
    (verdict,) = (v for v in check_file(lora, base).verdicts if v.program == "diffusers, load_lora_weights")
    assert not verdict.loaded and not FluxPipeline.lora_state_dict(str(tmp_path), weight_name="lora.safetensors")
    strange = load_file(kohya) | {"lora_unet_elsewhere.lora_down.weight": torch.ones(1, 1)}
    save_file(strange, tmp_path / "s.safetensors")
    (verdict,) = (
        v for v in check_file(tmp_path / "s.safetensors", base).verdicts if v.program == "diffusers, load_lora_weights"
    )
    assert not verdict.loaded and "raises an error at 'lora_unet_elsewhere" in verdict.why
    with pytest.raises(ValueError, match="Incompatible keys"):
        FluxPipeline.lora_state_dict(str(tmp_path), weight_name="s.safetensors")


@pytest.mark.parametrize("guidance", [False, True])
def test_every_linear_at_full_size_is_in_comfyuis_table(guidance):
    """19 + 38 blocks on meta; a LoKr on every linear loads whole in ComfyUI, LyCORIS and load_lokr."""
    config = full_config("black-forest-labs/FLUX.1-dev" if guidance else "", False)
    shapes = adaptable(skeleton(config))
    assert len(shapes) == 494 + (10 if guidance else 8)
    one = torch.empty(1, 1, device="meta")
    for prefix, spell in (("lycoris_", lambda n: n.replace(".", "_")), ("transformer.", str)):
        tensors = {f"{prefix}{spell(n)}.{w}": one for n in shapes for w in ("lokr_w1", "lokr_w2")}
        found = {v.program: len(v.loaded) for v in check_adapter(tensors, shapes, naming)}
        assert found["ComfyUI"] == found["diffusers, dedistill.load_lokr"] == 2 * len(shapes)
        assert found["LyCORIS"] == found[OLD] == (2 * len(shapes) if prefix == "lycoris_" else 0)
        assert found["ai-toolkit"] == 2 * len(shapes) - found[OLD]


def test_the_network_is_found_by_itself(base, tmp_path):
    """--model, else the recipe's local folder, else the published shape that the recipe or the tensors name."""
    dev = {"dedistill.recipe": '[model]\npath = "black-forest-labs/FLUX.1-dev"'}
    assert config_for({}, dev, None)["guidance_embeds"] and config_for({}, {}, None)["num_layers"] == 19
    assert config_for({"lycoris_time_text_embed_guidance_embedder_linear_1.alpha": 0}, {}, None)["guidance_embeds"]
    local = {"dedistill.recipe": f'[model]\npath = "{base}"'}
    assert config_for({}, local, None) == config_for({}, dev, base) == network_config(base)


def test_tools(base, tmp_path, capsys):
    file = snapshot(base, tmp_path / "a.safetensors", "lokr", BLOCKS)
    out = tmp_path / "out.safetensors"
    assert tool("export_model", file, "--format", "transformer", "--out", out, "--model", base) == 0
    assert tool("check_adapter", out, "--model", base) == 0
    assert "ComfyUI" in capsys.readouterr().out
    assert tool("export_model", file, "--format", "peft", "--out", tmp_path / "p.safetensors", "--model", base) == 2
    assert tool("export_model", file, "--format", "transformer", "--out", out, "--model", base) == 1
    assert "already exists" in capsys.readouterr().err and not (tmp_path / "p.safetensors").exists()
    save_file({"model.layer.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    assert tool("check_adapter", tmp_path / "other.safetensors", "--model", base) == 1
    with pytest.raises(UserError, match="belongs to no layer"):
        by_layer(load_file(tmp_path / "other.safetensors"), [], "other")


FUSED = [f"transformer.transformer_blocks.0.attn.to_{part}" for part in "qkv"]
OTHER_SIZES = {
    "LoRA": {f"{n}.lora_{ab}.weight": torch.zeros(shape) for n in FUSED for ab, shape in (("A", (2, 32)), ("B", (32, 2)))},
    "torn LoRA": {
        f"{n}.lora_{ab}.weight": torch.zeros(shape) for n in FUSED for ab, shape in (("A", (2, 3072)), ("B", (3072, 4)))
    },
    "LoKr": {
        f"lycoris_transformer_blocks_0_attn_to_{part}.lokr_w{i}": torch.zeros(shape)
        for part in "qkv"
        for i, shape in ((1, (4, 4)), (2, (8, 8)))
    },
}


@pytest.mark.parametrize("tensors", OTHER_SIZES.values(), ids=OTHER_SIZES.keys())
def test_an_adapter_of_another_network_is_told_from_one_that_fits(tmp_path, tensors):
    """Nothing says which network it is for: the published one is taken, which it does not fit."""
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    checked = check_file(tmp_path / "a.safetensors")
    assert "a.safetensors'" in checked.fault and "--model" in checked.fault and not checked.layers
