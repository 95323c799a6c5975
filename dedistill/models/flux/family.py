"""FLUX.1: schnell, dev, Flex.1-alpha, LibreFLUX, OpenFLUX, and what was cut from them.

The network works on latents [16, H/8, W/8] of its VAE in patches of 2 x 2. Captions are T5's hidden
states and CLIP's pooled vector.
"""

from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models.conditioning import Conditioning, Widths
from dedistill.models.family import Components, Pass, Unseen
from dedistill.models.flux import SPEC, loading
from dedistill.models.flux.encoders import ENCODERS, FluxText
from dedistill.models.flux.network import BypassedGuidance, FluxNetwork
from dedistill.models.flux.published import shape_of
from dedistill.models.flux.redux import Redux
from dedistill.models.pipeline_family import PipelineFamily
from dedistill.models.places import check_folder, locate, named_path
from dedistill.models.prompts import encoding_pass
from dedistill.models.vae import PublishedVae, Vae, vae_passes
from dedistill.recipe.model_tables import Model
from dedistill.recipe.resolve import filled

PATCH = 2


class Flux(FluxNetwork, PipelineFamily):
    spec = SPEC
    patch = PATCH
    max_text_length = 512

    def load(self, spec: Model, *, seed: int, denoiser: bool = True) -> Components:
        """``spec`` is a recipe's [model] table: a diffusers folder, a hub id with its revision, or one BFL file.

        Text encoders and VAE are found now and loaded when first used. Raises UserError when anything is missing.
        """
        place = locate(SPEC, named_path(spec), spec.revision, spec.components)
        # without it, too, its files' headers are looked at: what cannot be trained is refused before anything is encoded
        network = loading.load_transformer(place.denoiser, place.components, empty=not denoiser)
        vae = Vae(place.components / "vae")
        if (channels := network.config.in_channels) != vae.channels * PATCH**2:
            raise UserError(
                f"model.path: the denoiser takes {channels} numbers of each patch, and a patch has {vae.channels * PATCH**2}: "
                "it was made for another task, such as filling in, or for another VAE"
            )
        guidance = self._guidance(network, spec.guidance)
        if spec.null is not None:
            raise UserError("model.null: captions are dropped to the empty caption here; leave the key out", 2)
        return Components(
            network if denoiser else nn.Module(),
            FluxText(place.components, filled(spec.t5_mask, "model.t5_mask")),
            (vae.channels, 1024 // vae.scale, 1024 // vae.scale),
            filled(spec.mask, "model.mask"),
            image_prompts=_redux(spec, network),
            vae=vae,
            text_length=filled(spec.text_length, "model.text_length"),
            guidance=guidance if denoiser else None,
            takes_guidance=guidance is not None,
            source=place,
            facts={"base": {"path": spec.path, "revision": spec.revision}} | place.facts,
            notes=[*self.other_use(spec, place.facts), *self.cannot_be_saved(place.components)],
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
        place = Path(named_path(spec))
        check_folder(SPEC, place)
        with torch.device("meta"):
            if (config := place / "transformer" / "config.json").exists():
                denoiser = loading.empty_network(read_object(config, "model.path"), str(config))
            else:
                shape = shape_of(str(place), spec.revision)
                sizes = {"num_layers": shape.layers, "num_single_layers": shape.single_layers}
                denoiser = FluxTransformer2DModel(**sizes, guidance_embeds=shape.guidance)
        around = Path(spec.components or place) / "vae"
        vae = Vae(around) if around.exists() else PublishedVae(denoiser.config.in_channels // PATCH**2)
        size, guidance = denoiser.config, self._guidance(denoiser, spec.guidance)
        return Components(
            denoiser,
            Unseen(Widths((size.joint_attention_dim,), {"pooled": size.pooled_projection_dim})),
            (vae.channels, 1024 // vae.scale, 1024 // vae.scale),
            filled(spec.mask, "model.mask"),
            image_prompts=_redux(spec, denoiser),
            vae=vae,
            guidance=guidance,
            takes_guidance=guidance is not None,
        )

    def passes(self, spec: Model, height: int, width: int, length: int) -> dict[str, Pass]:
        folder = Path(spec.components or named_path(spec))
        return encoding_pass(folder, ENCODERS, length, masked=True) | vae_passes(folder / "vae", height, width, channels=16)

    def write_tiny(self, spec: Model, folder: Path, image: tuple[int, int, int] | None, *, full_depth: bool) -> None:
        """A small pipeline folder with random weights, with the blocks and the guidance of ``spec``. For rehearsals."""
        from dedistill.models.flux.tiny import write_tiny_flux, write_tiny_redux

        shape = shape_of(named_path(spec), spec.revision)
        layers, single_layers = (shape.layers, shape.single_layers) if full_depth else (2, 4)
        write_tiny_flux(folder, guidance=shape.guidance, layers=layers, single_layers=single_layers)
        if spec.image_prompts:
            write_tiny_redux(folder / "image_prompts")

    def text_facts(self, components: Components) -> dict[str, Any]:
        return {"t5_mask": _text(components).t5_mask}

    def encode_text(self, components: Components, captions: list[str], length: int) -> Conditioning:
        return _text(components)(captions, length, components.device)


def _redux(spec: Model, denoiser: FluxTransformer2DModel) -> Redux | None:
    return Redux(Path(spec.image_prompts), denoiser.config.joint_attention_dim) if spec.image_prompts else None


def _denoiser(components: Components) -> FluxTransformer2DModel:
    return components.denoiser


def _text(components: Components) -> FluxText:
    return cast(FluxText, components.text)  # as ``Flux.load`` has put it there
