"""What SD3.5 alone has: three encoders of which any may be absent, padding that is seen, places for so many pixels."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny_recipes import IMAGES

from dedistill.adapters.targets import matching
from dedistill.data.encode import open_data
from dedistill.errors import UserError
from dedistill.models.conditioning import Conditioning, Tokens
from dedistill.models.registry import get_family, get_spec, published
from dedistill.models.sd3.family import Sd3
from dedistill.models.sd3.published import LARGE, MEDIUM, TURBO, full_config
from dedistill.models.sd3.tiny import write_tiny_sd3
from dedistill.recipe import load_recipe
from dedistill.recipe.model_tables import Model

FAMILY = get_family("sd3")
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
CAPTION = "one red cat"
LENGTH = 12


def model(folder: Path, **changes) -> Model:
    plain = {"family": "sd3", "path": str(folder), "mask": "none", "t5_mask": False, "text_length": LENGTH}
    return Model(**(plain | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sd3") / "model"
    write_tiny_sd3(place)
    return place


@pytest.fixture
def components(folder):
    return FAMILY.load(model(folder), seed=0)


def velocity(components, text, noisy=None, sigma=0.5):
    noisy = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0)) if noisy is None else noisy
    return FAMILY.velocity(components, components.denoiser, noisy, torch.full((len(noisy),), sigma), text).detach()


def pipeline(folder: Path, **parts) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- sizes of the published models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "parameters", "linears", "modulation"),
    [(MEDIUM, 2_243_171_520, 392, 0.339), (LARGE, 8_056_627_520, 536, 0.331), (TURBO, 8_056_627_520, 536, 0.331)],
    ids=lambda value: value.id if hasattr(value, "id") else None,
)
def test_published_sizes(base, parameters, linears, modulation):
    """Parameters, linears and what share of them presets have, at full size."""
    with torch.device("meta"):
        net = SD3Transformer2DModel.from_config(full_config(base.id, False))
    assert sum(p.numel() for p in net.parameters()) == parameters
    names = {name: m for name, m in net.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(names) == linears
    sets = {
        preset: {name for pattern in patterns for name in matching(pattern, list(names))}
        for preset, patterns in FAMILY.presets(net).items()
    }
    weights = {preset: sum(names[n].weight.numel() for n in found) for preset, found in sets.items()}
    assert weights["modulation"] / parameters == pytest.approx(modulation, abs=1e-3)
    last, dual, dim = len(net.transformer_blocks) - 1, len(net.config.dual_attention_layers), net.inner_dim
    # q, k, v and the output of both streams, once more of the image in dual blocks; the last block reads no text
    assert weights["attention"] == (8 * (last + 1) + 4 * dual - 2) * dim**2
    inside = {name for name in names if name.startswith("transformer_blocks.")}
    assert sets["blocks"] == inside - {f"transformer_blocks.{last}.attn.add_q_proj"}


@pytest.mark.parametrize(
    ("source", "config", "base"),
    [
        ("stabilityai/stable-diffusion-3.5-large-turbo", {}, TURBO),
        ("models/sd3.5_large_turbo.safetensors", {}, TURBO),
        ("models/sd3.5_medium.safetensors", {}, MEDIUM),
        ("mine", {"num_attention_heads": 38}, LARGE),
        ("mine", {"num_attention_heads": 24}, MEDIUM),
        ("mine", {"num_attention_heads": 2}, None),
    ],
)
def test_what_a_model_goes_back_to(source, config, base):
    """By name, in either spelling, else by the shape: a derivative without a name keeps the licence."""
    assert published(get_spec("sd3"), source, config) == base
    assert base is None or base.licence.binding


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [(), ("text_encoder_3",)], ids=["three encoders", "no T5"])
def test_captions_are_those_of_diffusers_pipeline(tmp_path, absent):
    """Whose own way without T5 is zeros."""
    write_tiny_sd3(tmp_path, without=absent)
    components = FAMILY.load(model(tmp_path), seed=0)
    text = FAMILY.encode_text(components, [CAPTION, ""], LENGTH)
    pipe = pipeline(
        tmp_path, **{name.replace("text_encoder", part): None for name in absent for part in ("text_encoder", "tokenizer")}
    )
    with torch.no_grad():
        embeds, empty, pooled, empty_pooled = pipe.encode_prompt(CAPTION, None, None, max_sequence_length=LENGTH)
    seen = {}
    components.denoiser.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    velocity(components, text, torch.randn(2, 16, 4, 6))
    for found, wanted in (
        (seen["encoder_hidden_states"], torch.cat([embeds, empty])),
        (seen["pooled_projections"], torch.cat([pooled, empty_pooled])),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "absent", [ENCODERS[:1], ENCODERS[1:2], ENCODERS[2:], ENCODERS[:2], ENCODERS[1:]], ids=lambda a: " ".join(a)
)
def test_absent_encoders_are_zeros_and_said(tmp_path, folder, absent):
    """The same captions as with all encoders, zero where the absent ones stood; from what is stored no zeros are kept."""
    write_tiny_sd3(tmp_path / "less", without=absent)
    less, whole = (FAMILY.load(model(place), seed=0) for place in (tmp_path / "less", folder))
    assert len(less.notes) == 1 and all(name in less.notes[0] for name in absent) and not whole.notes
    seen = []
    for components in (less, whole):
        components.denoiser.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
        text = FAMILY.encode_text(components, [CAPTION], LENGTH)
        assert text.tensors()["embeds"].shape[2] == components.text.widths.sequences[0]
        velocity(components, text)
    columns = {"text_encoder": slice(0, 12), "text_encoder_2": slice(12, 28)}
    expected, pooled = seen[1]["encoder_hidden_states"].clone(), seen[1]["pooled_projections"].clone()
    for name in absent:
        if name in columns:
            expected[:, :77, columns[name]] = 0
            pooled[:, columns[name]] = 0
        else:
            expected[:, 77:] = 0
    assert torch.equal(seen[0]["encoder_hidden_states"], expected) and torch.equal(seen[0]["pooled_projections"], pooled)
    stored = FAMILY.encode_text(less, [CAPTION], LENGTH).sequences
    gone = [absent == ENCODERS[2:] or absent == ENCODERS[1:], absent == ENCODERS[:2]]
    assert [s.mask.shape[1] == 0 for s in stored] == gone


def test_an_encoder_that_was_not_fetched_is_not_absent(tmp_path, folder):
    """What model_index.json names has to be there; a folder that says otherwise is taken at its word."""
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder_3")
    with pytest.raises(UserError, match=r"no folder 'text_encoder_3', which its model_index.json names"):
        FAMILY.load(model(tmp_path / "model"), seed=0)
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder_3": [None, None]}))
    assert FAMILY.load(model(tmp_path / "model"), seed=0).text.absent() == ["text_encoder_3"]
    for name in ENCODERS:
        shutil.rmtree(tmp_path / "model" / name, ignore_errors=True)
    index.unlink()
    with pytest.raises(UserError, match="has no text encoder"):
        FAMILY.load(model(tmp_path / "model"), seed=0)


def test_padding_takes_part(components):
    """diffusers' attention is given a mask and does not look at it; so none is promised, and no caption comes without its
    padding: what stands there changes the image, and what is cut off is refused."""
    text = FAMILY.encode_text(components, ["sun"], LENGTH)
    assert [int(s.mask.sum()) for s in text.sequences] == [2, 5]
    for i, sequence in enumerate(text.sequences):
        other = torch.where(sequence.mask[..., None], sequence.embeds, sequence.embeds + 1)
        changed = [*text.sequences]
        changed[i] = Tokens(other, sequence.mask)
        difference = velocity(components, Conditioning(tuple(changed), text.vectors)) - velocity(components, text)
        assert difference.abs().max() > 1e-3
    with pytest.raises(ValueError, match="tokens; this network takes"):
        velocity(components, text.trimmed())
    mask = torch.zeros(1, 1, 1, 6 + 77 + LENGTH, dtype=torch.bool)
    joint = torch.randn(1, 77 + LENGTH, 32)
    call = lambda **more: components.denoiser(torch.ones(1, 16, 4, 6), joint, torch.ones(1, 28), torch.ones(1), **more).sample  # noqa: E731
    assert torch.equal(call(), call(joint_attention_kwargs={"attention_mask": mask}))


@pytest.mark.parametrize(
    ("key", "value"), [("mask", "bool"), ("mask", "libreflux"), ("t5_mask", True), ("guidance", 1.0), ("guidance", "bypass")]
)
def test_settings_without_an_effect_are_refused(folder, key, value):
    for load in (lambda m: FAMILY.load(m, seed=0, denoiser=False), FAMILY.full_size):
        with pytest.raises(UserError, match=rf"^model\.{key}: ") as error:
            load(model(folder, **{key: value}))
        assert error.value.exit_code == 2


# --- sizes and noise levels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "told"), [(400, 64, "384 pixels a side"), (64, 400, "384 pixels"), (40, 64, "multiples of 16")]
)
def test_sizes_that_it_cannot_have(folder, height, width, told):
    """The table of positions has 24 patches of 16 pixels, also where the denoiser is not loaded."""
    for components in (FAMILY.load(model(folder), seed=0, denoiser=False), FAMILY.full_size(model(folder))):
        assert FAMILY.latent_shape(components, 384, 64) == (16, 48, 8)
        with pytest.raises(UserError, match=told):
            FAMILY.latent_shape(components, height, width)


@pytest.mark.parametrize(("base", "side"), [(MEDIUM, 6144), (LARGE, 3072)])
def test_published_sizes_in_pixels(base, side):
    components = FAMILY.full_size(model(Path(base.id)))
    assert FAMILY.latent_shape(components, side, 1024)[1] == side // 8
    with pytest.raises(UserError, match=f"{side} pixels"):
        FAMILY.latent_shape(components, side + 16, 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_told_noise_level(components, dtype):
    """1000 sigma where the sinusoid is made of it, also in bf16."""
    components.denoiser.to(dtype)
    seen = []
    components.denoiser.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    text = FAMILY.encode_text(components, [CAPTION], LENGTH)
    for sigma in (0.0011, 0.5009, 0.98765):
        velocity(components, text, sigma=sigma)
        assert abs(float(seen[-1]) - 1000 * sigma) < 1e-3


def test_oracle_has_no_loss(components):
    """A network that knows the data: what it predicts is noise - data, with no sign or factor of ours in between."""
    data, noise = torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6)
    noisy = 0.7 * data + 0.3 * noise

    def oracle(hidden_states, **given):
        return ((hidden_states - data) / (given["timestep"] / 1000)[:, None, None, None],)

    text = FAMILY.encode_text(components, [CAPTION, ""], LENGTH)
    found = Sd3().velocity(components, oracle, noisy, torch.full((2,), 0.3), text)
    torch.testing.assert_close(found, noise - data, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("resolution", "crops", "told"), [(512, "square", "512 x 512"), (320, "random_aspect", "384 pixels")])
def test_crops_that_have_no_places_are_refused_before_anything_is_encoded(tmp_path, folder, photos, resolution, crops, told):
    """Of the images that there are; those that have places are not asked about others."""
    recipe = tmp_path / "a.toml"
    text = IMAGES.format(out=tmp_path, base=folder, images=photos, cache=tmp_path / "cache").replace('"flux"', '"sd3"')
    recipe.write_text(
        text.replace("resolutions = [64]", f'resolutions = [{resolution}]\ncrops = ["{crops}"]\nmax_upscale = 99')
    )
    with pytest.raises(UserError, match=rf"a\.toml:\d+: data\.resolutions: .*{told}"):
        open_data(load_recipe(recipe), "cpu", print)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
