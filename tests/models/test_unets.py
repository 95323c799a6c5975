"""Families whose denoiser is a U-Net trained by diffusion: sizes, names, noise levels, diffusers' own pipelines."""

import json
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import compute_snr
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_recipes import adapter_table
from torch import nn

from dedistill.adapters.attach import Adapter
from dedistill.adapters.compatibility import check_adapter
from dedistill.adapters.files import load_lokr
from dedistill.adapters.formats import as_kohya, as_peft, as_transformer, by_layer
from dedistill.adapters.targets import adaptable, matching, resolve_targets
from dedistill.data.source import Batch, Slot
from dedistill.errors import UserError
from dedistill.flow.parameterization import own_weight, variance_preserving
from dedistill.flow.path import flow_loss, interpolate
from dedistill.flow.schedule import schedule_of
from dedistill.flow.solvers import solve
from dedistill.models.blocks import checkpoint_blocks
from dedistill.models.model import Model
from dedistill.models.registry import families, get_family, get_spec, licence_for, published
from dedistill.models.unet.family import UNetFamily
from dedistill.models.unet.tiny import write_tiny_unet
from dedistill.objectives.base import Objective, objective_for
from dedistill.recipe.resolve import recipe_of
from dedistill.release.export import export_model

FAMILIES = [name for name in families() if issubclass(type(get_family(name)), UNetFamily)]
NULL = {"sd15": "empty", "sdxl": "zeros"}
SIZES = {"sd15": (859_520_964, 184, 98, 16), "sdxl": (2_567_463_684, 743, 51, 70)}
"""Parameters, linears, convolutions, transformer blocks."""
every_family = pytest.mark.parametrize("name", FAMILIES)


