"""A pipeline for those who use the result in diffusers: both branches of the guidance with their own text and mask."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline, ImagePipelineOutput
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings
from diffusers.utils import logging
from PIL.Image import Image
from torch import Tensor

from dedistill.errors import UserError
from dedistill.flow.guidance import CONDITIONAL, UNCONDITIONAL, Autoguidance, Branch, Evaluation, Guider, guider_of
from dedistill.flow.path import dynamic_shift
from dedistill.io.json_files import read_object
from dedistill.models.blocks import without_blocks
from dedistill.models.conditioning import Conditioning
from dedistill.models.flux.encoders import encode
from dedistill.models.flux.network import MASKING_BACKENDS, MASKS, BypassedGuidance, FluxNetwork, flux_velocity
from dedistill.models.flux.redux import Redux
from dedistill.models.image_prompts import WEIGHTS, ImagePrompt, parted
from dedistill.models.pretrained import check_folder
from dedistill.models.prompts import blocks_of
from dedistill.models.swap import LEAST, Swap, move_rest, spread

GUIDANCE = 3.5
"""dev's own default, for models that do not say what they were trained with."""
logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TextUse:
    """How a model was taught to read its text; what a model folder's ``dedistill.json`` may say."""

    mask: str = "bool"
    t5_mask: bool = True
    text_length: int = 512

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise UserError(f"mask = {self.mask!r}: one of {', '.join(MASKS)} is needed", exit_code=2)
        if type(self.t5_mask) is not bool:
            raise UserError(f"t5_mask = {self.t5_mask!r}: True or False is needed", exit_code=2)
        if type(self.text_length) is not int or not 1 <= self.text_length <= 512:
            raise UserError(f"text_length = {self.text_length!r}: 1 to 512 tokens are possible", exit_code=2)


