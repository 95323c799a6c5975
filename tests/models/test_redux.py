"""Images in prompts: what their tokens are, what they count for, and how prompts name them."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from image_files import write_image
from PIL import Image

from dedistill.errors import UserError
from dedistill.models.flux.pipeline import MaskedFluxPipeline
from dedistill.models.flux.redux import Redux
from dedistill.models.flux.tiny import TEXT_DIM, write_tiny_redux
from dedistill.models.image_prompts import ImagePrompt, parted

SIZE = {"height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 24}
PROMPT = "a red cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny FLUX.1-Redux-dev and two images."""
    place = tmp_path_factory.mktemp("redux")
    write_tiny_redux(place)
    for i in range(2):
        write_image(place / f"{i}.png", 60 - 20 * i, 40, i)
    return place


@pytest.fixture(scope="module")
def pipe(tiny_flux, folder) -> MaskedFluxPipeline:
    pipe = MaskedFluxPipeline.from_pretrained(tiny_flux, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():  # as large as trained ones are: a fresh embedder makes next to nothing of an image
        pipe.load_redux(folder)
        for parameter in pipe._redux.embedder.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return pipe


@pytest.fixture(scope="module")
def images(folder) -> list[Image.Image]:
    return [Image.open(folder / f"{i}.png") for i in range(2)]


def draw(pipe, prompt=PROMPT, **settings):
    count = 1 if isinstance(prompt, str) else len(prompt)
    start = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).repeat(count, 1, 1)
    return pipe(prompt, latents=start, **(SIZE | settings)).images


def near(a, b) -> bool:
    return bool(torch.allclose(a, b, rtol=0, atol=1e-5))


def test_the_published_embedder(folder):
    """Sizes and names of FLUX.1-Redux-dev, 729 tokens of 1152 features."""
    with torch.device("meta"):
        embedder = ReduxImageEncoder()
    names = [f"redux_{way}.{part}" for way in ("up", "down") for part in ("weight", "bias")]
    assert list(embedder.state_dict()) == names and sum(p.numel() for p in embedder.parameters()) == 64_503_808
    assert list(Redux(folder, TEXT_DIM).embedder.state_dict()) == names


