"""FLUX.1: loading, depth, guidance, text, latents, and the three ways of masking."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from original_files import as_original
from safetensors.torch import load_file, save_file

from dedistill.adapters.targets import matching
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.models.conditioning import collate
from dedistill.models.flux.family import Flux
from dedistill.models.flux.naming import NAMES as naming
from dedistill.models.flux.network import attention_mask, image_ids
from dedistill.models.flux.published import shape_of
from dedistill.models.flux.tiny import write_tiny_flux

TOLERANCE = {"rtol": 0, "atol": 1e-5}
CAPTIONS = ["sun", "the dog and the tree with hat"]
SIGMA = torch.tensor([0.3, 0.9])
NOISY = keyed.noise(0, "test", 0, range(2), (16, 4, 6))


def spec(path, **changes) -> SimpleNamespace:
    plain = {
        "path": str(path),
        "revision": None,
        "components": None,
        "mask": "bool",
        "t5_mask": True,
        "null": None,
        "image_prompts": None,
        "guidance": 1.0 if shape_of(str(path)).guidance else None,
        "text_length": 512,
    }
    return SimpleNamespace(**(plain | changes))


def load(path, **changes):
    return Flux().load(spec(path, **changes), seed=0)


@pytest.fixture(scope="module")
def schnell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schnell")
    write_tiny_flux(folder)
    return folder


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dev")
    write_tiny_flux(folder, guidance=True, layers=2)
    return folder


@pytest.fixture
def copy(schnell, tmp_path):
    """The schnell folder, free to be damaged."""
    import shutil

    return shutil.copytree(schnell, tmp_path / "copy")


@torch.no_grad()
def velocity(components, text, noisy=NOISY, sigma=SIGMA, guidance=None):
    return Flux().velocity(components, components.denoiser, noisy, sigma, text, guidance)


# --- sizes ---


@pytest.mark.parametrize(("guidance", "count", "linears"), [(False, 11_891_178_560, 502), (True, 11_901_408_320, 504)])
def test_published_size(guidance, count, linears):
    """Schnell and dev, on the meta device."""
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(guidance_embeds=guidance)
    assert sum(p.numel() for p in denoiser.parameters()) == count
    assert sum(isinstance(m, torch.nn.Linear) for m in denoiser.modules()) == linears
    assert (len(denoiser.transformer_blocks), len(denoiser.single_transformer_blocks), denoiser.inner_dim) == (19, 38, 3072)


def test_modulation_is_every_block_once():
    """Two modulation linears in each of 19 double blocks, one in each of 38 single: 27 % of the blocks' weights."""
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel()
    names = [n for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
    found = [n for pattern in Flux().presets(denoiser)["modulation"] for n in matching(pattern, names)]
    assert len(found) == 19 * 2 + 38
    assert sum(denoiser.get_submodule(n).weight.numel() for n in found) == 3_227_516_928


def test_flex_and_the_others_are_known():
    """Flex.1-alpha has 8 double blocks and a guidance embedder."""
    assert (shape_of("ostris/Flex.1-alpha").layers, shape_of("ostris/Flex.1-alpha").guidance) == (8, True)
    assert shape_of("someone/unknown") == shape_of("black-forest-labs/FLUX.1-schnell")


def test_shape_is_read_from_a_local_config(dev):
    assert (shape_of(str(dev)).layers, shape_of(str(dev)).guidance) == (2, True)


# --- loading ---


def test_loads_what_diffusers_loads(schnell):
    components = load(schnell)
    theirs = FluxTransformer2DModel.from_pretrained(schnell / "transformer").state_dict()
    ours = components.denoiser.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not components.text.loaded and not components.vae.loaded, "encoders are loaded when first used"


def test_depth_is_what_the_files_hold(copy):
    """Blocks are counted; a config that promises more would leave random weights, or the end of a file was lost."""
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith("single_transformer_blocks.1.")}
    save_file(tensors, file)
    with pytest.raises(UserError, match="has num_single_layers = 2, and the files hold 1 block"):
        load(copy)
    config = copy / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_single_layers": 1}))
    denoiser = load(copy).denoiser
    assert (len(denoiser.transformer_blocks), len(denoiser.single_transformer_blocks)) == (1, 1)


