"""SD3.5 beside diffusers' own code and in files of other programs: names, single files, adapters, images of a pipeline."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file

from dedistill.adapters.attach import Adapter
from dedistill.adapters.compatibility import check_adapter
from dedistill.adapters.delta import weight_change
from dedistill.adapters.formats import ADAPTER_FORMATS, as_kohya, by_layer, is_lora
from dedistill.adapters.targets import Resolved, adaptable
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.flow.guidance import guider_of
from dedistill.models.blocks import checkpoint_blocks
from dedistill.models.model import Model
from dedistill.models.network_files import PREFIX
from dedistill.models.registry import get_family
from dedistill.models.sd3.naming import NAMES as naming
from dedistill.models.sd3.published import LARGE, MEDIUM, full_config
from dedistill.models.sd3.tiny import write_tiny_sd3
from dedistill.recipe.model_tables import Model as Table
from dedistill.release.export import export_model
from dedistill.sampling.sampler import Sampling, start_noise, trajectories

FAMILY = get_family("sd3")
LENGTH = 12


def table(path: Path, **changes) -> Table:
    return Table(family="sd3", path=str(path), mask="none", t5_mask=False, text_length=LENGTH, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sd3") / "model"
    write_tiny_sd3(place, layers=3, dual=1)
    return place


@pytest.fixture
def components(folder):
    components = FAMILY.load(table(folder), seed=0)
    components.sample_shape = (16, 4, 6)
    return components


def original(state: dict) -> dict[str, torch.Tensor]:
    return {
        name: naming.join(name, [state[part] for part in parts], state) for name, parts in naming.original_plan(state).items()
    }


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [MEDIUM, LARGE], ids=lambda base: base.id)
def test_every_tensor_of_the_full_network_has_its_place(base):
    """diffusers' own reader turns our names back into exactly the network's names and shapes; kohya's are distinct."""
    with torch.device("meta"):
        state = SD3Transformer2DModel.from_config(full_config(base.id, False)).state_dict()
        back = convert_sd3_transformer_checkpoint_to_diffusers(original(state))
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in state.items()}
    modules = {name.rpartition(".")[0] for name in original(state) if name != "pos_embed"}
    assert len({naming.kohya_name(name) for name in modules}) == len(modules)
    assert naming.kohya_name("joint_blocks.7.x_block.attn.qkv") == "lora_unet_joint_blocks_7_x_block_attn_qkv"


def test_two_modulations_have_their_halves_the_other_way_round(components):
    """That of the output, and that of the text in the last block."""
    state = components.denoiser.state_dict()
    there = original(state)
    for name, own in (
        ("final_layer.adaLN_modulation.1", "norm_out.linear"),
        ("joint_blocks.2.context_block.adaLN_modulation.1", "transformer_blocks.2.norm1_context.linear"),
    ):
        assert torch.equal(there[f"{name}.weight"][:32], state[f"{own}.weight"][32:])
        assert torch.equal(there[f"{name}.bias"][32:], state[f"{own}.bias"][:32])
    plain = "joint_blocks.0.context_block.adaLN_modulation.1.weight"
    assert torch.equal(there[plain], state["transformer_blocks.0.norm1_context.linear.weight"])


def test_names_that_it_does_not_have():
    with pytest.raises(UserError, match="no_such"):
        naming.original_plan(["transformer_blocks.0.no_such.weight"])
    with pytest.raises(UserError, match=r"to_k\.weight"):
        naming.original_plan(["transformer_blocks.0.attn2.to_q.weight", "transformer_blocks.0.attn2.to_v.weight"])