@pytest.mark.parametrize("scale", [1.0, 0.2])
def test_tokens_are_those_of_diffusers(pipe, folder, images, scale):
    """The image part of what FluxPriorReduxPipeline makes; the pictures are those of FluxPipeline on text and image."""
    encoders = {name: part for name, part in pipe.components.items() if name.startswith(("text", "token"))}
    prior = FluxPriorReduxPipeline.from_pretrained(folder, image_embedder=pipe._redux.embedder, **encoders)
    theirs = prior(images[0], PROMPT).prompt_embeds[:, 512:]
    with torch.no_grad():
        text = pipe._encode([PROMPT], 1, pipe._text_use({"mask": "none", "t5_mask": False, "text_length": 24}))
        own = pipe._redux.tokens(pipe._redux.told(text, [[ImagePrompt(images[0])]], "cpu"))
    assert near(own.sequences[1].embeds, theirs)
    stock = FluxPipeline(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    embeds = torch.cat([text.tokens.embeds, scale * theirs], 1)
    start = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    settings = {k: v for k, v in SIZE.items() if k != "max_sequence_length"}
    wanted = stock(prompt_embeds=embeds, pooled_prompt_embeds=text.vectors["pooled"], latents=start, **settings).images
    assert near(draw(pipe, image=images[0], image_scale=scale, mask="none", t5_mask=False), wanted)


@pytest.mark.parametrize("mask", ["bool", "none", "libreflux"])
def test_a_weight_is_exact_at_its_ends(pipe, images, mask):
    """0 is no image and 1 is as it is, to the bit; between, the picture is between, and n of 1 / n count as one."""
    plain, whole = draw(pipe, mask=mask), draw(pipe, image=images[0], mask=mask)
    assert torch.equal(draw(pipe, image=images[0], image_weight=0.0, mask=mask), plain)
    assert torch.equal(draw(pipe, image=images[0], image_weight=1.0, mask=mask), whole)
    some = draw(pipe, image=images[0], image_weight=0.2, mask=mask)
    apart = float((whole - plain).norm())
    assert 0 < float((some - plain).norm()) < apart and 0 < float((some - whole).norm()) < apart
    assert near(draw(pipe, image=[images[0]] * 2, image_weight=0.5, mask=mask), whole)
    assert not near(draw(pipe, image=[images[0]] * 2, mask=mask), whole)


def test_several_images_have_no_order(pipe, images):
    both = draw(pipe, image=images, image_weight=[1.0, 0.3])
    assert near(draw(pipe, image=images[::-1], image_weight=[0.3, 1.0]), both)
    assert not near(draw(pipe, image=images, image_weight=[0.3, 1.0]), both)


@pytest.mark.parametrize("mask", ["bool", "none", "libreflux"])
def test_rows_of_a_batch_keep_their_images(pipe, folder, mask):
    """One row without, one with one, one with two of other weights, each as it is alone; the negative prompt has none."""
    prompts = [
        PROMPT,
        f"a blue house <image:{folder}/0.png>",
        f"<image:{folder}/0.png weight=0.5> a dog <image:{folder}/1.png>",
    ]
    both = draw(pipe, prompts, mask=mask, true_cfg_scale=3.0)
    for i, prompt in enumerate(prompts):
        assert near(both[i : i + 1], draw(pipe, prompt, mask=mask, true_cfg_scale=3.0)), prompt


def test_prompts_name_images(pipe, folder, images):
    named = draw(pipe, f"{PROMPT} <image:{folder}/0.png weight=0.5>")
    assert torch.equal(named, draw(pipe, image=images[0], image_weight=0.5))


@pytest.mark.parametrize(
    ("prompt", "words", "found"),
    [
        ("a cat", "a cat", []),
        ("a <b> cat", "a <b> cat", []),
        ("a cat <image:x.jpg>", "a cat", [("x.jpg", 1.0, 1.0)]),
        ("<image:my dog.jpg  weight=.5 scale=0.2>a cat", "a cat", [("my dog.jpg", 0.5, 0.2)]),
        ("<image:a.jpg><image:b.jpg weight=0>", "", [("a.jpg", 1.0, 1.0), ("b.jpg", 0.0, 1.0)]),
        ("a <image:x.jpg> cat", "a cat", [("x.jpg", 1.0, 1.0)]),
    ],
)
def test_how_prompts_are_parted(prompt, words, found):
    assert parted(prompt) == (words, tuple(ImagePrompt(*image) for image in found))


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("a <image:x.jpg", "not closed"),
        ("<image:x.jpg wieght=1>", "no 'wieght'"),
        ("<image:x.jpg weight=much>", "weight=much is no number"),
        ("<image:x.jpg weight=-1>", "at least 0"),
        ("<image:x.jpg scale=nan>", "at least 0"),
        ("<image: weight=1>", "has no path"),
    ],
)
def test_prompts_that_are_not_well_formed(prompt, why):
    with pytest.raises(UserError, match=why):
        parted(prompt)


def test_what_is_refused(pipe, tiny_flux, folder, images, tmp_path):
    bare = MaskedFluxPipeline(**pipe.components)
    with pytest.raises(UserError, match=r"call pipe\.load_redux"):
        draw(bare, image=images[0])
    with pytest.raises(UserError, match=r"'none\.png' cannot be read"):
        draw(pipe, "a <image:none.png>")
    with pytest.raises(UserError, match="2 numbers for 1 images"):
        draw(pipe, image=images[0], image_weight=[1.0, 0.5])
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(UserError, match="at least 0"):
            draw(pipe, image=images[0], image_weight=wrong)
    with pytest.raises(UserError, match="has no folder 'image_encoder'"):
        bare.load_redux(tiny_flux)
    write_tiny_redux(tmp_path, text_dim=48)
    with pytest.raises(UserError, match="takes 48 text features; this one takes 32"):
        bare.load_redux(tmp_path)