def spec(folder: Path, **changes) -> SimpleNamespace:
    plain = {"path": str(folder), "new": None, "revision": None, "components": None, "guidance": None, "text_length": 77}
    return SimpleNamespace(**(plain | {"mask": "none", "t5_mask": False, "null": "empty", "prediction": "auto"} | changes))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Of a tiny model of each family, and one of each that predicts v."""
    here = tmp_path_factory.mktemp("unets")
    for name in FAMILIES:
        write_tiny_unet(here / name, get_family(name).published_config(""))
        write_tiny_unet(here / f"{name}-v", get_family(name).published_config(""), seed=1, prediction="v_prediction")
    return {folder.name: folder for folder in here.iterdir()}


def loaded(folders, name: str, **changes):
    family = get_family(name.removesuffix("-v"))
    components = family.load(spec(folders[name], **changes), seed=0)
    components.sample_shape = (4, 8, 8)
    return family, components


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- sizes and names -------------------------------------------------------------------------------------------------


@every_family
def test_published_networks_have_their_published_sizes(name):
    family = get_family(name)
    denoiser = family.full_size(spec(Path("none"), null=NULL[name])).denoiser
    count, linears, convolutions, blocks = SIZES[name]
    kinds = [type(module) for module in denoiser.modules()]
    assert sum(p.numel() for p in denoiser.parameters()) == count
    assert (kinds.count(nn.Linear), kinds.count(nn.Conv2d), len(family.blocks(denoiser))) == (linears, convolutions, blocks)
    shapes = adaptable(denoiser)
    names = [module for module, _ in denoiser.named_modules() if module in shapes]
    assert list(shapes) == names and len(names) == linears + convolutions
    shares = {
        preset: sum(denoiser.get_submodule(n).weight.numel() for pattern in patterns for n in matching(pattern, shapes)) / count
        for preset, patterns in family.presets(denoiser).items()
    }
    assert shares["everything"] > 0.999 and shares["attention"] + shares["mlp"] == pytest.approx(shares["blocks"])
    assert shares["convolutions"] == pytest.approx({"sd15": 0.664, "sdxl": 0.125}[name], abs=0.01)
    assert shares["time"] == pytest.approx({"sd15": 0.030, "sdxl": 0.007}[name], abs=0.002)


@every_family
def test_every_layer_has_one_original_name_and_back(name):
    names = get_family(name).names
    denoiser = get_family(name).full_size(spec(Path("none"), null=NULL[name])).denoiser
    own = {module.rpartition(".")[0] for module in denoiser.state_dict()}
    original = {names.original(module): module for module in own}
    assert len(original) == len(own) and all(names.diffusers(known) == module for known, module in original.items())
    for wrong in ("down_blocks.0.resnets.0.conv3", "transformer_blocks.0.attn.to_q", "mid_block.other.0.conv1"):
        with pytest.raises(UserError, match=f"'{wrong}' is not a layer of this U-Net"):
            names.original(wrong)


@every_family
def test_single_files_are_what_diffusers_makes_of_them(name, folders, tmp_path):
    """Original names, through diffusers' converter and through ours, give the same network bit for bit; and every published
    kind of single file is read: with and without the prefix, and with diffusers' names."""
    family, components = loaded(folders, name)
    state = components.denoiser.state_dict()
    original = {name: state[part] for name, (part,) in family.names.original_plan(state).items()}
    theirs = convert_ldm_unet_checkpoint(original, dict(components.denoiser.config))
    assert theirs.keys() == state.keys() and all(torch.equal(theirs[n], state[n]) for n in state)
    other = {"first_stage_model.decoder.conv_in.weight": torch.ones(1)}
    bare = {n.removeprefix("model.diffusion_model."): t for n, t in original.items()}
    for i, tensors in enumerate((original | other, bare, state)):
        file = tmp_path / f"{i}.safetensors"
        save_file({n: t.contiguous() for n, t in tensors.items()}, file)
        again = family.load(spec(file, components=str(folders[name])), seed=0).denoiser.state_dict()
        assert again.keys() == state.keys() and all(torch.equal(again[n], state[n]) for n in state)
    del original["model.diffusion_model.input_blocks.4.0.in_layers.2.weight"]
    save_file({n: t.contiguous() for n, t in original.items()}, tmp_path / "less.safetensors")
    missing = r"less.*: 1 tensor is missing, e\.g\. .*input_blocks\.4\.0\.in_layers\.2\.weight"
    with pytest.raises(UserError, match=missing):
        family.load(spec(tmp_path / "less.safetensors", components=str(folders[name])), seed=0)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("sd15", "peft"),
        ("sdxl", "kohya"),
        ("sdxl", "lokr"),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("sd15", "kohya"), ("sd15", "lokr"), ("sdxl", "peft"))),
    ],
)
def test_adapters_are_loaded_by_diffusers_pipeline(name, format, folders, tmp_path):
    """Every kind of layer, with the same result: LoRA by its own loader in both spellings, LoKr by ours."""
    family, components = loaded(folders, name)
    denoiser, kind = components.denoiser.requires_grad_(False), "lokr" if format == "lokr" else "lora"
    size = {"factor": 2} if kind == "lokr" else {"rank": 2}
    table = adapter_table(kind, {"pattern": "**"} | size)
    shapes = adaptable(denoiser)
    adapter = Adapter(denoiser, kind, resolve_targets(table, shapes, {}))
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            p.copy_(noise(i, *p.shape) * 0.2)
    own = by_layer(adapter.tensors(), shapes, "adapter", folder="unet")
    write = {"peft": as_peft, "lokr": as_transformer}
    tensors = as_kohya(own, family.names, shapes) if format == "kohya" else write[format](own, "unet")
    save_file({n: tensor.contiguous() for n, tensor in tensors.items()}, tmp_path / "mine.safetensors")
    sample, step, text = noise(9, 1, 4, 8, 8), torch.tensor([500]), family.encode_text(components, ["a"], 77)
    told = {"encoder_hidden_states": text.tokens.embeds, "added_cond_kwargs": family.added(text, sample, 8)}
    wanted = denoiser(sample, step, **told).sample
    pipe = DiffusionPipeline.from_pretrained(folders[name])
    plain = pipe.unet(sample, step, **told).sample
    if format == "lokr":
        load_lokr(pipe, tmp_path / "mine.safetensors")
    else:
        pipe.load_lora_weights(tmp_path, weight_name="mine.safetensors")
        found = {v.program: v for v in check_adapter(tensors, shapes, family.names, "unet")}
        assert found["diffusers, load_lora_weights"].whole and found["ComfyUI"].whole
        # sd-scripts leaves out what stands outside the blocks
        outside = {key for key in tensors if not re.search("input_blocks_[1-9]|middle|output|down_|mid_|up_", key)}
        assert set(found["kohya sd-scripts"].ignored) == (outside if format == "kohya" else set(tensors)) and outside
    torch.testing.assert_close(pipe.unet(sample, step, **told).sample, wanted, rtol=0, atol=2e-5)
    assert (plain - wanted).abs().max() > 1e-3


