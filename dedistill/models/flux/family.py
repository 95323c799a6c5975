"""FLUX.1: schnell, dev, Flex.1-alpha, LibreFLUX, OpenFLUX, and what was cut from them.

The network works on latents [16, H/8, W/8] of its VAE in patches of 2 x 2. Captions are T5's hidden
states and CLIP's pooled vector.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings
from torch import Tensor, nn

from dedistill.errors import UserError
from dedistill.flow.timesteps import dynamic_shift
from dedistill.io.atomic import replace_json
from dedistill.io.json_files import read_object
from dedistill.models.conditioning import Conditioning, Widths
from dedistill.models.family import MADE, Components, Pass, Unseen
from dedistill.models.flux import SPEC, loading
from dedistill.models.flux.encoders import FluxText, FluxVae, PublishedVae
from dedistill.models.flux.network import FluxBlocks, flux_velocity
from dedistill.models.flux.published import SCHEDULER, shape_of
from dedistill.models.pipeline_files import copy_files, pipeline_files
from dedistill.recipe.model_tables import Model
from dedistill.recipe.resolve import filled

PATCH = 2
SAVED = ("model_index.json", "scheduler")
"""What a folder of ours takes from its base beside the denoiser; the rest it points to."""


class Flux(FluxBlocks):
    spec = SPEC
    max_text_length = 512

    def load(self, spec: Model, *, seed: int, denoiser: bool = True) -> Components:
        """``spec`` is a recipe's [model] table: a diffusers folder, a hub id with its revision, or one BFL file.

        Text encoders and VAE are found now and loaded when first used. Raises UserError when anything is missing.
        """
        place = loading.locate(_path(spec), spec.revision, spec.components)
        # without it, too, its files' headers are looked at: what cannot be trained is refused before anything is encoded
        network = loading.load_transformer(place.transformer, place.components, empty=not denoiser)
        vae = FluxVae(place.components / "vae")
        if (channels := network.config.in_channels) != vae.channels * PATCH**2:
            raise UserError(
                f"model.path: the denoiser takes {channels} numbers of each patch, and a patch has {vae.channels * PATCH**2}: "
                "it was made for another task, such as filling in, or for another VAE"
            )
        guidance = self._guidance(network, spec.guidance)
        return Components(
            network if denoiser else nn.Module(),
            FluxText(place.components, spec.t5_mask),
            (vae.channels, 1024 // vae.scale, 1024 // vae.scale),
            spec.mask,
            vae=vae,
            text_length=filled(spec.text_length, "model.text_length"),
            guidance=guidance if denoiser else None,
            source=place,
            facts={"base": {"path": spec.path, "revision": spec.revision}} | place.facts,
            notes=[*_other_use(spec, place.facts), *_cannot_be_saved(place.components)],
        )

    def _guidance(self, denoiser: FluxTransformer2DModel, wanted: float | str | None) -> float | None:
        """The value the guidance embedding is fed in training; None for a network that has none or goes past it."""
        if not denoiser.config.guidance_embeds:
            if wanted is not None:
                raise UserError("model.guidance: this network has no guidance embedding (schnell); leave the key out", 2)
            return None
        if wanted == "bypass":
            denoiser.time_text_embed.__class__ = BypassedGuidance  # same parameters and names, another forward
            return None
        if wanted is None:
            raise UserError("model.guidance: this network has a guidance embedding; set what it is fed, usually 1.0", 2)
        return float(wanted)

    def full_size(self, spec: Model) -> Components:
        place = Path(_path(spec))
        with torch.device("meta"):
            if (config := place / "transformer" / "config.json").exists():
                denoiser = loading.empty_network(read_object(config, "model.path"), str(config))
            else:
                shape = shape_of(str(place), spec.revision)
                sizes = {"num_layers": shape.layers, "num_single_layers": shape.single_layers}
                denoiser = FluxTransformer2DModel(**sizes, guidance_embeds=shape.guidance)
        around = Path(spec.components or place) / "vae"
        vae = FluxVae(around) if around.exists() else PublishedVae(denoiser.config.in_channels // PATCH**2)
        size = denoiser.config
        return Components(
            denoiser,
            Unseen(Widths((size.joint_attention_dim,), {"pooled": size.pooled_projection_dim})),
            (vae.channels, 1024 // vae.scale, 1024 // vae.scale),
            spec.mask,
            vae=vae,
            guidance=self._guidance(denoiser, spec.guidance),
        )

    def passes(self, spec: Model, height: int, width: int, length: int) -> dict[str, Pass]:
        from dedistill.models.flux.passes import passes

        return passes(Path(spec.components or _path(spec)), height, width, length)

    def write_tiny(self, spec: Model, folder: Path, image: tuple[int, int, int] | None, *, full_depth: bool) -> None:
        """A small pipeline folder with random weights, with the blocks and the guidance of ``spec``. For rehearsals."""
        from dedistill.models.flux.tiny import write_tiny_flux

        shape = shape_of(_path(spec), spec.revision)
        layers, single_layers = (shape.layers, shape.single_layers) if full_depth else (2, 4)
        write_tiny_flux(folder, guidance=shape.guidance, layers=layers, single_layers=single_layers)

    def save(self, components: Components, folder: Path) -> None:
        """The denoiser in ``folder/transformer``; encoders, VAE and scheduler stay where they are and are pointed to."""
        _denoiser(components).save_pretrained(folder / "transformer")
        self.save_rest(components, folder)

    def save_rest(self, components: Components, folder: Path) -> None:
        made = {key: components.facts[key] for key in MADE if key in components.facts}
        text = {"mask": components.mask, "t5_mask": _text(components).t5_mask, "text_length": components.text_length}
        facts = made | {"family": self.spec.name, "guidance": _guidance_fact(components), **text}
        facts["components"] = str(_place(components).components.resolve())
        facts["shift"] = components.sample_shift or "auto"
        copy_files(pipeline_files(_place(components).components, SPEC.folder, SAVED)[0], folder)
        _save_scheduler(components, folder)
        (folder / "dedistill.json").write_text(json.dumps(facts, indent=1) + "\n")

    def cache_inputs(self, components: Components, length: int) -> dict[str, dict[str, Any]]:
        text = {"text_length": length, "t5_mask": _text(components).t5_mask, "padding": components.mask != "bool"}
        return {
            "latents": {"family": self.spec.name, "vae": _vae(components).files()},
            "text": {"family": self.spec.name, "encoders": _text(components).files(), **text},
        }

    def encode_text(self, components: Components, captions: list[str], length: int) -> Conditioning:
        return _text(components)(captions, length, components.device)

    def encode_images(self, components: Components, pixels: Tensor, noise: Tensor) -> Tensor:
        return _vae(components).encode(pixels, noise, components.device)

    def decode(self, components: Components, latents: Tensor) -> Tensor:
        return _vae(components).decode(latents, components.device)

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, int, int]:
        step = _vae(components).scale * PATCH
        if height % step or width % step:
            raise UserError(f"images of {width} x {height} pixels: both sides must be multiples of {step}", 2)
        return (_vae(components).channels, height // _vae(components).scale, width // _vae(components).scale)

    def velocity(
        self,
        components: Components,
        denoiser: nn.Module,
        noisy: Tensor,
        sigma: Tensor,
        text: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """``guidance`` None: the value of training."""
        value = components.guidance if guidance is None else guidance
        embedding = _denoiser(components).time_text_embed
        if value is not None and type(embedding) is not CombinedTimestepGuidanceTextProjEmbeddings:
            raise UserError("this network has no guidance embedding, or bypasses it; leave the distilled guidance out")
        fed = None if value is None else torch.full((len(noisy),), value, device=noisy.device)
        if type(embedding) is BypassedGuidance:
            fed = torch.zeros(len(noisy), device=noisy.device)  # diffusers wants a number; it is not looked at
        return flux_velocity(denoiser, embedding, noisy, sigma, text, patch=PATCH, mask=components.mask, guidance=fed)

    def tokens(self, components: Components, shape: tuple[int, ...]) -> int:
        return _tokens(shape)

    def shift(self, components: Components, tokens: int) -> float:
        """As the model's own scheduler says: schnell has 1, dev grows with the number of image tokens."""
        place = _place(components)
        s, file = place.scheduler, place.scheduler_file
        if not s:
            raise UserError(
                f"shift = 'auto' needs '{file}', which is missing: fetch it, or set a number (timesteps.shift, sample.shift)"
            )
        try:
            if not s.get("use_dynamic_shifting", False):
                return float(s.get("shift", 1.0))
            low, high = float(s.get("base_shift", 0.5)), float(s.get("max_shift", 1.15))
            few, many = int(s.get("base_image_seq_len", 256)), int(s.get("max_image_seq_len", 4096))
            return dynamic_shift(tokens, low, high, few, many)
        except (TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"model.path: '{file}' does not describe a shift: {e}") from e


