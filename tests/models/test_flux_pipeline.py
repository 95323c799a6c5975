"""The pipeline for users: equal to diffusers' own where that is right, and to truncated text where masks are asked for."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor

from dedistill.errors import UserError
from dedistill.models.flux.pipeline import MaskedFluxPipeline
from dedistill.models.flux.tiny import write_tiny_flux

SHORT, LONG = "a red cat", "a blue house on the river in the moon, with one small dog"
SIZE = {"height": 32, "width": 48, "num_inference_steps": 3}


def latents(count: int) -> Tensor:
    """Packed starting noise; row i is the same for every count."""
    return torch.cat([torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(i)) for i in range(count)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipes")
    for name, guidance in (("schnell", False), ("dev", True)):
        write_tiny_flux(root / name, guidance=guidance)
    return {name: root / name for name in ("schnell", "dev")}


@pytest.fixture(scope="module", params=["schnell", "dev"])
def stock(folders, request) -> FluxPipeline:
    return quiet(FluxPipeline.from_pretrained(folders[request.param], local_files_only=True))


@pytest.fixture(scope="module")
def pipe(folders) -> MaskedFluxPipeline:
    return quiet(MaskedFluxPipeline.from_pretrained(folders["dev"], local_files_only=True))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt=SHORT, *args, start: Tensor | None = None, **settings) -> Tensor:
    """Images [B, 3, H, W] in [0, 1]; by default from the noise of ``latents``."""
    count = 1 if isinstance(prompt, str) else len(prompt)
    start = latents(count) if start is None else start
    return pipe(prompt, *args, latents=start, output_type="pt", **(SIZE | settings)).images


def far(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-3


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_unmasked_is_the_stock_pipeline(stock, cfg):
    """Without masks, at the same lengths, every image is FluxPipeline's own, with and without guidance."""
    own = quiet(MaskedFluxPipeline(**stock.components))
    settings = {"true_cfg_scale": cfg, "guidance_scale": 2.0, "max_sequence_length": 24, "num_images_per_prompt": 2}
    for output_type in ("latent", "np"):
        wanted, found = (
            p(
                [SHORT, LONG],
                negative_prompt=["a dog", ""],
                generator=torch.Generator().manual_seed(3),
                output_type=output_type,
                **SIZE,
                **settings,
                **extra,
            ).images
            for p, extra in ((stock, {}), (own, {"mask": "none", "t5_mask": False}))
        )
        assert found.shape == wanted.shape
        assert abs(found - wanted).max() < 1e-5


def test_padding_does_not_matter(pipe):
    """With both masks 512 tokens, the prompt's own length, and the stock pipeline at that length agree."""
    padded = draw(pipe, max_sequence_length=512)
    assert torch.allclose(padded, draw(pipe, max_sequence_length=5), atol=1e-5)
    stock = FluxPipeline(**pipe.components)
    assert torch.allclose(padded, draw(quiet(stock), max_sequence_length=5), atol=1e-5)
    assert far(padded, draw(stock, max_sequence_length=512))
    for unmasked in ({"mask": "none"}, {"t5_mask": False}):
        assert far(draw(pipe, **unmasked, max_sequence_length=64), draw(pipe, **unmasked, max_sequence_length=5)), unmasked


@pytest.mark.parametrize(("mask", "changes"), [("bool", False), ("none", True), ("libreflux", True)])
def test_what_padding_holds(pipe, mask, changes):
    """Whatever stands in the padding's embeddings, a masked image does not change by a single bit."""
    before = draw(pipe, [SHORT, LONG], mask=mask, max_sequence_length=32)
    pad = pipe.text_encoder_2.shared.weight[0]
    kept = pad.clone()
    with torch.no_grad():
        pad += 100
    try:
        after = draw(pipe, [SHORT, LONG], mask=mask, max_sequence_length=32)
    finally:
        with torch.no_grad():
            pad.copy_(kept)
    assert torch.equal(before, after) != changes


@pytest.mark.parametrize("mask", ["bool", "none", "libreflux"])
def test_a_batch_is_its_rows(pipe, mask):
    """Prompts and negative prompts of different lengths, each pair alone and all in one batch."""
    negatives, settings = ["", "red " * 9], {"mask": mask, "true_cfg_scale": 3.0, "max_sequence_length": 32}
    both = draw(pipe, [SHORT, LONG], negatives, **settings)
    for i, prompt in enumerate([SHORT, LONG]):
        alone = draw(pipe, prompt, negatives[i], start=latents(2)[i : i + 1], **settings)
        assert torch.allclose(both[i : i + 1], alone, atol=1e-5)