# --- noise levels ----------------------------------------------------------------------------------------------------


def test_schedule_has_the_published_levels():
    """Of Stable Diffusion, from betas between .00085 and .012."""
    schedule = schedule_of(get_family(FAMILIES[0]).published_scheduler)
    assert schedule.range == pytest.approx((0.028341, 0.935958), abs=1e-6) and len(schedule.sigmas) == 1000
    steps = schedule.steps(torch.tensor([0.0, 0.25, 0.5, 0.75, 0.9, 1.0]))
    assert steps.tolist() == pytest.approx([0, 96, 354, 674, 915, 999], abs=1)
    every = schedule.steps(torch.tensor(schedule.sigmas, dtype=torch.float64))
    torch.testing.assert_close(every, torch.arange(1000.0), rtol=0, atol=1e-3)
    assert np.array_equal(schedule.at(np.array([0.0, 0.5, 0.9999])), np.array(schedule.sigmas)[[0, 500, 999]])


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_is_told_its_level_whatever_its_dtype(name, dtype, folders):
    family, components = loaded(folders, name)
    denoiser, told = components.denoiser.to(dtype), []
    hook = denoiser.time_proj.register_forward_pre_hook(lambda _, args: told.append(args[0]))
    sigma = torch.tensor([0.0, 0.03, 0.4321, 0.5, 0.93, 0.97, 1.0])
    text = family.encode_text(components, ["a"] * 7, 77)
    family.velocity(components, denoiser, noise(0, 7, 4, 8, 8), sigma, text)
    hook.remove()
    torch.testing.assert_close(told[0].float(), components.schedule.steps(sigma), rtol=0, atol=1e-3)


class Knowing(nn.Module):
    """Predicts what the sample says if the image was ``data``."""

    def __init__(self, components, data: torch.Tensor):
        super().__init__()
        self.data, self.kind = data, components.schedule.prediction
        self.levels = torch.tensor(components.schedule.sigmas, dtype=torch.float64)

    def forward(self, sample, step, **others):
        low = step.long().clamp(max=998)
        share = (step - low).double()
        t = torch.lerp(self.levels[low].logit(), self.levels[low + 1].logit(), share).sigmoid()[:, None, None, None]
        r = torch.hypot(1 - t, t)
        a, b = (1 - t) / r, t / r
        guess = (sample.double() - a * self.data) / b
        return ((a * guess - b * self.data) if self.kind == "v" else guess).to(sample.dtype), None