@pytest.mark.parametrize("form", ["diffusers' names", "original names", "a whole pipeline's names"])
def test_single_files_are_read_back_to_the_bit(components, folder, tmp_path, form):
    state = components.denoiser.state_dict()
    tensors = state if form == "diffusers' names" else original(state)
    if form == "a whole pipeline's names":
        tensors = {PREFIX + name: tensor for name, tensor in tensors.items()} | {"first_stage_model.a": torch.ones(2)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "one.safetensors")
    again = FAMILY.load(table(tmp_path / "one.safetensors", components=str(folder)), seed=1).denoiser.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    if form != "diffusers' names":
        back = convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors) if PREFIX in next(iter(tensors)) else tensors)
        assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("gone", ["pos_embed", "x_embedder.proj.weight", "joint_blocks.1.x_block.mlp.fc1.bias"])
def test_single_files_that_are_not_whole(components, folder, tmp_path, gone):
    tensors = {name: t.contiguous() for name, t in original(components.denoiser.state_dict()).items() if name != gone}
    save_file(tensors, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match=r"^model\.path: .*" + gone.replace(".", r"\.")):
        FAMILY.load(table(tmp_path / "one.safetensors", components=str(folder)), seed=1, denoiser=False)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(folder):
    """An adapter's file on every linear that can learn: names -> (tensors, layers), and the network's answer with it."""
    found = {}
    for kind in ("lora", "lokr"):
        net = FAMILY.load(table(folder), seed=0).denoiser.requires_grad_(False)
        shapes = adaptable(net)
        linears = [name for name in shapes if isinstance(net.get_submodule(name), torch.nn.Linear)]
        chosen = [Resolved(n, shapes[n], 4 if kind == "lokr" else None, 2 if kind == "lora" else None, "x") for n in linears]
        adapter = Adapter(net, kind, chosen)
        for name, p in adapter.trainable().items():
            p.data.copy_(torch.from_numpy(keyed.generator(0, name).standard_normal(tuple(p.shape), dtype="float32")) * 0.2)
        with torch.no_grad():
            answer = asked(net)
        adapter.detach_from_base()
        tensors = adapter.tensors()
        found[kind] = (by_layer(tensors, shapes, "x"), shapes, answer)
    return found


def asked(net) -> torch.Tensor:
    made = lambda name, *shape: keyed.noise(0, name, 0, range(2), shape)  # noqa: E731
    return net(made("a", 16, 4, 6), made("b", 89, 32), made("c", 28), torch.tensor([300.0, 900.0]), return_dict=False)[0]


def written(layers, shapes, format: str) -> dict[str, torch.Tensor]:
    return as_kohya(layers, naming, shapes) if format == "kohya" else ADAPTER_FORMATS[format](layers, "transformer")