def drop(name):
    def damage(folder):
        file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        del tensors[next(k for k in tensors if name in k)]
        save_file(tensors, file)

    return damage


def add(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"surplus.weight": torch.ones(2)}, file)


def reshape(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"proj_out.bias": torch.ones(3)}, file)


def halve(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove(*names):
    import shutil

    return lambda folder: [shutil.rmtree(folder / n) for n in names]


FAULTS = [
    pytest.param(drop("to_add_out.bias"), "1 tensor is missing, e.g. transformer_blocks.0.attn.to_add_out.bias", id="missing"),
    pytest.param(add, "1 tensor is unknown, e.g. surplus.weight", id="unknown"),
    pytest.param(reshape, "1 tensor is of another shape, e.g. proj_out.bias", id="shape"),
    pytest.param(halve, "cannot be read as safetensors", id="torn"),
    pytest.param(remove("transformer"), "no folder 'transformer'", id="no transformer"),
    pytest.param(remove("tokenizer_2"), "no folder 'tokenizer_2'", id="no tokenizer"),
    pytest.param(remove("vae"), "no VAE in", id="no VAE"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS)
def test_nothing_is_loaded_by_halves(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=r"^model\.path: ") as error:
        load(copy)
    assert message in str(error.value)


def test_hub_id_needs_its_revision():
    for revision in (None, "main", "741f7c3"):
        with pytest.raises(UserError, match=r"pin its commit, 40 hexadecimal digits, with model\.revision"):
            load("black-forest-labs/FLUX.1-schnell", revision=revision)
    with pytest.raises(UserError, match="no such file or folder"):
        load("/no/such/folder")


@pytest.mark.parametrize("guidance", [False, True])
@pytest.mark.parametrize("spelling", ["bfl", "diffusers", "comfy"])
def test_single_file_is_the_same_network(schnell, dev, tmp_path, spelling, guidance):
    """BFL's names, diffusers' names, and either behind ComfyUI's prefix; sizes are read from the tensors."""
    folder = dev if guidance else schnell
    components = load(folder)
    tensors = components.denoiser.state_dict()
    if spelling != "diffusers":
        tensors = as_original(naming, tensors)
    if spelling == "comfy":
        tensors = {f"model.diffusion_model.{name}": t for name, t in tensors.items()}
    file = tmp_path / "flux.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    again = load(file, components=str(folder))
    text = components.text(CAPTIONS, 32)
    assert torch.equal(velocity(again, text), velocity(components, text)) and again.guidance == components.guidance
    save_file({name: t.contiguous() for name, t in list(tensors.items())[:-1]}, file)
    with pytest.raises(UserError, match=r"1 tensor is missing|no tensor"):
        load(file, components=str(folder))


def test_single_file_needs_its_components(schnell, tmp_path):
    file = tmp_path / "flux.safetensors"
    save_file({"x": torch.ones(1)}, file)
    with pytest.raises(UserError, match=r"^model\.components: a single file holds the denoiser alone"):
        load(file)
    with pytest.raises(UserError, match="is not a FLUX denoiser"):
        load(file, components=str(schnell))


# --- guidance ---


def test_guidance_is_one_in_training_and_matters(dev):
    """Dev is trained at guidance 1; another value gives another image."""
    components = load(dev)
    text = components.text(CAPTIONS, 32)
    assert components.guidance == 1.0
    told = velocity(components, text)
    assert torch.equal(told, velocity(components, text, guidance=1.0))
    assert (told - velocity(components, text, guidance=3.5)).abs().max() > 1e-4


def test_guidance_without_an_embedding_is_an_error(schnell):
    with pytest.raises(UserError, match=r"model\.guidance: this network has no guidance embedding"):
        load(schnell, guidance=1.0)
    components = load(schnell)
    with pytest.raises(UserError, match="no guidance embedding"):
        velocity(components, components.text(CAPTIONS, 32), guidance=3.5)


def test_bypassed_guidance_is_not_looked_at(dev):
    """The embedder's weights change nothing, are kept, and the rest is what it was without its share."""
    components = load(dev, guidance="bypass")
    text = components.text(CAPTIONS, 32)
    plain = velocity(components, text)
    with torch.no_grad():
        for p in components.denoiser.time_text_embed.guidance_embedder.parameters():
            p.normal_()
    assert torch.equal(velocity(components, text), plain)
    assert (velocity(load(dev), text) - plain).abs().max() > 1e-4
    silent = load(dev)
    with torch.no_grad():  # an embedder that says 0 is one that is passed by
        silent.denoiser.time_text_embed.guidance_embedder.linear_2.weight.zero_()
        silent.denoiser.time_text_embed.guidance_embedder.linear_2.bias.zero_()
    torch.testing.assert_close(velocity(silent, text), plain, **TOLERANCE)
    with pytest.raises(UserError, match="bypasses it"):
        velocity(components, text, guidance=3.5)


def test_shift_is_the_schedulers(schnell, dev):
    """1 for schnell at any size; exp(.5) at 256 tokens and exp(1.15) at 4096 for dev."""
    flux = Flux()
    assert [flux.shift(load(schnell), n) for n in (256, 4096)] == [1.0, 1.0]
    assert flux.shift(load(dev), 256) == pytest.approx(2.718281828**0.5)
    assert flux.shift(load(dev), 4096) == pytest.approx(2.718281828**1.15)


# --- noise level ---


def test_sigma_reaches_the_embedding_exactly(schnell):
    """In bf16, diffusers tells the network 1000 sigma up to 4 away; here it is exact."""
    components = load(schnell)
    denoiser = components.denoiser.to(torch.bfloat16)
    heard = []
    denoiser.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: heard.append(args[0].clone()))
    text = components.text(CAPTIONS, 32)
    sigma = torch.tensor([0.9973, 0.5009])
    velocity(components, text.each(lambda t: t.bfloat16() if t.is_floating_point() else t), NOISY.bfloat16(), sigma)
    assert heard[0].dtype == torch.float32 and torch.equal(heard[0], 1000 * sigma)
    theirs = sigma.to(torch.bfloat16) * 1000
    assert (theirs.float() - 1000 * sigma).abs().max() > 1


# --- text ---


def test_text_equals_the_pipelines(schnell):
    """With t5_mask off, embeddings and pooled vector are those of diffusers' own FluxPipeline."""
    pipe = FluxPipeline.from_pretrained(schnell)
    embeds, pooled, _ = pipe.encode_prompt(CAPTIONS, None, max_sequence_length=64)
    text = load(schnell, t5_mask=False).text(CAPTIONS, 64)
    torch.testing.assert_close(text.tokens.embeds, embeds.float(), **TOLERANCE)
    torch.testing.assert_close(text.vectors["pooled"], pooled.float(), **TOLERANCE)


def test_padding_leaks_into_real_tokens_unless_t5_is_masked(schnell):
    """The length a caption is padded to changes what it means; with the mask it does not."""
    for t5_mask in (True, False):
        text = load(schnell, t5_mask=t5_mask).text
        short, long = text(CAPTIONS[:1], 16), text(CAPTIONS[:1], 64)
        real = int(short.tokens.mask.sum())
        same = torch.allclose(short.tokens.embeds[:, :real], long.tokens.embeds[:, :real], atol=1e-5)
        assert same == t5_mask


def test_empty_prompt_is_one_token(schnell):
    assert load(schnell).text([""], 512).tokens.mask.sum() == 1


# --- masks ---


def test_padded_truncated_and_packed_are_one(schnell):
    """Padded to 512 and masked = truncated = a batch of both lengths; outputs and gradients to 1e-5."""
    components = load(schnell)
    outputs, gradients = [], []
    padded = components.text(CAPTIONS, 512)
    alone = [components.text([c], int(padded.tokens.mask[i].sum())) for i, c in enumerate(CAPTIONS)]
    for texts in ([padded], [collate(alone)], alone):
        components.denoiser.zero_grad()
        rows = torch.arange(2).split([len(t) for t in texts])
        v = [Flux().velocity(components, components.denoiser, NOISY[r], SIGMA[r], t) for r, t in zip(rows, texts)]
        v = torch.cat(v)
        v.square().sum().backward()
        outputs.append(v.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in components.denoiser.parameters() if p.grad is not None]))
    for v, g in zip(outputs[1:], gradients[1:]):
        torch.testing.assert_close(v, outputs[0], **TOLERANCE)
        torch.testing.assert_close(g, gradients[0], rtol=1e-5, atol=1e-5)


