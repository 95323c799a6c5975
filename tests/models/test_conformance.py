"""What every family must do, on its own tiny network; facts of single families at the end."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dedistill.adapters.targets import adaptable, matching
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.flow.guidance import CONDITIONAL
from dedistill.models.blocks import checkpoint_blocks, without_blocks
from dedistill.models.conditioning import Conditioning, Tokens, collate
from dedistill.models.example.family import Example
from dedistill.models.flux.network import attention_mask, patchify, unpatchify
from dedistill.models.flux.tiny import write_tiny_flux
from dedistill.models.model import Model
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.registry import families, get_family
from dedistill.models.sd3.tiny import write_tiny_sd3
from dedistill.models.unet.tiny import write_tiny_unet
from dedistill.objectives.features import seen
from dedistill.recipe import load_recipe
from dedistill.sampling.inversion import Inversion, edit, encoded, state_of
from dedistill.sampling.sampler import Sampling, start_noise

CAPTIONS = ["sun", "one red cat", "the dog and the tree with hat"]  # 2, 4 and 8 tokens with the end
LENGTH = 12
TOLERANCE = {"rtol": 0, "atol": 1e-5}
MNIST = Path(__file__).parents[2] / "dedistill" / "recipes" / "mnist_flux.toml"


@pytest.fixture(params=families())
def family(request):
    return get_family(request.param)


def spec(folder: Path, **changes) -> SimpleNamespace:
    """A recipe's [model] table."""
    plain = {"path": str(folder), "new": None, "revision": None, "components": None, "guidance": None, "text_length": 12}
    return SimpleNamespace(**(plain | {"mask": "bool", "t5_mask": True, "null": None, "image_prompts": None} | changes))


def tiny_pixel_flux(seed: int, folder: Path):
    return PixelFlux().tiny(seed)


def tiny_flux(seed: int, folder: Path):
    write_tiny_flux(folder, seed=seed)
    components = get_family("flux").load(spec(folder), seed=0)
    components.sample_shape = (16, 4, 6)
    return components


def tiny_example(seed: int, folder: Path):
    return Example().tiny(seed)


UNET = {"mask": "none", "text_length": 77, "null": "empty", "prediction": "auto", "t5_mask": False}


def tiny_unet(name: str, seed: int, folder: Path):
    family = get_family(name)
    write_tiny_unet(folder, family.published_config(""), seed=seed)
    components = family.load(spec(folder, **UNET), seed=0)
    components.sample_shape = (4, 8, 12)
    return components


SD3 = {"mask": "none", "t5_mask": False}


def tiny_sd3(seed: int, folder: Path):
    write_tiny_sd3(folder, seed=seed)
    components = get_family("sd3").load(spec(folder, **SD3), seed=0)
    components.sample_shape = (16, 4, 6)
    return components


TINY = {"pixel_flux": tiny_pixel_flux, "flux": tiny_flux, "sd3": tiny_sd3, "example": tiny_example}
TINY |= {name: partial(tiny_unet, name) for name in ("sd15", "sdxl")}
MASKABLE = {"flux", "pixel_flux"}
"""Families whose recipes may show padding to the network."""
UNMASKED = {"sd15", "sdxl", "sd3"}
"""Families whose networks always see it."""
BEGINS = {"sd15": 1, "sdxl": 1}
"""Tokens before the first of a caption."""
SETTINGS = {"sd15": UNET, "sdxl": UNET, "sd3": SD3}
"""Keys of a recipe that a family has only one value of."""


@pytest.fixture
def components(family, tiny_model):
    return tiny_model(family.spec.name)


@pytest.fixture
def noisy(components):
    return keyed.noise(0, "test", 0, range(3), components.sample_shape)


SIGMA = torch.tensor([0.05, 0.5, 1.0])


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To float32's rounding, which grows with the numbers: a network of noise is divided by how little is left of the image."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.detach().abs().max())))