class BypassedGuidance(CombinedTimestepGuidanceTextProjEmbeddings):
    """Time and pooled text only, as Flex.1-alpha is trained; the guidance embedder keeps its weights and is not called."""

    def forward(self, timestep: Tensor, guidance: Tensor, pooled_projection: Tensor) -> Tensor:
        time = self.timestep_embedder(self.time_proj(timestep).to(pooled_projection.dtype))
        return time + self.text_embedder(pooled_projection)


def _path(spec: Model) -> str:
    if spec.path is None:
        raise UserError("model.path: this family starts from trained weights: a diffusers folder, a hub id, or a file", 2)
    return spec.path


def _denoiser(components: Components) -> FluxTransformer2DModel:
    return components.denoiser


# what ``Flux.load`` has put there


def _text(components: Components) -> FluxText:
    return cast(FluxText, components.text)


def _vae(components: Components) -> FluxVae:
    return cast(FluxVae, components.vae)


def _place(components: Components) -> loading.Place:
    return cast(loading.Place, components.source)


def _guidance_fact(components: Components) -> str:
    """What the guidance embedding is fed, for those who use the weights: "none" without one, "bypassed", or the value."""
    if not _denoiser(components).config.guidance_embeds:
        return "none"
    return "bypassed" if components.guidance is None else str(components.guidance)