@pytest.mark.parametrize("name", [*FAMILIES, *(f"{n}-v" for n in FAMILIES)])
def test_the_loss_of_the_true_prediction_is_nothing(name, folders):
    """The sign, the scale and the bridge: also above the levels that the network knows, where it is asked at the highest."""
    family, components = loaded(folders, name)
    sigma = torch.tensor([0.03, 0.1, 0.5, 0.9, 0.95, 1.0])
    data, text = noise(1, 6, 4, 8, 8), family.encode_text(components, ["a"] * 6, 77)
    e = noise(2, 6, 4, 8, 8)
    v = family.velocity(components, Knowing(components, data), interpolate(data, e, sigma), sigma, text)
    assert flow_loss(v, e - data).max() < 1e-6
    wrong = Knowing(components, data + 0.1)
    v = family.velocity(components, wrong, interpolate(data, e, sigma), sigma, text)
    loss = flow_loss(v, e - data)
    torch.testing.assert_close(loss, 0.01 / sigma**2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", [*FAMILIES, *(f"{n}-v" for n in FAMILIES)])
def test_own_loss_is_a_weight_away(name, folders):
    """|velocity error|^2 times ``own_weight`` is the |error|^2 of what the network itself predicts."""
    family, components = loaded(folders, name)
    sigma = torch.tensor(components.schedule.sigmas)[[3, 200, 500, 900, 999]]
    data, e, text = noise(1, 5, 4, 8, 8), noise(2, 5, 4, 8, 8), family.encode_text(components, ["a"] * 5, 77)
    noisy = interpolate(data, e, sigma)
    loss = flow_loss(family.velocity(components, components.denoiser, noisy, sigma, text), e - data)
    x, step = variance_preserving(noisy, sigma), torch.tensor([3, 200, 500, 900, 999])
    added = family.added(text, noisy, 8)
    out = components.denoiser(x, step, encoder_hidden_states=text.tokens.embeds, added_cond_kwargs=added).sample
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(x, scheduler.add_noise(data, e, step), rtol=0, atol=1e-5)
    target = scheduler.get_velocity(data, e, step) if name.endswith("-v") else e
    own = flow_loss(out, target)
    torch.testing.assert_close(own_weight(components.schedule.prediction, sigma) * loss, own, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"prediction_type": "sample"}, "prediction_type 'sample' is not known"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos_cap_v2'"),
        ({"beta_end": 1.5}, "betas from 0.00085 to 1.5"),
    ],
)
def test_schedules_that_are_not_known_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        schedule_of(dict(get_family(FAMILIES[0]).published_scheduler) | settings)


class Latents:
    """Endless latents with captions, framed differently."""

    name, image = "latents", (4, 8, 8)

    def slots(self, seed: int, step: int, batch: int, *, held_out: bool = False) -> list[Slot]:
        return [Slot(str(p), (p,), "a red cat") for p in range(batch)]

    def draw(self, slots: list[Slot]) -> Batch:
        framing = torch.tensor([[64.0 + p, 70.0, 3.0 * p, 1.0, 64.0, 64.0] for (p,) in (slot.index for slot in slots)])
        latents = noise(slots[0].index[0], len(slots), *self.image)
        return Batch(latents, [slot.caption for slot in slots], framing=framing)


def diffusion(family, components, **train) -> tuple[Objective, Model]:
    recipe = recipe_of(
        {
            "run": {"name": "a", "out": "a"},
            "model": {"family": family.spec.name, "path": "a"},
            "data": {"source": "digits", "caption_dropout": 0.0},
            "train": {"objective": "diffusion", "steps": 10, "batch": 8, "lr": 1e-3} | train,
        }
    )
    objective = objective_for(recipe, Latents(), lambda shape: 1.0, components.schedule)
    return objective, Model(family, components, components.denoiser, 77)


@pytest.mark.parametrize("name", [*FAMILIES, *(f"{n}-v" for n in FAMILIES)])
@pytest.mark.parametrize("gamma", [None, 5.0, 0.5])
def test_the_diffusion_objective_is_that_of_diffusers_scripts(name, gamma, folders):
    """Integer steps, noise added by the scheduler, and the mean squared error of what is predicted, weighted by min-SNR."""
    family, components = loaded(folders, name)
    objective, model = diffusion(family, components, min_snr=gamma)
    batch = objective.noisy_batch(2, np.arange(8))
    data, text = noise(0, 8, 4, 8, 8), family.encode_text(components, batch.captions, 77)
    e = batch.target + data
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    step = components.schedule.steps(batch.sigma).round().long()
    x = scheduler.add_noise(data, e, step)
    added = family.added(text, x, 8)
    out = components.denoiser(x, step, encoder_hidden_states=text.tokens.embeds, added_cond_kwargs=added).sample
    wanted = flow_loss(out, scheduler.get_velocity(data, e, step) if name.endswith("-v") else e)
    if gamma:
        snr = compute_snr(scheduler, step)
        wanted = wanted * snr.clamp(max=gamma) / (snr + 1 if name.endswith("-v") else snr)
    torch.testing.assert_close(objective.loss(model, batch), wanted, rtol=2e-3, atol=1e-5)