def test_libreflux_mask_is_a_bias(schnell):
    """+1 on real tokens and 0 on padding, so padding keeps a share: neither masked nor unmasked."""
    components = load(schnell)
    text = components.text(CAPTIONS, 64)
    mask = attention_mask(text.tokens.mask, 6, "libreflux")["attention_mask"]
    assert mask.dtype == torch.float32 and mask.shape == (2, 1, 1, 70)
    assert torch.equal(mask[:, 0, 0, :64] == 1, text.tokens.mask) and (mask[..., 64:] == 1).all()
    found = {}
    for components.mask in ("bool", "none", "libreflux"):
        found[components.mask] = velocity(components, text)
    assert (found["libreflux"] - found["bool"]).abs().max() > 1e-4
    assert (found["libreflux"] - found["none"]).abs().max() > 1e-4


def test_backend_that_drops_masks_is_refused(schnell):
    """Where a mask is needed. Batches of one length need none."""
    components = load(schnell)
    with attention_backend("_native_flash"):
        with pytest.raises(UserError, match="'_native_flash' cannot hide the padding"):
            velocity(components, components.text(CAPTIONS, 64))
        assert attention_mask(torch.ones(2, 5, dtype=torch.bool), 6) is None


# --- images ---


def test_latents_are_standardised_samples(schnell):
    """A sample of the posterior, (z - shift) * scale with the config's numbers; decoding inverts the scaling."""
    components = load(schnell)
    vae = AutoencoderKL.from_pretrained(schnell / "vae")
    pixels = keyed.noise(0, "pixels", 0, [0], (3, 32, 48)).clamp(-1, 1)
    noise = keyed.noise(0, "vae", 0, [0], Flux().latent_shape(components, 32, 48))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        z = posterior.mean + posterior.std * noise
        wanted = (z - vae.config.shift_factor) * vae.config.scaling_factor
        latents = Flux().encode_images(components, pixels, noise)
        torch.testing.assert_close(latents, wanted, **TOLERANCE)
        torch.testing.assert_close(Flux().decode(components, latents), vae.decode(z).sample, **TOLERANCE)
    other = Flux().encode_images(components, pixels, noise + 1)
    assert (other - latents).abs().max() > 1e-3, "a sample, not the mode"


