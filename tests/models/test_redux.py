"""Images in prompts: what their tokens are, what they count for, and how prompts name them."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxPriorReduxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from image_files import write_image
from PIL import Image

from dedistill.adapters.files import read_tensors
from dedistill.cli.main import main
from dedistill.data.encode import open_data
from dedistill.distributed.world import World
from dedistill.errors import UserError
from dedistill.evaluation.sweep import read_index
from dedistill.models.conditioning import Conditioning
from dedistill.models.flux.pipeline import MaskedFluxPipeline
from dedistill.models.flux.redux import Redux
from dedistill.models.flux.tiny import TEXT_DIM, write_tiny_redux
from dedistill.models.image_prompts import ImagePrompt, parted
from dedistill.models.model import build_model
from dedistill.objectives.base import objective_for
from dedistill.recipe import load_recipe
from dedistill.release.export import export_adapter, export_model
from dedistill.release.merge import merge_adapter
from dedistill.runs.model import last_weights

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
    """The image part of what FluxPriorReduxPipeline makes; the images are those of FluxPipeline on text and image."""
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
    """0 is no image and 1 is as it is, to the bit; between, the image is between, and n of 1 / n count as one."""
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


# --- in recipes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(image_recipe, folder) -> Path:
    """Of a tiny FLUX that is told images, with a preview by an image."""
    text = image_recipe.read_text().replace("text_length = 64\n", f'text_length = 64\nimage_prompts = "{folder}"\n')
    image_recipe.write_text(
        f'{text}[snapshot]\nevery = 2\n[preview]\nevery = 2\nprompts = ["a cat <image:{folder}/0.png weight=0.5>"]\n'
    )
    return image_recipe


def conditioning(recipe_file, dropout: float, step: int = 0):
    recipe = load_recipe(recipe_file, [f"data.image_dropout={dropout}", "data.caption_dropout=0.5"])
    source = open_data(recipe, "cpu", lambda line: None).source
    objective = objective_for(recipe, source, lambda shape: 1.0)
    return [objective.noisy_batch(step, part) for part in objective.share(step, 4, World())[0]]


def test_training_tells_samples_their_own_images(recipe_file, folder, photos):
    """Features of the cache, bf16; rows of dropped captions and dropped images have none, whatever stands there."""
    told = without = 0
    for step in range(4):
        for batch in conditioning(recipe_file, 0.5, step):
            there = batch.text.sequences[1].mask if len(batch.text.sequences) > 1 else torch.zeros(len(batch.names), 1) > 0
            assert bool((there == there[:, :1]).all())
            told += int(there[:, 0].sum())
            without += int((~there[:, 0]).sum())
            assert not any(mark and caption == "" for mark, caption in zip(there[:, 0].tolist(), batch.captions))
    assert told > 1 and without > 4
    assert all(len(batch.text.sequences) == 1 for batch in conditioning(recipe_file, 1.0))
    model = build_model(load_recipe(recipe_file))
    batch = next(b for step in range(4) for b in conditioning(recipe_file, 0.0, step) if len(b.text.sequences) > 1)
    assert batch.text.sequences[1].embeds.dtype == torch.bfloat16
    sigma = torch.full((len(batch.names),), 0.5)
    whole = model.velocity(batch.noisy, sigma, batch.text)
    for i, there in enumerate(batch.text.sequences[1].mask[:, 0].tolist()):
        row = batch.text.index_select(slice(i, i + 1)).trimmed()
        row = row if there else Conditioning(row.sequences[:1], row.vectors)
        assert near(model.velocity(batch.noisy[i : i + 1], sigma[:1], row), whole[i : i + 1])


def test_a_run_with_image_prompts(recipe_file, folder, tmp_path, monkeypatch):
    """Trains, previews and sweeps by images; what comes of it is under Redux's licence, whatever the base's, and names no
    place of the user's. Other encoders than the cache was made with are refused."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe_file)]) == 0
    assert list((tmp_path / "run/previews").glob("*.png"))
    Path("prompts.txt").write_text(f"a cat <image:{folder}/1.png>\na cat\n")
    assert main(["sweep", str(recipe_file), "--candidates", "last", "--cfg", "1", "--prompts", "prompts.txt"]) == 0
    one, other = (Path(row["file"]) for row in read_index(tmp_path / "run/sweep/index.json"))
    assert (tmp_path / "run/sweep" / one).read_bytes() != (tmp_path / "run/sweep" / other).read_bytes()
    weights = last_weights(tmp_path / "run")
    merge_adapter(load_recipe(recipe_file), weights, tmp_path / "merged")
    export_model(tmp_path / "merged", tmp_path / "out", "diffusers")
    card = (tmp_path / "out/README.md").read_text()
    assert "license_name: flux-1-dev-non-commercial-license" in card and "as black-forest-labs/FLUX.1-Redux-dev." in card
    assert str(folder) not in card + (tmp_path / "out/dedistill.json").read_text()
    with pytest.raises(UserError, match="cannot be released as 'mit'"):
        export_model(tmp_path / "merged", tmp_path / "mit", "diffusers", licence="mit")
    export_adapter(weights, tmp_path / "lora.safetensors", "lycoris", tmp_path / "merged")
    _, header = read_tensors(tmp_path / "lora.safetensors")
    assert header["modelspec.license"] == "flux-1-dev-non-commercial-license" and str(folder) not in str(header)
    write_tiny_redux(tmp_path / "redux", seed=1)
    with pytest.raises(UserError, match="made with other inputs"):
        open_data(load_recipe(recipe_file, [f"model.image_prompts={tmp_path}/redux"]), "cpu", lambda line: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.image_prompts=nowhere", "no such folder; get it with: hf download black-forest-labs/FLUX.1-Redux-dev"),
        ("model.image_prompts=.", "it must be that of FLUX.1-Redux-dev"),
    ],
)
def test_a_recipe_without_the_encoder(recipe_file, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe_file), "--set", change]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_told_images(image_recipe, teacher_recipe, folder):
    with pytest.raises(UserError, match=r"set model\.image_prompts"):
        build_model(load_recipe(image_recipe)).encode(["a cat <image:x.jpg>"])
    with pytest.raises(UserError, match="pixel_flux cannot be told images"):
        build_model(load_recipe(teacher_recipe, [f"model.image_prompts={folder}"]))


@pytest.mark.slow
def test_rehearsal(recipe_file):
    assert main(["rehearse", str(recipe_file)]) == 0
