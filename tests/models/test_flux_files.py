"""The files of a FLUX denoiser: which count, and what in them is refused, already by their headers."""

import json

import pytest
import torch
from original_files import as_original
from safetensors.torch import load_file, save_file

from dedistill.errors import UserError
from dedistill.flow.path import dynamic_shift
from dedistill.models.flux import SPEC
from dedistill.models.flux.family import Flux
from dedistill.models.flux.naming import NAMES as naming
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.models.places import locate
from dedistill.recipe.model_tables import Model

NAME = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    write_tiny_flux(tmp_path / "m", guidance=True)
    return tmp_path / "m"


def load(folder, *, denoiser, **more):
    spec = Model(family="flux", path=str(folder), guidance=1.0, text_length=32, mask="bool", t5_mask=True, **more)
    return Flux().load(spec, seed=0, denoiser=denoiser)


def rewritten(change):
    def damage(folder):
        tensors = load_file(folder / NAME)
        change(tensors)
        save_file(tensors, folder / NAME)

    return damage


def set_config(**keys):
    def damage(folder):
        file = folder / "transformer/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return damage


def moved(old, new):
    return rewritten(lambda t: t.update({new: t.pop(old)}))


def channels(t):
    t["x_embedder.weight"] = torch.ones(t["x_embedder.weight"].shape[0], 96)


def widened(folder):
    rewritten(channels)(folder)
    set_config(in_channels=96, out_channels=64)(folder)


HEADERS = {
    "another block": (
        moved("proj_out.bias", "transformer_blocks.8000000.x"),
        "'transformer_blocks', and none of number 1",
    ),
    "a gap": (moved("proj_out.bias", "single_transformer_blocks.3.attn.to_q.bias"), "none of number 2"),
    "no number": (moved("proj_out.bias", "transformer_blocks.one.x"), "1 tensor is missing"),
    "many blocks": (
        rewritten(lambda t: t.update({f"transformer_blocks.{i}.x": torch.ones(1) for i in range(1200)})),
        "1,200 blocks",
    ),
    "codes": (rewritten(lambda t: t.update({"proj_out.weight": t["proj_out.weight"].to(torch.int8)})), "of whole numbers"),
    "scaled fp8": (rewritten(lambda t: t.update({"proj_out.scale_weight": torch.ones(1)})), "scaled fp8 weights"),
    "another file": (lambda f: save_file({"x": torch.ones(1)}, f / "transformer/ema.safetensors"), "ema.safetensors"),
    "types in its config": (set_config(attention_head_dim="wide"), "does not describe a FluxTransformer2DModel"),
    "a list in its config": (set_config(num_attention_heads=[2]), "does not describe a FluxTransformer2DModel"),
    "another task": (widened, "takes 96 numbers of each patch"),
}


@pytest.mark.parametrize("denoiser", [True, False])
@pytest.mark.parametrize(("damage", "said"), HEADERS.values(), ids=HEADERS)
def test_what_headers_tell_is_refused_before_anything_is_encoded(folder, damage, said, denoiser):
    damage(folder)
    with pytest.raises(UserError, match=r"^model\.path: ") as refused:
        load(folder, denoiser=denoiser)
    assert said in str(refused.value)


def test_a_tensor_in_two_shards(folder):
    tensors = load_file(folder / NAME)
    (folder / NAME).unlink()
    for i in (1, 2):
        save_file(tensors, folder / f"transformer/diffusion_pytorch_model-{i:05d}-of-00002.safetensors")
    with pytest.raises(UserError, match="which another file of the folder holds as well"):
        load(folder, denoiser=False)


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_v.weight", "norm_out.linear.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_base_that_is_not_finite_is_refused_by_its_tensor(folder, name, value, dtype):
    def spoil(tensors):
        tensors[name].view(-1)[-1] = value
        tensors[name] = tensors[name].to(dtype)

    rewritten(spoil)(folder)
    if dtype == torch.float8_e4m3fn and value == float("inf"):
        pytest.skip("it has no Inf")
    with pytest.raises(UserError, match=f"tensor '{name}' holds numbers that are not finite"):
        load(folder, denoiser=True)


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model", "text_encoder_2/model", "vae/diffusion_pytorch_model"])
def test_a_file_whose_second_half_is_zeros(folder, part):
    file = folder / f"{part}.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(UserError, match="are zero throughout"):
        components = load(folder, denoiser=True)
        components.text.load("cpu")
        components.vae.load("cpu")


@pytest.mark.parametrize("part", ["text_encoder/model", "text_encoder_2/model", "vae/diffusion_pytorch_model"])
def test_encoders_that_are_not_finite_are_refused_by_their_tensor(folder, part):
    file = folder / f"{part}.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    components = load(folder, denoiser=False)
    with pytest.raises(UserError, match="holds numbers that are not finite"):
        (components.vae if "vae" in part else components.text).load("cpu")


@pytest.mark.parametrize(
    "rest", [["vae.decoder.x", "text_encoders.t5xxl.y"], ["first_stage_model.z", "cond_stage_model.logit_scale"]]
)
def test_of_a_whole_pipeline_in_one_file_the_denoiser_is_read(folder, tmp_path, rest):
    bfl = as_original(naming, load_file(folder / NAME))
    whole = {f"model.diffusion_model.{k}": v.contiguous() for k, v in bfl.items()} | {name: torch.ones(2) for name in rest}
    save_file(whole, tmp_path / "all.safetensors")
    found = load(tmp_path / "all.safetensors", denoiser=True, components=str(folder)).denoiser.state_dict()
    wanted = load(folder, denoiser=True).denoiser.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("facts", ["[1]", "[" * 50_000, "{"])
def test_facts_in_a_header_are_a_table(folder, tmp_path, facts):
    save_file(load_file(folder / NAME), tmp_path / "one.safetensors", {"dedistill.facts": facts})
    with pytest.raises(UserError, match=r"one.safetensors': dedistill.facts in its header cannot be read as JSON"):
        locate(SPEC, str(tmp_path / "one.safetensors"), None, str(folder))


@pytest.mark.parametrize(("name", "shape"), [("x_embedder.weight", (5,)), ("transformer_blocks.0.attn.norm_q.weight", (0,))])
def test_shapes_that_tell_no_sizes(folder, tmp_path, name, shape):
    save_file(load_file(folder / NAME) | {name: torch.ones(shape)}, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=r"one\.safetensors'"):
        load(tmp_path / "one.safetensors", denoiser=False, components=str(folder))


def test_auto_needs_the_models_own_scheduler(folder):
    components = load(folder, denoiser=False)
    assert Flux().shift(components, 1024) == dynamic_shift(1024)
    file = folder / "scheduler/scheduler_config.json"
    for content, said in ((None, "is missing: fetch it, or set a number"), ('{"shift": "x"}', "does not describe a shift")):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(UserError, match=f"scheduler_config.json'.*{said}"):
            Flux().shift(load(folder, denoiser=False), 1024)