def _other_use(spec: Model, facts: dict[str, Any]) -> list[str]:
    """Settings in which a recipe differs from what the weights were trained with: allowed, but never unnoticed."""
    settings = {"mask": spec.mask, "t5_mask": spec.t5_mask}
    return [
        f"model.{key} = {value!r} here; '{spec.path}' was trained with {facts[key]!r}"
        for key, value in settings.items()
        if key in facts and facts[key] != value
    ]


def _save_scheduler(components: Components, folder: Path) -> None:
    """The model's own scheduler, at the shift that the recipe's images are made with where that is a number."""
    place, shift = _place(components), components.sample_shift
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | place.scheduler
    if isinstance(shift, (int, float)):
        config |= {"shift": shift, "use_dynamic_shifting": False}
    elif place.scheduler_file == place.components / SCHEDULER:
        return  # copied already
    (folder / SCHEDULER).parent.mkdir(exist_ok=True)
    replace_json(folder / SCHEDULER, config)


def _cannot_be_saved(components: Path) -> list[str]:
    """Why ``save_rest`` will refuse, told before a training that would end with it."""
    try:
        pipeline_files(components, SPEC.folder, SAVED)
    except UserError as e:
        return [f"no model folder can be written with this base: {e}"]
    return []


def _tokens(shape: tuple[int, ...]) -> int:
    return shape[1] * shape[2] // PATCH**2