@pytest.mark.parametrize(
    ("kind", "format"), [*(("lora", f) for f in [*ADAPTER_FORMATS, "kohya"]), ("lokr", "lycoris"), ("lokr", "transformer")]
)
def test_adapter_files_are_read_back(adapted, kind, format):
    """The same change of every linear; kohya's fused and swapped ones too."""
    layers, shapes, _ = adapted[kind]
    again = by_layer(written(layers, shapes, format), shapes, "x", naming=naming)
    assert again.keys() == layers.keys()
    for name in layers:
        torch.testing.assert_close(weight_change(again[name]), weight_change(layers[name]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", [*ADAPTER_FORMATS, "kohya"])
def test_load_lora_weights_is_what_diffusers_does(adapted, folder, format, tmp_path):
    """Loaded whole, with the answer of the network as it was trained; or what check says of it: an error, or nothing."""
    layers, shapes, wanted = adapted["lora"]
    assert is_lora(layers)
    tensors = {name: tensor.contiguous() for name, tensor in written(layers, shapes, format).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    said = {v.program: v for v in check_adapter(tensors, shapes, naming)}["diffusers, load_lora_weights"]
    before = asked(pipe.transformer)
    try:
        pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    except (ValueError, IndexError):
        assert said.why and not said.loaded
        return
    with torch.no_grad():
        answer = asked(pipe.transformer)
    if said.whole:
        torch.testing.assert_close(answer, wanted, rtol=0, atol=1e-4)
    else:
        assert not said.loaded and torch.equal(answer, before)
    assert said.whole == (format == "peft")


def test_peft_files_are_loaded_whole_by_most(adapted):
    layers, shapes, _ = adapted["lora"]
    said = {
        format: {v.program for v in check_adapter(written(layers, shapes, format), shapes, naming) if v.whole}
        for format in ("peft", "kohya")
    }
    assert said["peft"] >= {"ComfyUI", "SimpleTuner", "diffusers, load_lora_weights"}
    assert said["kohya"] == {"ComfyUI", "kohya sd-scripts"}


# --- images ----------------------------------------------------------------------------------------------------------


STEPS = 6


@pytest.mark.parametrize(
    ("cfg", "guider", "theirs"),
    [
        (4.5, "cfg", {"guidance_scale": 4.5}),
        (1.0, "cfg", {"guidance_scale": 1.0}),
        (
            4.0,
            "skip_layers:blocks=1,scale=2.5,start=0.01,stop=0.5",
            {
                "guidance_scale": 4.0,
                "skip_guidance_layers": [1],
                "skip_layer_guidance_scale": 2.5,
                "skip_layer_guidance_start": 0.01,
                "skip_layer_guidance_stop": 0.5,
            },
        ),
    ],
    ids=["cfg", "no guidance", "skip-layer guidance"],
)
def test_latents_are_those_of_diffusers_pipeline(components, folder, cfg, guider, theirs):
    """On the grid that shifts sigma once; what num_inference_steps alone would give is another one."""
    components.denoiser.requires_grad_(False)
    model = Model(FAMILY, components, components.denoiser, LENGTH, negative="blue", grid_shift=FAMILY.shift(components, 6))
    start = start_noise(0, 1, components.sample_shape)
    own = next(iter(trajectories(model, ["one red cat"], start, Sampling(steps=STEPS, guidance=guider_of(guider, cfg)))))[-1]
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "one red cat", "negative_prompt": "blue", "height": 32, "width": 48, "latents": start}
    call |= {"max_sequence_length": LENGTH, "output_type": "latent"} | theirs
    found = pipe(**call, sigmas=np.linspace(1, 1 / STEPS, STEPS)).images
    torch.testing.assert_close(own, found, rtol=0, atol=1e-5)
    assert pipe.scheduler.sigmas[:-1].tolist() == pytest.approx([3 * s / (1 + 2 * s) for s in np.linspace(1, 1 / STEPS, STEPS)])
    twice = pipe(**call, num_inference_steps=STEPS).images
    assert float(pipe.scheduler.sigmas[-2]) == pytest.approx(0.008929, abs=1e-5)  # the last step, on next to no noise
    assert (twice - found).abs().max() > 1e-2


def test_checkpointing_changes_nothing(folder):
    """Outputs and gradients, to the bit, in dual and other blocks, the last among them."""
    found = []
    for wanted in (0, 2, True):
        components = FAMILY.load(table(folder), seed=0)
        net = components.denoiser.train()
        checkpoint_blocks(net, FAMILY.blocks(net), wanted)
        out = asked(net)
        out.square().mean().backward()
        found.append([out, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) > 50
    for other in found[1:]:
        assert len(other) == len(found[0]) and all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_released_folders_are_whole_pipelines(components, folder, tmp_path):
    """Saved, exported, and loaded by diffusers alone: the same denoiser, and text encoders, VAE and scheduler beside it."""
    with torch.no_grad():
        components.denoiser.proj_out.bias.add_(1.0)
    FAMILY.save(components, tmp_path / "saved")
    export_model(tmp_path / "saved", tmp_path / "released", "diffusers", base=MEDIUM.id)
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "released", local_files_only=True)
    own = components.denoiser.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in pipe.transformer.state_dict().items())
    assert pipe.scheduler.config.shift == 3.0 and pipe.text_encoder_3 is not None
    card = (tmp_path / "released" / "README.md").read_text()
    assert "license_name: stabilityai-ai-community" in card and "sigmas=np.linspace" in card