def velocity(family, components, noisy, sigma=SIGMA, captions=CAPTIONS, length=LENGTH, text=None):
    if text is None:
        components.text_length, text = length, family.encode_text(components, captions, length)
    return family.velocity(components, components.denoiser, noisy, sigma, text)


def linears(denoiser: nn.Module) -> list[str]:
    return [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]


def flux_directly(components, noisy, sigma, embeds, pooled, mask=None):
    """diffusers' own call, with the packing of its FLUX pipeline: tokens row by row, ids (0, row, column)."""
    b, c, h, w = noisy.shape
    p = round((components.denoiser.config.in_channels / c) ** 0.5)
    tokens = noisy.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * p * p)
    ids = torch.tensor([[0.0, row, column] for row in range(h // p) for column in range(w // p)])
    extra = {} if mask is None else {"joint_attention_kwargs": {"attention_mask": mask}}
    out = components.denoiser(
        hidden_states=tokens,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        timestep=sigma,
        img_ids=ids,
        txt_ids=torch.zeros(embeds.shape[1], 3),
        **extra,
    ).sample
    return out.view(b, h // p, w // p, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def flux_of_text(components, noisy, sigma, text):
    return flux_directly(components, noisy, sigma, text.tokens.embeds, text.vectors["pooled"])


def sd3_directly(components, noisy, sigma, text):
    """diffusers' own call: CLIP's tokens, filled up to the width of T5's, before those, and a thousandfold sigma."""
    t5, clip = (s.embeds for s in text.sequences)
    joint = torch.cat([torch.cat([clip, torch.zeros(*clip.shape[:2], t5.shape[2] - clip.shape[2])], 2), t5], 1)
    return components.denoiser(noisy, joint, text.vectors["pooled"], 1000 * sigma).sample


def example_directly(components, noisy, sigma, text):
    """noise - data by hand from the noise that the network predicts, asked at .9 where there is nothing but noise."""
    t = sigma.clamp(max=0.9)
    noise = components.denoiser(noisy, t, [s.embeds for s in text.sequences], [s.mask for s in text.sequences]).double()
    t, sigma = t.double()[:, None, None, None], sigma.double()[:, None, None, None]
    return ((noisy - (noisy - t * noise) / (1 - t)) / sigma).float()


def unet_directly(components, noisy, sigma, text, **added):
    """diffusers' own call of its network, on its own levels of noise: k = sigma / (1 - sigma), scaled to variance 1; above the
    last level, the direction of the data that are seen at it. By hand, in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    levels = ((1 - kept) / kept).sqrt()
    t = sigma.double()
    k = (t / (1 - t)).clamp(levels[0], levels[-1])
    step = torch.from_numpy(np.interp(k.log(), levels.log(), np.arange(1000)))
    x = noisy.double() / torch.hypot(1 - t, t)[:, None, None, None]
    noise = components.denoiser(x.float(), step.float(), text.tokens.embeds, added_cond_kwargs=added or None).sample.double()
    if t <= k / (1 + k):
        return ((noise - noisy) / (1 - t)).float()
    data = (x - k / torch.hypot(k, torch.ones(1)) * noise) * torch.hypot(k, torch.ones(1))
    return ((noisy - data) / t).float()


def sdxl_directly(components, noisy, sigma, text):
    """As its pipeline tells it of an image of that size that is not cut."""
    height, width = 8 * noisy.shape[2], 8 * noisy.shape[3]
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    return unet_directly(components, noisy, sigma, text, text_embeds=text.vectors["pooled"], time_ids=ids)


DIRECT = {
    "pixel_flux": flux_of_text,
    "flux": flux_of_text,
    "sd3": sd3_directly,
    "example": example_directly,
    "sd15": unet_directly,
    "sdxl": sdxl_directly,
}
"""A new family brings its library's own call. Captions come without padding."""


def test_velocity_has_the_shape_of_the_image(family, components, noisy):
    v = velocity(family, components, noisy)
    assert v.shape == noisy.shape == (3, *components.sample_shape) and v.dtype == torch.float32
    assert v.isfinite().all() and v.std() > 0.1


def test_velocity_equals_the_librarys_own_call(family, components, noisy):
    """Sigma in, no factor of 1000, no sign: what the library predicts for timestep sigma (t = .5 among them)."""
    for i, caption in enumerate(CAPTIONS):
        text = family.encode_text(components, [caption], LENGTH)
        text = text if family.spec.name in UNMASKED else text.trimmed()
        direct = DIRECT[family.spec.name](components, noisy[i : i + 1], SIGMA[i : i + 1], text)
        assert_same(velocity(family, components, noisy)[i : i + 1], direct)


def test_no_module_is_called_outside_the_networks_own_pass(family, components, noisy):
    """Nor for an image of a new size, which of several processes one may see alone: under ZeRO-3 each waits for the others."""
    network, outside, inside = components.denoiser, [], []
    for module in network.modules():
        module.register_forward_pre_hook(lambda called, _: None if inside or called is network else outside.append(called))
    network.register_forward_pre_hook(lambda *_: inside.append(True))
    network.register_forward_hook(lambda *_: inside.clear())
    for samples in (noisy, noisy.repeat(1, 1, 2, 1), noisy):
        velocity(family, components, samples)
    assert not outside


def test_an_image_becomes_noise_and_comes_back(family, components):
    """Held fully it does, to rounding; halfway, from pure data to pure noise, every number is finite."""
    model = Model(family, components, components.denoiser, LENGTH)
    height, width = model.decode(torch.zeros(1, *components.sample_shape)).shape[2:]
    pixels = torch.linspace(-1, 1, 3 * height * width).reshape(1, 3, height, width)
    latents, texts = encoded(model, pixels), {CONDITIONAL: model.encode(["one red cat"])}
    assert latents.shape == (1, *components.sample_shape)
    noise, sampling = start_noise(5, 1, components.sample_shape), Sampling(steps=3)
    straight = Inversion(gamma=1, stop=1, seed=5)
    torch.testing.assert_close(state_of(model, latents, 3, straight), noise, **TOLERANCE)
    torch.testing.assert_close(edit(model, texts, noise, latents, sampling, straight, 1.0), latents, **TOLERANCE)
    for null in ("empty", "zeros"):
        halfway = state_of(model, latents, 3, Inversion(seed=5, null=null))
        assert halfway.isfinite().all() and not torch.allclose(halfway, noise, atol=1e-2)


def test_every_input_matters(family, components, noisy):
    v = velocity(family, components, noisy)
    others = [
        velocity(family, components, noisy.flip(3)),
        velocity(family, components, noisy, sigma=SIGMA - 0.04),
        velocity(family, components, noisy, captions=["moon", "one red dog", "the cat and the tree with hat"]),
        velocity(family, components, noisy, captions=["sun", "red one cat", "the tree and the dog with hat"])[
            1:
        ],  # order alone
    ]
    for other in others:
        assert (other - v[-len(other) :]).abs().amax((1, 2, 3)).min() > 1e-3


LOW = [SIGMA.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int64)]
OUTSIDE = [[0.0, 0.5, 1000.0], [1.001] * 3, [-0.01, 0.5, 0.5], [0.5, torch.nan, 0.5]]


@pytest.mark.parametrize("sigma", [*map(torch.tensor, OUTSIDE), *LOW], ids=str)
def test_sigma_out_of_range_raises(family, components, noisy, sigma):
    """Sigma and 1000 sigma are not both accepted, nor a sigma that bf16 has moved by up to .002."""
    model, text = Model(family, components, components.denoiser, LENGTH), family.encode_text(components, CAPTIONS, LENGTH)
    with pytest.raises(ValueError, match=r"sigma must be float32 in \[0, 1\]"):
        model.velocity(noisy, sigma, text)


def test_bf16_arithmetic_keeps_sigma(family, components, noisy):
    """.5 and .5009 are one number in bf16; as timesteps 500 and 500.9 the network must tell them apart."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        here, there = (velocity(family, components, noisy, sigma=torch.full((3,), s)) for s in (0.5, 0.5009))
    assert not torch.equal(here, there)


def test_gradient_reaches_every_linear_of_the_blocks(family, components, noisy):
    denoiser = components.denoiser
    velocity(family, components, noisy).square().mean().backward()
    names = {name for pattern in family.presets(denoiser)["blocks"] for name in matching(pattern, linears(denoiser))}
    inside = {id(m) for block in family.blocks(denoiser) for m in block.modules() if isinstance(m, nn.Linear)}
    unread = {"transformer_blocks.2.attn.add_q_proj"} if family.spec.name == "sd3" else set()
    assert names == {name for name in linears(denoiser) if id(denoiser.get_submodule(name)) in inside} - unread and names
    for name in unread:
        assert denoiser.get_submodule(name).weight.grad.abs().max() == 0, name
    for name in names:
        gradient = denoiser.get_submodule(name).weight.grad
        assert gradient is not None and gradient.abs().max() > 1e-8, name


def test_checkpointing_changes_no_bit(family, components, noisy):
    """Of captions of several lengths, and so with a mask where the family has one: the velocity and every gradient."""
    denoiser, found = components.denoiser.train(), []
    for again in (False, True):
        assert bool(checkpoint_blocks(denoiser, family.blocks(denoiser), again)) == again
        v = velocity(family, components, noisy)
        found.append([v, *torch.autograd.grad(v.square().mean(), [*denoiser.parameters()], allow_unused=True)])
    for plain, other in zip(*found, strict=True):
        assert plain is other is None or torch.equal(plain, other)


def test_blocks_say_the_same_where_they_are_checkpointed(family, components, noisy):
    """Their states, which an objective asks for in training; libraries then call them in another way."""
    model, found = Model(family, components, components.denoiser.train(), LENGTH), []
    text, blocks = model.encode(CAPTIONS), family.blocks(components.denoiser)
    for again in (False, True):
        checkpoint_blocks(components.denoiser, blocks, again)
        with seen(model, text) as states:
            model.velocity(noisy, SIGMA, text)
        found.append(states)
    assert len(found[0]) == len(blocks) and all(map(torch.equal, *found))


def test_masked_is_dropped(family, components, noisy):
    """In a batch of captions of different lengths, each row is as if its padding had never been there."""
    together = velocity(family, components, noisy)
    for i, caption in enumerate(CAPTIONS):
        words = int(family.encode_text(components, [caption], LENGTH).sequences[0].mask.sum())
        alone = velocity(family, components, noisy[i : i + 1], SIGMA[i : i + 1], [caption], length=words)
        if family.spec.name in UNMASKED and words < LENGTH:
            assert (together[i : i + 1] - alone).abs().max() > 1e-3
        else:
            assert_same(together[i : i + 1], alone)


@pytest.mark.parametrize("length", [8, 24, 48])
def test_length_of_the_padding(family, components, noisy, length):
    """With the mask, 8, 12, 24 and 48 tokens are one prompt; without, padding takes part."""
    if family.spec.name not in UNMASKED:
        assert_same(velocity(family, components, noisy, length=length), velocity(family, components, noisy))
    if family.spec.name not in MASKABLE | UNMASKED:
        return
    components.mask = "none"
    difference = velocity(family, components, noisy, length=length) - velocity(family, components, noisy)
    assert difference.abs().amax((1, 2, 3)).min() > 1e-3


def test_what_stands_in_the_padding_changes_nothing(family, components, noisy):
    """Exactly nothing; without the mask, a lot."""
    text = family.encode_text(components, CAPTIONS, LENGTH)
    other = Conditioning(
        tuple(Tokens(torch.where(s.mask[..., None], s.embeds, 100 * s.embeds.flip(1) - 7), s.mask) for s in text.sequences),
        text.vectors,
    )
    assert not torch.equal(other.sequences[0].embeds, text.sequences[0].embeds)
    if family.spec.name not in UNMASKED:
        assert torch.equal(velocity(family, components, noisy, text=other), velocity(family, components, noisy, text=text))
    if family.spec.name not in MASKABLE | UNMASKED:
        return
    components.mask = "none"
    difference = velocity(family, components, noisy, text=other) - velocity(family, components, noisy, text=text)
    padded = ~text.sequences[0].mask.all(1)
    assert padded.sum() > 1 and difference.abs().amax((1, 2, 3))[padded].min() > 1e-3


def test_a_block_left_out_changes_nothing(family, components, noisy):
    """What ``unchanged`` says of every block's arguments is, as ``states`` reads it, what came in; the velocity needs them."""
    text, blocks, seen = family.encode_text(components, CAPTIONS, LENGTH), family.blocks(components.denoiser), []

    def compare(block, args, kwargs, output):
        nothing = family.unchanged(args, kwargs)
        assert type(nothing) is type(output)
        seen.extend((before, after) for before, after, _ in family.states(args, kwargs, nothing, text).values())

    hooks = [block.register_forward_hook(compare, with_kwargs=True) for block in blocks]
    whole = velocity(family, components, noisy, text=text)
    assert len(seen) >= len(blocks) and all(torch.equal(*pair) for pair in seen)
    for hook in hooks:
        hook.remove()
    for number in range(len(blocks)):
        with without_blocks(blocks, [number], family.unchanged):
            assert not torch.allclose(velocity(family, components, noisy, text=text), whole, atol=1e-6)
    assert torch.equal(velocity(family, components, noisy, text=text), whole)


def permuted(sequence: Tokens, order: torch.Tensor) -> Tokens:
    return Tokens(sequence.embeds[:, order], sequence.mask[:, order])


def test_order_of_text_tokens_is_only_in_their_embeddings(family, components, noisy):
    """Text has no positions in the network, so any permutation of the tokens and their mask gives the same image."""
    components.mask, text = "none", family.encode_text(components, CAPTIONS, LENGTH)
    orders = [torch.arange(s.mask.shape[1]).roll(5).flip(0) for s in text.sequences]
    turned = Conditioning(tuple(permuted(s, order) for s, order in zip(text.sequences, orders)), text.vectors)
    v = velocity(family, components, noisy, text=text)
    assert_same(velocity(family, components, noisy, text=turned), v)


def test_empty_caption_has_one_real_token(family, components):
    """Beside what begins every caption. And a caption cut short keeps its end token."""
    one = 1 + BEGINS.get(family.spec.name, 0)
    text = family.encode_text(components, ["", "a b c d e f g h i j k l m n"], LENGTH)
    assert text.sequences[0].mask.dtype == torch.bool and text.sequences[0].mask.sum(1).tolist() == [one, LENGTH]
    assert torch.equal(text.sequences[0].mask[0], torch.arange(LENGTH) < one)
    last = family.encode_text(components, ["a b c d e f g h i j k"], LENGTH)
    assert torch.equal(text.sequences[0].embeds[1, -1], last.sequences[0].embeds[0, -1])


def test_dropped_captions_are_the_empty_prompt(family, components, noisy):
    """Tokens, mask and pooled vector together, and the same velocity as asking for the empty caption."""
    said = [CAPTIONS[0], "", CAPTIONS[2]]
    alone = [family.encode_text(components, [caption], LENGTH) for caption in said]
    ready = collate(alone if family.spec.name in UNMASKED else [text.trimmed() for text in alone])
    asked = velocity(family, components, noisy, captions=said)
    assert_same(velocity(family, components, noisy, text=ready), asked)


def test_text_of_a_batch_is_the_text_of_its_captions(family, components):
    text = family.encode_text(components, CAPTIONS, LENGTH)
    for i, caption in enumerate(CAPTIONS):
        alone, row = family.encode_text(components, [caption], LENGTH), text.index_select(slice(i, i + 1))
        for one, other in zip(alone.sequences, row.sequences):
            assert torch.equal(one.embeds, other.embeds) and torch.equal(one.mask, other.mask)
        for name, vector in row.vectors.items():  # a product of a single row is rounded otherwise
            torch.testing.assert_close(alone.vectors[name], vector, rtol=0, atol=1e-6)


def test_saved_and_loaded_gives_the_same_velocity(family, components, noisy, tmp_path):
    """To the last bit, whatever seed the second load is given."""
    components.mask = "none" if family.spec.name in MASKABLE | UNMASKED else "bool"
    family.save(components, tmp_path / "saved")
    settings = {"mask": components.mask} | SETTINGS.get(family.spec.name, {})
    again = family.load(spec(tmp_path / "saved", **settings), seed=5)
    assert again.mask == components.mask
    assert torch.equal(velocity(family, again, noisy), velocity(family, components, noisy))


def test_a_folder_that_calls_its_shape_as_it_was_called_before_is_read(tmp_path):
    family = PixelFlux()
    family.save(family.tiny(0), tmp_path)
    file = tmp_path / "dedistill.json"
    facts = json.loads(file.read_text())
    assert facts["sample_shape"] == list(family.load(spec(tmp_path), seed=0).sample_shape)
    file.write_text(json.dumps(facts | {"picture": facts.pop("sample_shape")}))
    loaded = family.load(spec(tmp_path), seed=0)
    assert loaded.sample_shape == tuple(json.loads(file.read_text())["picture"]) == family.tiny(0).sample_shape


def halve_weights(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def facts(content: str):
    return lambda folder: (folder / "dedistill.json").write_text(content)


DAMAGE = [
    pytest.param(lambda folder: (folder / "dedistill.json").unlink(), id="no facts"),
    pytest.param(facts('{"family": '), id="facts cut short"),
    pytest.param(facts('{"family": "unet"}'), id="another family"),
    pytest.param(facts("[]"), id="facts of another kind"),
    pytest.param(facts('{"family": "pixel_flux"}'), id="facts without an image"),
    pytest.param(halve_weights, id="weights cut short"),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_folder_that_is_no_model_is_named(tmp_path, damage):
    family = PixelFlux()
    family.save(family.tiny(0), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=r"^model\.path: ") as error:
        family.load(spec(tmp_path), seed=0)
    assert str(tmp_path) in str(error.value)


def test_weights_depend_on_the_seed_alone(family, tmp_path):
    tiny = TINY[family.spec.name]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = tiny(0, tmp_path / "a").denoiser.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again, other = tiny(0, tmp_path / "b").denoiser.state_dict(), tiny(1, tmp_path / "c").denoiser.state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_presets_match_something(family, components):
    """A pattern without a match is a mistake; modulation, attention and mlp share the blocks out among them."""
    found = {}
    for preset, patterns in family.presets(components.denoiser).items():
        matches = [matching(pattern, adaptable(components.denoiser)) for pattern in patterns]
        assert all(matches), f"{preset}: {patterns}"
        found[preset] = [name for names in matches for name in names]
        assert len(set(found[preset])) == len(found[preset]), preset
    if "modulation" in found:
        assert sorted(found["modulation"] + found["attention"] + found["mlp"]) == sorted(found["blocks"])
    assert set(found["attention"]) <= set(found["blocks"])


@pytest.mark.parametrize(("name", "hint"), [("pixelflux", "did you mean 'pixel_flux'"), ("zzz", "known: flux, sd3, sdxl")])
def test_unknown_family_names_the_nearest(name, hint):
    with pytest.raises(UserError, match=hint) as error:
        get_family(name)
    assert error.value.exit_code == 2 and str(error.value).startswith(f"model.family: unknown family '{name}'")


@pytest.mark.parametrize(("channels", "patch", "height", "width"), [(1, 4, 8, 16), (3, 2, 4, 6), (16, 2, 8, 4)])
def test_packing(channels, patch, height, width):
    """Tokens row by row, channels (c, row, column); and back again."""
    c, h, w = torch.meshgrid(torch.arange(channels), torch.arange(height), torch.arange(width), indexing="ij")
    image = (10_000 * c + 100 * h + w)[None].expand(2, -1, -1, -1)
    tokens = patchify(image, patch)
    assert tokens.shape == (2, height * width // patch**2, channels * patch**2)
    assert torch.equal(unpatchify(tokens, patch, channels, height, width), image)
    for k in range(tokens.shape[1]):
        corner = patch * (100 * (k // (width // patch)) + k % (width // patch))
        expected = [10_000 * c + 100 * i + j + corner for c in range(channels) for i in range(patch) for j in range(patch)]
        assert tokens[1, k].tolist() == expected


@pytest.fixture
def flux():
    family = PixelFlux()
    return family, family.tiny(0)


def test_padded_with_bool_mask_equals_truncated(flux):
    """Diffusers' own mask path, on 48 padded tokens. A float mask is an added +1 or 0, not a mask."""
    family, components = flux
    noisy = keyed.noise(0, "test", 0, range(3), components.sample_shape)
    text = family.encode_text(components, CAPTIONS, 48)
    tokens = family.tokens(components, components.sample_shape)
    mask = attention_mask(text.tokens.mask, tokens)["attention_mask"]
    assert mask.dtype == torch.bool and mask.shape == (3, 1, 1, 48 + tokens)
    padded = flux_directly(components, noisy, SIGMA, text.tokens.embeds, text.vectors["pooled"], mask)
    added = flux_directly(components, noisy, SIGMA, text.tokens.embeds, text.vectors["pooled"], mask.float())
    unmasked = flux_directly(components, noisy, SIGMA, text.tokens.embeds, text.vectors["pooled"])
    for i in range(3):
        row = slice(i, i + 1)
        truncated = flux_directly(
            components, noisy[row], SIGMA[row], text.tokens.embeds[row, text.tokens.mask[i]], text.vectors["pooled"][row]
        )
        torch.testing.assert_close(padded[row], truncated, **TOLERANCE)
        for wrong in (added[row], unmasked[row]):
            assert (wrong - truncated).abs().max() > 1e-3


def test_text_is_trimmed_to_the_longest_caption(flux):
    """The network is never given columns that are padding in every row; unmasked, it gets all of them."""
    family, components = flux
    model = Model(family, components, components.denoiser, text_length=48)
    for components.mask, tokens in (("bool", 8), ("none", 48)):
        assert model.encode(CAPTIONS).tokens.embeds.shape[1] == tokens


def test_no_mask_where_nothing_is_padding():
    """Equal lengths keep the fast kernels; text comes before the image."""
    assert attention_mask(torch.ones(2, 5, dtype=torch.bool), 8) is None
    mask = attention_mask(torch.tensor([[True, False], [True, True]]), 3)["attention_mask"]
    assert mask[:, 0, 0].tolist() == [[True, False, True, True, True], [True] * 5]


def mnist(**changes):
    """The network of recipes/mnist_flux.toml on the meta device: shapes without numbers."""
    new = load_recipe(MNIST).model.new.model_copy(update=changes)
    with torch.device("meta"):
        return PixelFlux().build(new)


def test_mnist_network_has_the_published_size():
    """59,845,696 parameters, 16 tokens of 64."""
    components = mnist()
    assert sum(p.numel() for p in components.denoiser.parameters()) == 59_845_696
    assert (
        components.denoiser.config.in_channels,
        PixelFlux().tokens(components, components.sample_shape),
        components.sample_shape,
    ) == (
        64,
        16,
        (1, 32, 32),
    )


def test_mnist_network_in_colour():
    """3 channels of patch 8 make tokens of 192."""
    components = mnist(channels=3)
    assert (
        components.denoiser.config.in_channels,
        PixelFlux().tokens(components, components.sample_shape),
        components.sample_shape,
    ) == (
        192,
        16,
        (3, 32, 32),
    )
    # two linears in each of 6 double blocks, one in each of 12 single
    modulation = PixelFlux().presets(components.denoiser)["modulation"]
    assert sum(len(matching(pattern, linears(components.denoiser))) for pattern in modulation) == 6 * 2 + 12