def test_every_part_of_the_schedule_is_drawn_alike(folders):
    family, components = loaded(folders, FAMILIES[0])
    objective, _ = diffusion(family, components)
    for step in range(3):
        steps = components.schedule.steps(objective.noisy_batch(step, np.arange(8)).sigma)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-2)
        assert sorted((steps // 125).int().tolist()) == list(range(8))


def test_size_and_crop_are_each_images_own(folders):
    """They reach the network as they are, in bf16 too, and stay where the caption is dropped; images are made whole."""
    name = next(n for n in FAMILIES if get_family(n).encoders == 2)
    family, components = loaded(folders, name, null="zeros")
    denoiser, told = components.denoiser.bfloat16(), []
    denoiser.add_time_proj.register_forward_pre_hook(lambda _, args: told.append(args[0].reshape(-1, 6)))
    text = family.encode_text(components, ["a red cat", ""], 77)
    assert not text.tokens.embeds[1].any() and not text.vectors["pooled"][1].any() and text.tokens.embeds[0].any()
    framing = torch.tensor([[1023.0, 517.0, 33.0, 1.0, 64.0, 64.0], [3001.0, 64.0, 0.0, 255.0, 64.0, 64.0]])
    sigma, noisy = torch.tensor([0.5, 0.5]), noise(0, 2, 4, 8, 12)
    own = family.velocity(components, denoiser, noisy, sigma, replace(text, framing=framing))
    whole = family.velocity(components, denoiser, noisy, sigma, text)
    assert torch.equal(told[0], framing) and told[1].tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    assert not torch.equal(own, whole)


# --- diffusers' pipelines --------------------------------------------------------------------------------------------


def guided_by_hand(family, components, prompts, negative, start, steps: int, scale: float, fed=None) -> torch.Tensor:
    """Euler's steps with CFG on the levels of DDIM's; start and result as diffusers has them, of variance 1. fed: to the
    network's own embedding."""
    levels = components.schedule.sigmas
    first = [1 + 1000 // steps * i for i in reversed(range(steps))]
    text, null = (family.encode_text(components, captions, 77) for captions in (prompts, negative))
    r = [(1 - t) ** 2 + t**2 for t in levels]
    z = start * r[first[0]] ** 0.5
    for step in first:
        here, there = levels[step], levels[max(0, step - 1000 // steps)]
        sigma = torch.full((len(start),), here)
        c, u = (family.velocity(components, components.denoiser, z, sigma, t, fed) for t in (text, null))
        z = z + (there - here) * (u + scale * (c - u))
    return z / r[0] ** 0.5


def pipeline(folder: Path, **settings) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, set_alpha_to_one=False, clip_sample=False, steps_offset=1, timestep_spacing="leading"
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", [*FAMILIES, *(f"{n}-v" for n in FAMILIES)])
def test_images_are_the_pipelines_own(name, folders):
    """Text, guidance, noise levels and network: one to the last five digits, of two prompts at once."""
    family, components = loaded(folders, name)
    start, prompts = noise(3, 2, 4, 8, 8), ["a red cat", "the sun"]
    said = {"negative_prompt": ["", ""], "guidance_scale": 3.0, "num_inference_steps": 4, "height": 64, "width": 64}
    theirs = pipeline(folders[name])(prompts, latents=start, output_type="latent", **said).images
    with torch.no_grad():
        ours = guided_by_hand(family, components, prompts, ["", ""], start, 4, 3.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def test_a_null_of_zeros_is_the_pipelines_own(folders):
    """Without a negative prompt SDXL's pipeline leads away from zeros, not from the empty caption."""
    name = next(n for n in FAMILIES if get_family(n).encoders == 2)
    family, components = loaded(folders, name, null="zeros")
    start, said = noise(3, 1, 4, 8, 8), {"guidance_scale": 3.0, "num_inference_steps": 2, "height": 64, "width": 64}
    theirs = pipeline(folders[name])("a red cat", latents=start, output_type="latent", **said).images
    with torch.no_grad():
        ours = guided_by_hand(family, components, ["a red cat"], [""], start, 2, 3.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@every_family
def test_a_fed_scale_is_that_of_diffusers_pipelines(name, folders, tmp_path):
    """Added as zeros it changes nothing; filled and saved, a pipeline feeds its guidance_scale as we do, and makes no second
    call; and each sample has its own."""
    family, plain = loaded(folders, name)
    family, components = loaded(folders, name, guidance=1.0)
    noisy, sigma, text = noise(1, 2, 4, 8, 8), torch.tensor([0.3, 1.0]), family.encode_text(plain, ["a red cat", ""], 77)

    def velocity(components, *fed):
        return family.velocity(components, components.denoiser, noisy, sigma, text, *fed)

    assert components.new_guidance and torch.equal(velocity(components, 7.0), velocity(plain))
    with torch.no_grad():
        layer = components.denoiser.time_embedding.cond_proj.weight
        layer.copy_(0.3 * noise(2, *layer.shape))
    assert layer.shape[1] == 256 and (velocity(components, 7.0) - velocity(plain)).abs().max() > 1e-3
    own = velocity(components, torch.tensor([2.0, 5.0])).detach()
    for i, scale in enumerate((2.0, 5.0)):
        torch.testing.assert_close(own[i], velocity(components, scale)[i], rtol=0, atol=1e-5 * float(own.abs().max()))
    family.save(components, tmp_path / "out")
    again = family.load(spec(tmp_path / "out", guidance=3.0), seed=0)
    assert torch.equal(again.denoiser.time_embedding.cond_proj.weight, layer) and not again.new_guidance
    start, prompts = noise(3, 2, 4, 8, 8), ["a red cat", "the sun"]
    said = {"guidance_scale": 3.0, "num_inference_steps": 4, "height": 64, "width": 64}
    pipe = pipeline(folders[name])
    pipe.register_modules(unet=UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet"))
    theirs = pipe(prompts, latents=start, output_type="latent", **said).images
    with torch.no_grad():
        ours = guided_by_hand(family, again, prompts, prompts, start, 4, 1.0, 3.0)
        fed_by_default = guided_by_hand(family, again, prompts, prompts, start, 4, 1.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
    assert torch.equal(ours, fed_by_default)


@every_family
def test_guidance_distillation_of_a_new_embedding_begins_at_the_base(name, folders):
    """Its loss is what the scale adds to the base, (w - 1)^2 |with - without|^2, and the embedding is what learns it."""
    family, components = loaded(folders, name, guidance=1.0)
    objective, model = diffusion(family, components, objective="guidance", scales=[1.0, 5.0])
    model.frozen = deepcopy(components.denoiser)
    batch = objective.noisy_batch(0, np.arange(8))
    loss = objective.loss(model, batch)
    with torch.no_grad():
        own, null = (model.velocity(batch.noisy, batch.sigma, model.encode(words)) for words in (batch.captions, [""] * 8))
    torch.testing.assert_close(loss, (batch.scales - 1) ** 2 * flow_loss(own, null), rtol=1e-3, atol=1e-6)
    loss.mean().backward()
    assert components.denoiser.time_embedding.cond_proj.weight.grad.abs().max() > 0
    assert loss.max() > 0


@every_family
def test_a_saved_model_is_a_pipeline_of_diffusers(name, folders, tmp_path):
    family, components = loaded(folders, f"{name}-v")
    components.sample_shift = 2.0
    family.save(components, tmp_path / "out")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet").state_dict()
    own = components.denoiser.state_dict()
    assert all(torch.equal(again[n], own[n]) for n in own)
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler").config
    assert scheduler.prediction_type == "v_prediction" and "use_dynamic_shifting" not in scheduler
    assert family.load(spec(tmp_path / "out"), seed=0).schedule == components.schedule


@pytest.mark.parametrize(("name", "prediction"), [("sdxl", "velocity"), ("sd15", "negative_velocity")])
def test_a_flow_network_is_known_by_its_files(name, prediction, folders, tmp_path):
    """Read as a velocity where the recipe says so; saved, loaded as the file says, in a folder and in single files of both
    namings, with the same weights bit for bit; and headers say what it is."""
    family, components = loaded(folders, name, prediction=prediction)
    assert components.schedule is None and components.prediction == prediction
    components.sample_shift = 2.5
    family.save(components, tmp_path / "out")
    facts = json.loads((tmp_path / "out/dedistill.json").read_text())
    assert facts["prediction"] == prediction and "sigma_range" not in facts
    noisy, sigma = noise(1, 2, 4, 8, 8), torch.tensor([0.3, 1.0])
    text = family.encode_text(components, ["a red cat", ""], 77)
    own, state = family.velocity(components, components.denoiser, noisy, sigma, text), components.denoiser.state_dict()
    places = [tmp_path / "out"]
    for format in ("single", "bfl"):
        places.append(export_model(tmp_path / "out", tmp_path / format, format) / f"{format}.safetensors")
        with safe_open(places[-1], "pt") as file:
            said = file.metadata()
        assert said["dedistill.prediction"] == prediction
        assert said["modelspec.prediction_type"] == {"velocity": "flow"}.get(prediction, prediction)
    for place in places:
        again = family.load(spec(place, components=str(folders[name])), seed=0)
        assert again.prediction == prediction and again.schedule is None
        stored = again.denoiser.state_dict()
        assert all(torch.equal(stored[n], state[n]) for n in state)
        assert torch.equal(family.velocity(again, again.denoiser, noisy, sigma, text), own)
    if prediction == "velocity":
        assert family.shift(family.load(spec(tmp_path / "out"), seed=0), 4) == 2.5
        with pytest.raises(UserError, match=r"model\.prediction: 'epsilon' needs the noise levels"):
            family.load(spec(tmp_path / "out", prediction="epsilon"), seed=0)
    noted = family.load(spec(places[0], prediction="velocity"), seed=0).notes
    assert any("model.prediction = 'velocity' here" in note for note in noted) == (prediction != "velocity")


def test_instaflows_published_weights_are_known_by_their_names(folders, tmp_path):
    """Their schedulers say noise, and they predict data - noise; an explicit key, and what we wrote, come first."""
    for name, prediction in (("instaflow_0_9B_from_sd_1_5", "negative_velocity"), ("sd-1-5-mine", "epsilon")):
        (tmp_path / name).symlink_to(folders["sd15"])
        family = get_family("sd15")
        assert family.load(spec(tmp_path / name), seed=0).prediction == prediction
        assert family.load(spec(tmp_path / name, prediction="velocity"), seed=0).prediction == "velocity"
    assert licence_for(published(family.spec, "XCLiu/2_rectified_flow_from_sd_1_5", {}), None).id == "cc-by-nc-4.0"


def test_a_folder_of_diffusers_for_flow_is_read_as_one(folders, tmp_path):
    """By its scheduler, without any file of ours; and its pipeline samples as we do, solver and all, but for times that it
    rounds to whole numbers."""
    family, components = loaded(folders, "sd15", prediction="velocity")
    components.sample_shift = 2.0
    family.save(components, tmp_path / "saved")
    export_model(tmp_path / "saved", tmp_path / "flow", "diffusers")
    (tmp_path / "flow/dedistill.json").unlink()
    components = family.load(spec(tmp_path / "flow"), seed=0)
    assert (components.prediction, components.schedule, family.shift(components, 4)) == ("velocity", None, 2.0)
    pipe, start = DiffusionPipeline.from_pretrained(tmp_path / "flow"), noise(3, 2, 4, 8, 8)
    pipe.set_progress_bar_config(disable=True)
    said = {"guidance_scale": 1.0, "num_inference_steps": 4, "height": 64, "width": 64}
    theirs = pipe(["a red cat", "the sun"], latents=start, output_type="latent", **said).images
    text = family.encode_text(components, ["a red cat", "the sun"], 77)

    def velocity(noisy: torch.Tensor, sigma: float, i: int) -> torch.Tensor:
        return family.velocity(components, components.denoiser, noisy, torch.full((2,), sigma), text)

    with torch.no_grad():
        *_, ours = solve("dpmpp_2m", velocity, start, pipe.scheduler.sigmas.double().numpy())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3 * float(theirs.abs().max()))


@every_family
def test_checkpointing_changes_no_bit(name, folders):
    """The convolutions between the blocks are computed again as well."""

    def gradients(again: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        family, components = loaded(folders, name)
        denoiser = components.denoiser
        if again:
            assert checkpoint_blocks(denoiser, family.blocks(denoiser), True) == len(family.blocks(denoiser))
        calls: list[nn.Module] = []
        for module in denoiser.modules():
            if isinstance(module, BasicTransformerBlock | ResnetBlock2D):
                module.register_forward_pre_hook(lambda module, args: calls.append(module))
        text = family.encode_text(components, ["a red cat", "the sun"], 77)
        v = family.velocity(components, denoiser, noise(5, 2, 4, 8, 8), torch.tensor([0.3, 0.99]), text)
        once = len(calls)
        v.square().mean().backward()
        # the first block of the middle is the one that diffusers never computes again
        assert len(calls) == (2 * once - 1 if again else once) and once > len(family.blocks(denoiser))
        return v.detach(), [p.grad for p in denoiser.parameters()]

    (plain, slopes), (other, others) = gradients(False), gradients(True)
    assert torch.equal(plain, other) and all(torch.equal(a, b) for a, b in zip(slopes, others, strict=True))


# --- what is refused -------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask": "bool"}, "model.mask: .* was trained with the padding"),
        ({"text_length": 64}, "model.text_length: .* always has 77 tokens"),
        ({"guidance": "bypass"}, "model.guidance: .bypass. has no effect"),
        ({"path": None}, "model.path: this family starts from trained weights"),
    ],
)
def test_settings_that_it_cannot_have_are_refused(name, changes, said, folders):
    with pytest.raises(UserError, match=said):
        get_family(name).load(spec(folders[name], **changes), seed=0)


def test_the_refiner_is_refused(folders, tmp_path):
    """By what its model_index.json says, whatever its networks' sizes are."""
    shutil.copytree(folders["sdxl"], tmp_path / "refiner")
    index = tmp_path / "refiner" / "model_index.json"
    found = json.loads(index.read_text()) | {"requires_aesthetics_score": True, "text_encoder": [None, None]}
    index.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"model\.path: .*refiner' is a refiner: it is told an aesthetic score"):
        get_family("sdxl").load(spec(tmp_path / "refiner"), seed=0, denoiser=False)


@every_family
def test_other_tasks_and_folders_are_refused(name, folders, tmp_path):
    family = get_family(name)
    config = dict(UNet2DConditionModel.load_config(folders[name] / "unet")) | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="takes 9 channels and gives 4, and the VAE has 4: it was made for another task"):
        family.load(spec(tmp_path, components=str(folders[name])), seed=0)
    for other in set(FAMILIES) - {name}:  # a single file tells no family: the folder beside it does
        file = next((folders[name] / "unet").glob("*.safetensors"))
        with pytest.raises(UserError, match=rf"is no network of {name}: its config.json has addition_embed_type"):
            family.load(spec(file, components=str(folders[other])), seed=0)
        assert get_spec(name).has(config) and not get_spec(other).has(config)