class MaskedFluxPipeline(FluxPipeline):
    """Diffusers' FluxPipeline with masked text and classifier-free guidance between texts of different lengths.

    ``MaskedFluxPipeline.from_pretrained(folder)`` loads any FLUX.1 folder; ``MaskedFluxPipeline(**pipe.components)`` turns
    a loaded FluxPipeline into one. What it saves is a plain FluxPipeline folder.
    """

    _swapping_on: torch.device | None = None
    _redux: Redux | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> "MaskedFluxPipeline":
        if "transformer" not in kwargs and _folder_facts(str(Path(folder) / "transformer")).get("quantized"):
            raise UserError(
                f"'{folder}' is an int8 export, whose codes are not weights: add "
                "transformer=dedistill.release.export.load_int8(folder)"
            )
        for part in sorted(p for p in Path(folder).glob("*") if p.is_dir()):
            check_folder(part, "MaskedFluxPipeline")
        return super().from_pretrained(folder, **{"use_safetensors": True} | kwargs, trust_remote_code=False)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        *,
        image: Image | list[Image] | None = None,
        image_weight: float | list[float] = 1.0,
        image_scale: float | list[float] = 1.0,
        true_cfg_scale: float = 1.0,
        skip_cfg_steps: int = 0,
        guider: str = "cfg",
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        mask: str | None = None,
        t5_mask: bool | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[object]:
        """Draw images; prompts of a list may differ in length.

        image: one or several that every prompt is told beside its words, after ``load_redux``; a prompt may also name its own
        (docs/flux.md). image_weight: how much their tokens count for in attention, from 0, none, to 1; image_scale: a factor of
        the tokens, for results that were made with one. Several get one number for each, or one for all.
        negative_prompt: what guidance leads away from, one for all or one for each. true_cfg_scale: guidance between the
        two; 1 runs the prompt alone, and so do the first ``skip_cfg_steps`` steps. guider: how the two make one velocity, as
        in "apg:eta=0" (docs/sampling.md); all but "auto", since a pipeline does not know its base. guidance_scale: the
        distilled guidance, for models that have its embedding; others ignore it. By default what ``dedistill.json`` says of
        the training (passed by, where it was passed by), else 3.5.
        mask: "bool" hides padding from the transformer, "none" shows it, as plain FLUX.1 was trained, "libreflux" adds 1
        to the attention scores of the rest, as LibreFLUX was trained. t5_mask: whether T5 ignores padding too.
        max_sequence_length: T5 tokens. These three default to the model folder's ``dedistill.json``, else to "bool",
        True and 512. The other arguments are those of FluxPipeline.
        Raises UserError for settings outside these, and where the attention backend in use cannot hide padding.
        """
        use = self._text_use({"mask": mask, "t5_mask": t5_mask, "text_length": max_sequence_length})
        guided = _guider(guider, true_cfg_scale, skip_cfg_steps)
        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor
        self.check_inputs(prompt, None, height, width)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        negative = negative_prompt if true_cfg_scale != 1 else None
        own = _image_prompts(image, image_weight, image_scale)
        texts = self._branches(prompts, negative, num_images_per_prompt, use, own)

        device, channels = self._execution_device, self.transformer.config.in_channels // 4
        dtype, count = texts[CONDITIONAL].sequences[0].embeds.dtype, len(texts[CONDITIONAL])
        packed, _ = self.prepare_latents(count, channels, height, width, dtype, device, generator, latents)
        noisy = self._unpack_latents(packed, height, width, self.vae_scale_factor)
        timesteps = self._timesteps(num_inference_steps, sigmas, packed.shape[1])
        self._guidance_scale, self._num_timesteps, self._interrupt = self._distilled(guidance_scale), len(timesteps), False

        grid, memory = np.array([*(timesteps / 1000).tolist(), 0.0]), dict[int, Tensor]()
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                outputs = {
                    branch: self._velocity(branch, noisy, t, texts[Branch(prompt=branch.prompt)], use.mask)
                    for branch in guided.branches(grid, i)
                }
                out = guided.combine(outputs, Evaluation(noisy, float(grid[i]), grid, i, memory))
                noisy = self.scheduler.step(out, t, noisy, return_dict=False)[0]
                progress.update()
        images = self._images(noisy, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _velocity(self, branch: Branch, noisy: Tensor, t: Tensor, text: Conditioning, mask: str) -> Tensor:
        sigma, denoiser, family = (t.float() / 1000).expand(len(noisy)), self.transformer, FluxNetwork()
        fed = torch.full_like(sigma, self._guidance_scale) if denoiser.config.guidance_embeds else None
        with without_blocks(family.blocks(denoiser), branch.without, family.unchanged):
            return flux_velocity(denoiser, denoiser, noisy, sigma, text, mask=mask, guidance=fed)

    def load_redux(self, folder: str | Path) -> None:
        """Let prompts be images, by FLUX.1-Redux-dev in ``folder``. Its licence, for non-commercial use, goes for what it helps
        to make. Raises UserError for a folder of another kind, or for another transformer."""
        self._redux = Redux(Path(folder), self.transformer.config.joint_attention_dim)

    def enable_block_swap(self, blocks: int, device: torch.device | str = "cuda") -> None:
        """Draw on ``device`` with a transformer that is larger: ``blocks`` of its blocks, at least 3, wait in the memory of the
        CPU and are copied one ahead of their use, and so do all of the text encoders'. The images are the
        same. Takes the place of ``to(device)``; load adapters before. Raises UserError for another number of blocks.
        """
        own = FluxNetwork().blocks(self.transformer)
        if not LEAST <= blocks <= len(own):
            raise UserError(
                f"enable_block_swap({blocks}): this transformer has {len(own)} blocks, and at least {LEAST} must wait"
            )
        waiting = [own[i] for i in spread(blocks, len(own))]
        every = ((encoder, blocks_of(encoder)) for encoder in (self.text_encoder, self.text_encoder_2))
        for network, some in ((self.transformer, waiting), *every):
            move_rest(network, device, some)
            Swap(some, device)
        self.vae.to(device)
        self._swapping_on = torch.device(device)

    @property
    def _execution_device(self) -> torch.device:
        return self._swapping_on or super()._execution_device

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        # under this class's name, programs without this package could not load the folder
        FluxPipeline(**self.components).save_pretrained(*args, **kwargs)

    def _text_use(self, given: dict[str, Any]) -> TextUse:
        own = {name: value for name, value in given.items() if value is not None}
        facts = _folder_facts(self.transformer.config.get("_name_or_path"))
        return TextUse(**({name: facts[name] for name in given if name in facts} | own))

    def _distilled(self, given: float | None) -> float:
        """What the guidance embedding is fed; lets it be passed by where the model was trained so and nothing is given."""
        if not self.transformer.config.guidance_embeds:
            return 0.0 if given is None else given
        trained = _folder_facts(self.transformer.config.get("_name_or_path")).get("guidance", "unknown")
        passed = given is None and trained == "bypassed"
        embedding = BypassedGuidance if passed else CombinedTimestepGuidanceTextProjEmbeddings
        self.transformer.time_text_embed.__class__ = embedding
        if given is not None or passed:
            return given or 0.0
        return float(trained) if trained.replace(".", "", 1).isdigit() else GUIDANCE

    def _branches(
        self, prompts: list[str], negative: str | list[str] | None, copies: int, use: TextUse, images: list[ImagePrompt]
    ) -> dict[Branch, Conditioning]:
        """Both branches of guidance, each with the text of its own, and ``images`` in the first; only that without a negative
        prompt."""
        texts = {CONDITIONAL: self._encode(prompts, copies, use, images)}
        if negative is not None:
            negatives = [negative] * len(prompts) if isinstance(negative, str) else negative
            if len(negatives) != len(prompts):
                raise UserError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one for each")
            texts[UNCONDITIONAL] = self._encode(negatives, copies, use)
        self._check_backends([*texts.values()], use.mask)
        return texts

    def _encode(self, prompts: list[str], copies: int, use: TextUse, images: Sequence[ImagePrompt] = ()) -> Conditioning:
        """Every prompt ``copies`` times in a row, padded to ``use.text_length`` tokens, with ``images`` and those it names."""
        prompts, named = map(list, zip(*map(parted, prompts)))
        for prompt, ids in zip(prompts, self.tokenizer_2(prompts).input_ids):
            if len(ids) > use.text_length:
                logger.warning(f"only {use.text_length} of {len(ids)} tokens are used of the prompt '{prompt[:60]}...'")
        encoders = self.tokenizer, self.tokenizer_2, self.text_encoder, self.text_encoder_2
        text = encode(*encoders, prompts, use.text_length, t5_mask=use.t5_mask, device=self._execution_device)
        if images or any(named):
            text = self._told(text, [[*images, *own] for own in named])
        dtype = self.transformer.dtype
        text = text.each(lambda t: t.to(dtype) if t.is_floating_point() else t)
        text = text.index_select(torch.arange(len(prompts)).repeat_interleave(copies))
        return text.trimmed() if use.mask == "bool" else text

    def _told(self, text: Conditioning, images: list[list[ImagePrompt]]) -> Conditioning:
        if self._redux is None:
            raise UserError("images in prompts need FLUX.1-Redux-dev: call pipe.load_redux(folder) first", exit_code=2)
        return self._redux.tokens(self._redux.told(text, images, self._execution_device).to(self._execution_device))

    def _check_backends(self, texts: list[Conditioning], mask: str) -> None:
        """Refuse a backend set for single layers; the one set for the whole process is checked where masks are made."""
        hides = [s for text in texts for s in text.sequences[mask == "none" :] if not s.mask.all()]
        if not hides and not any(WEIGHTS in text.vectors for text in texts):
            return
        for name, processor in self.transformer.attn_processors.items():
            backend = getattr(processor, "_attention_backend", None)
            if backend and AttentionBackendName(backend) not in MASKING_BACKENDS:
                raise UserError(
                    f"attention backend '{AttentionBackendName(backend).value}' (of {name}) would not hide the padding of text "
                    "of mixed lengths; call pipe.transformer.set_attention_backend('native'), or draw prompts one by one"
                )

    def _timesteps(self, steps: int, sigmas: list[float] | None, tokens: int) -> Tensor:
        names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        mu = math.log(dynamic_shift(tokens, *(self.scheduler.config[name] for name in names)))
        grid = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
        self.scheduler.set_timesteps(sigmas=grid, mu=mu, device=self._execution_device)
        self.scheduler.set_begin_index(0)
        return self.scheduler.timesteps

    def _images(self, latents: Tensor, output_type: str) -> Tensor | np.ndarray | list[Image]:
        if output_type == "latent":
            return self._pack_latents(latents, *latents.shape)
        config = self.vae.config
        latents = (latents / config.scaling_factor + config.shift_factor).to(self.vae.dtype)
        decoded = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(decoded, output_type=output_type)


def _image_prompts(
    image: Image | list[Image] | None, weight: float | list[float], scale: float | list[float]
) -> list[ImagePrompt]:
    images = [] if image is None else image if isinstance(image, list) else [image]
    numbers = [value if isinstance(value, list) else [value] * len(images) for value in (weight, scale)]
    if wrong := next((row for row in numbers if len(row) != len(images)), None):
        raise UserError(f"{len(wrong)} numbers for {len(images)} images: give one, or one for each", exit_code=2)
    if any(not 0 <= value < math.inf for row in numbers for value in row):
        raise UserError("image_weight and image_scale: at least 0 is needed", exit_code=2)
    return [ImagePrompt(*of_one) for of_one in zip(images, *numbers)]


def _guider(name: str, cfg: float, skip: int) -> Guider:
    try:
        guider = guider_of(name, cfg, skip)
    except ValueError as e:
        raise UserError(f"guider = {name!r}: {e}", exit_code=2) from e
    if isinstance(guider, Autoguidance):
        raise UserError("guider = 'auto': a pipeline has no base apart from what was trained; dedistill sweep has", exit_code=2)
    return guider


def _folder_facts(transformer: str | None) -> dict[str, Any]:
    """What the model folder around the transformer's folder says of its use; empty where it says nothing."""
    file = Path(transformer or "").parent / "dedistill.json"
    return read_object(file) if transformer and file.is_file() else {}