def test_libreflux_is_neither(pipe):
    """A bias of 1 on real tokens shows padding e times less than no mask does, and hides nothing."""
    found = {mask: draw(pipe, mask=mask, t5_mask=False, max_sequence_length=64) for mask in ("bool", "none", "libreflux")}
    assert far(found["libreflux"], found["bool"]) and far(found["libreflux"], found["none"])
    assert not far(draw(pipe, mask="libreflux", max_sequence_length=5), draw(pipe, mask="none", max_sequence_length=5))


def forwards(pipe, **settings) -> list[tuple[int, int]]:
    """(batch, text tokens) of every call of the transformer."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["encoder_hidden_states"].shape[:2])), with_kwargs=True
    )
    try:
        draw(pipe, **settings)
    finally:
        hook.remove()
    return seen


def test_steps_without_guidance(pipe):
    """One forward where guidance is off or skipped, else two; each text has its own length."""
    assert forwards(pipe) == [(1, 5)] * 3
    assert forwards(pipe, true_cfg_scale=4.0) == [(1, 5), (1, 1)] * 3
    assert forwards(pipe, true_cfg_scale=4.0, skip_cfg_steps=2) == [(1, 5), (1, 5), (1, 5), (1, 1)]
    assert torch.equal(draw(pipe, true_cfg_scale=4.0, skip_cfg_steps=3), draw(pipe))
    guided = [draw(pipe, true_cfg_scale=4.0, skip_cfg_steps=skip) for skip in (0, 1, 2)]
    assert far(guided[0], guided[1]) and far(guided[1], guided[2]) and far(guided[2], draw(pipe))


@pytest.mark.parametrize(
    "neutral", ["interval:low=0,high=1", "rescale:phi=0", "apg:eta=1,momentum=0", "skip_layers:blocks=1,scale=0"]
)
def test_guiders_at_neutral_settings_are_plain_guidance(pipe, neutral):
    assert torch.equal(draw(pipe, true_cfg_scale=4.0, guider=neutral), draw(pipe, true_cfg_scale=4.0))
    assert forwards(pipe, true_cfg_scale=4.0, guider=neutral) == [(1, 5), (1, 1)] * 3


@pytest.mark.parametrize(
    ("guider", "words"), [("agp", "there are cfg"), ("apg:eta=3", "0 <= eta <= 1"), ("auto", "no base apart")]
)
def test_guiders_that_there_are_not(pipe, guider, words):
    with pytest.raises(UserError, match="guider = ") as told:
        draw(pipe, true_cfg_scale=4.0, guider=guider)
    assert words in str(told.value)


def test_guidance_of_two_kinds(pipe, folders):
    """Distilled and true guidance act together and apart on dev's shape; schnell's has no distilled one."""
    images = [draw(pipe, guidance_scale=g, true_cfg_scale=c) for g, c in ((3.5, 1.0), (1.0, 3.5), (2.0, 2.0), (1.0, 1.0))]
    assert all(far(a, b) for i, a in enumerate(images) for b in images[:i])
    schnell = quiet(MaskedFluxPipeline.from_pretrained(folders["schnell"], local_files_only=True))
    assert torch.equal(draw(schnell, guidance_scale=9.0), draw(schnell, guidance_scale=1.0))


def test_bf16_is_told_the_exact_noise_level(folders):
    """In bf16 the time embedding still gets 1000 sigma, and 1000 times the guidance, in float32."""
    own = MaskedFluxPipeline.from_pretrained(folders["dev"], local_files_only=True, torch_dtype=torch.bfloat16)
    seen = []
    own.transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    draw(quiet(own), guidance_scale=3.3, num_inference_steps=7)
    times, guidance = seen[::2], seen[1::2]
    assert torch.equal(torch.cat(times), own.scheduler.timesteps)
    assert all(g.item() == pytest.approx(3300, rel=1e-6) for g in guidance)


def test_parts_of_different_precision(folders, pipe):
    """A float32 transformer, as merging can leave it, between encoders and a VAE in bf16."""
    own = MaskedFluxPipeline.from_pretrained(folders["dev"], local_files_only=True, torch_dtype=torch.bfloat16)
    quiet(own).transformer = pipe.transformer
    assert torch.allclose(draw(own, true_cfg_scale=2.0).float(), draw(pipe, true_cfg_scale=2.0), atol=0.05)


@pytest.mark.parametrize("where", ["process", "layer"])
def test_a_backend_that_drops_masks_is_refused(pipe, where, monkeypatch):
    """Refused before the first step where padding must be hidden, taken where nothing has to be."""
    if where == "layer":
        processor = list(pipe.transformer.attn_processors.values())[-1]
        monkeypatch.setattr(processor, "_attention_backend", AttentionBackendName.FLASH_VARLEN, raising=False)
        with pytest.raises(UserError, match=r"flash_varlen.*single_transformer_blocks\.1.*native"):
            draw(pipe, [SHORT, LONG])
        return
    with attention_backend("_native_flash"):
        with pytest.raises(UserError, match=r"_native_flash.*native"):
            draw(pipe, [SHORT, LONG])
        with pytest.raises(UserError, match="_native_flash"):
            draw(pipe, mask="libreflux")
        alone = draw(pipe)
    assert torch.allclose(alone, draw(pipe), atol=1e-5)


def test_facts_of_the_folder(tmp_path, pipe, folders):
    """What the model folder says is used; what the call says goes first; a value nobody knows is refused."""
    folder = tmp_path / "model"
    write_tiny_flux(folder, guidance=True)
    facts = {"family": "x", "mask": "libreflux", "t5_mask": False, "text_length": 20}
    (folder / "dedistill.json").write_text(json.dumps(facts))
    own = quiet(MaskedFluxPipeline.from_pretrained(folder, local_files_only=True))
    asked = {"mask": "libreflux", "t5_mask": False, "max_sequence_length": 20}
    assert torch.equal(draw(own), draw(pipe, **asked)) and far(draw(own), draw(pipe))
    assert torch.equal(draw(own, mask="bool", t5_mask=True, max_sequence_length=512), draw(pipe))
    (folder / "dedistill.json").write_text(json.dumps(facts | {"mask": "maybe"}))
    with pytest.raises(UserError, match=r"mask = 'maybe'.*bool, none, libreflux"):
        draw(own)
    (folder / "dedistill.json").write_text("{")
    with pytest.raises(UserError, match=r"dedistill\.json"):
        draw(own)


@pytest.mark.parametrize("length", [0, 513, 2.5, True])
def test_lengths_outside_are_refused(pipe, length):
    with pytest.raises(UserError, match="1 to 512 tokens"):
        draw(pipe, max_sequence_length=length)


def test_unequal_lists_are_refused(pipe):
    with pytest.raises(UserError, match="1 negative prompts for 2 prompts"):
        draw(pipe, [SHORT, LONG], [""], true_cfg_scale=2.0)


def test_a_cut_prompt_is_told(pipe, caplog):
    from diffusers.utils import logging

    logging.enable_propagation()
    try:
        draw(pipe, LONG, max_sequence_length=4)
    finally:
        logging.disable_propagation()
    assert "only 4 of" in caplog.text


def test_saves_a_plain_folder(tmp_path, pipe):
    """Programs without this package load what it saves."""
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert type(again) is FluxPipeline
    assert torch.equal(draw(quiet(MaskedFluxPipeline(**again.components))), draw(pipe))


@pytest.mark.parametrize("blocks", [3, 6])
def test_images_of_a_transformer_whose_blocks_wait(tmp_path, blocks):
    """To the bit; text encoders are back on the CPU afterwards, which is also where this device is."""
    write_tiny_flux(tmp_path, layers=2, single_layers=4)
    plain, swapped = (quiet(MaskedFluxPipeline.from_pretrained(tmp_path, local_files_only=True)) for _ in range(2))
    swapped.enable_block_swap(blocks, "cpu")
    assert sum(bool(m._forward_pre_hooks) for m in swapped.transformer.modules()) == blocks
    for seed in range(2):
        start = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(seed))
        images = [draw(p, [SHORT, LONG], true_cfg_scale=3.0, start=start) for p in (plain, swapped)]
        assert torch.equal(*images)
    for wrong in (2, 7):
        with pytest.raises(UserError, match="has 6 blocks, and at least 3 must wait"):
            plain.enable_block_swap(wrong, "cpu")