def test_sides_are_multiples_of_sixteen(schnell):
    with pytest.raises(UserError, match="both sides must be multiples of 16"):
        Flux().latent_shape(load(schnell), 40, 64)


def test_saved_model_points_to_its_components(schnell, tmp_path):
    """What training exports loads again by its folder alone, encoders and VAE included."""
    components = load(schnell)
    Flux().save(components, tmp_path / "out")
    assert not (tmp_path / "out" / "vae").exists()
    again = load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "dedistill.json").read_text())["components"] == str(schnell.resolve())
    assert torch.equal(velocity(again, again.text(CAPTIONS, 32)), velocity(components, components.text(CAPTIONS, 32)))


def test_positions_are_computed_once_for_each_size(schnell, monkeypatch):
    """Whatever the lengths of texts, and to the bit as diffusers computes them for all tokens at once."""
    components, seen = load(schnell, mask="none"), []
    embedding = components.denoiser.pos_embed
    asked = type(embedding).forward
    monkeypatch.setattr(type(embedding), "forward", lambda self, ids: seen.append(ids) or asked(self, ids))
    taken = []
    components.denoiser.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, given: taken.append(given["image_rotary_emb"]), with_kwargs=True
    )
    for rows, columns, words in ((4, 4, 3), (4, 6, 9), (4, 4, 7)):
        velocity(components, components.text(CAPTIONS, words), torch.zeros(2, 16, 2 * rows, 2 * columns))
        whole = asked(embedding, torch.cat([torch.zeros(words, 3), image_ids(rows, columns, torch.device("cpu"))]))
        assert all(torch.equal(a, b) for a, b in zip(taken[-1], whole, strict=True))
    assert [len(ids) for ids in seen] == [17, 25]
    assert "forward" not in vars(embedding)
