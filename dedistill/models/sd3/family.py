"""Stable Diffusion 3.5: medium, large, large-turbo, and what was made from them.

The network works on latents [16, H/8, W/8] of its VAE in patches of 2 x 2, which have places in a table of limited size.
Captions are T5's and two CLIPs' hidden states, and the vectors of both CLIPs. Its attention takes no mask: padding takes part,
as it did when these models were trained, so every caption has all its tokens and none are of mixed lengths.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pad

from dedistill.errors import UserError
from dedistill.models.blocks import joint_inputs
from dedistill.models.conditioning import Conditioning, Widths
from dedistill.models.family import Components, Guidance, Output, Pass, States, Unseen
from dedistill.models.pipeline_family import PipelineFamily
from dedistill.models.places import Place, check_folder, locate, named_path
from dedistill.models.pretrained import without_weights
from dedistill.models.prompts import CLIP_TOKENS, encoding_pass
from dedistill.models.quantize import float_dtype
from dedistill.models.sd3 import SPEC, loading, naming
from dedistill.models.sd3.encoders import ENCODERS, Sd3Text
from dedistill.models.sd3.published import config_of
from dedistill.models.vae import PublishedVae, Vae, vae_passes
from dedistill.recipe.model_tables import Model
from dedistill.recipe.resolve import filled

PATCH = 2


@dataclass(frozen=True)
class Sizes:
    """Of a network that may not be there itself."""

    text: int
    """Width of what its attention takes."""
    positions: int
    """Side of the table of positions, in patches."""


@dataclass(frozen=True)
class Sd3Place(Place):
    sizes: Sizes = Sizes(0, 0)


class Sd3(PipelineFamily):
    spec = SPEC
    patch = PATCH
    max_text_length = 512

    def load(self, spec: Model, *, seed: int, denoiser: bool = True) -> Components:
        """``spec`` is a recipe's [model] table: a diffusers folder, a hub id with its revision, or one file.

        Text encoders and VAE are found now and loaded when first used. Raises UserError when anything is missing.
        """
        _check(spec)
        place = locate(SPEC, named_path(spec), spec.revision, spec.components)
        # without it, too, its files' headers are looked at: what cannot be trained is refused before anything is encoded
        network = loading.load_transformer(place.denoiser, empty=not denoiser)
        vae, text = Vae(place.components / "vae"), Sd3Text(place.components, network.config.pooled_projection_dim)
        if (found := (network.config.in_channels, network.config.patch_size)) != (vae.channels, PATCH):
            raise UserError(
                f"model.path: the denoiser takes {found[0]} channels in patches of {found[1]}, "
                f"and its VAE has {vae.channels}: it was made for another task, or for another VAE"
            )
        _check_widths(text, network)
        sizes = Sizes(network.config.joint_attention_dim, network.config.pos_embed_max_size)
        return Components(
            network if denoiser else nn.Module(),
            text,
            _shape(vae, sizes),
            "none",
            vae=vae,
            text_length=filled(spec.text_length, "model.text_length"),
            source=Sd3Place(place.denoiser, place.components, place.scheduler, place.scheduler_file, place.facts, sizes),
            facts={"base": {"path": spec.path, "revision": spec.revision}} | place.facts,
            notes=[*_said_of(text), *self.other_use(spec, place.facts), *self.cannot_be_saved(place.components)],
        )

    def full_size(self, spec: Model) -> Components:
        _check(spec)
        path = Path(named_path(spec))
        check_folder(SPEC, path)
        if path.is_file():
            denoiser = loading.load_transformer(path, empty=True)
        else:
            config = config_of(str(path), spec.revision)
            denoiser = without_weights(SD3Transformer2DModel, config, f"model.path: '{path}'")
        around, size = Path(spec.components or path), denoiser.config
        vae = Vae(around / "vae") if (around / "vae").exists() else PublishedVae(size.in_channels)
        widths = Widths((size.joint_attention_dim, size.pooled_projection_dim), {"pooled": size.pooled_projection_dim})
        sizes = Sizes(size.joint_attention_dim, size.pos_embed_max_size)
        return Components(
            denoiser,
            Unseen(Widths(widths.sequences, widths.vectors, (None, CLIP_TOKENS))),
            _shape(vae, sizes),
            "none",
            vae=vae,
            text_length=filled(spec.text_length, "model.text_length"),
            source=Sd3Place(path, around, sizes=sizes),
        )

    def passes(self, spec: Model, height: int, width: int, length: int) -> dict[str, Pass]:
        folder = Path(spec.components or named_path(spec))
        return encoding_pass(folder, ENCODERS, length, hidden=True) | vae_passes(folder / "vae", height, width, channels=16)

    def write_tiny(self, spec: Model, folder: Path, image: tuple[int, int, int] | None, *, full_depth: bool) -> None:
        """A small pipeline folder with random weights, with the blocks of ``spec``. For rehearsals."""
        from dedistill.models.sd3.tiny import write_tiny_sd3

        config = config_of(named_path(spec), spec.revision)
        layers, dual = config["num_layers"], len(config["dual_attention_layers"])
        small = (layers, dual) if full_depth else (6, min(dual, 3))
        write_tiny_sd3(folder, layers=small[0], dual=small[1], positions=config["pos_embed_max_size"])

    def text_facts(self, components: Components) -> dict[str, Any]:
        absent = " ".join(cast(Sd3Text, components.text).absent())
        return {"t5_mask": False} | ({"absent": absent} if absent else {})

    def encode_text(self, components: Components, captions: list[str], length: int) -> Conditioning:
        return cast(Sd3Text, components.text)(captions, length, components.device)

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, int, int]:
        shape = super().latent_shape(components, height, width)
        most = cast(Sd3Place, components.source).sizes.positions * PATCH
        if max(shape[1:]) > most:
            side = most * (height // shape[1])
            raise UserError(f"images of {width} x {height} pixels: this network has places for {side} pixels a side at most", 2)
        return shape

    def velocity(
        self,
        components: Components,
        denoiser: nn.Module,
        noisy: Tensor,
        sigma: Tensor,
        text: Conditioning,
        guidance: Guidance = None,
    ) -> Tensor:
        if guidance is not None:
            raise UserError("this network has no guidance embedding; leave the distilled guidance out")
        dtype, sizes = float_dtype(components.denoiser), cast(Sd3Place, components.source).sizes
        out = denoiser(
            hidden_states=noisy.to(dtype),
            encoder_hidden_states=_joint(text, sizes.text, components.text_length).to(dtype),
            pooled_projections=text.vectors["pooled"].to(dtype),
            timestep=1000 * sigma,  # in float32: the network itself rounds no noise level
            return_dict=False,
        )[0]
        return cast(Tensor, out)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return list(cast(SD3Transformer2DModel, denoiser).transformer_blocks)

    passed_on = "encoder_hidden_states", "hidden_states"

    def unchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        image, text = joint_inputs(args, kwargs)
        return text, image

    def states(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output, text: Conditioning) -> States:
        """Blocks return (text, image); the last one returns no text."""
        encoder_states, hidden_states = output
        image, words = joint_inputs(args, kwargs)
        found: States = {"image": (image, hidden_states, None)}
        if encoder_states is not None:
            found["text"] = (words, encoder_states, None)
        return found

    def presets(self, denoiser: nn.Module) -> dict[str, list[str]]:
        return naming.presets(denoiser)


def _joint(text: Conditioning, width: int, length: int) -> Tensor:
    """What the attention takes beside the image: CLIP's tokens, their width filled up with zeros, then T5's.

    A sequence that has no tokens stands for zeros. Raises ValueError for one of another length: its padding would be missing.
    """
    t5, clip = text.sequences
    found = []
    for tokens, wanted in ((clip, CLIP_TOKENS), (t5, length)):
        if tokens.embeds.shape[1] not in (0, wanted):
            raise ValueError(f"captions of {tokens.embeds.shape[1]} tokens; this network takes {wanted}, padding among them")
        rows, columns = tokens.embeds.shape[1:]
        found.append(pad(tokens.embeds, (0, width - columns, 0, wanted - rows)))
    dtype = torch.promote_types(*(embeds.dtype for embeds in found))
    return torch.cat([embeds.to(dtype) for embeds in found], 1)


def _check(spec: Model) -> None:
    """Raises UserError for what has no effect, or none that these models could be used with."""
    if spec.mask != "none" or spec.t5_mask:
        key = "mask" if spec.mask != "none" else "t5_mask"
        raise UserError(f"model.{key}: {SPEC.name} hides no padding: its attention takes no mask; leave the key out", 2)
    for key in ("guidance", "null", "new"):
        if getattr(spec, key) is not None:
            raise UserError(f"model.{key}: has no effect on {SPEC.name}; leave it out", 2)


def _check_widths(text: Sd3Text, network: SD3Transformer2DModel) -> None:
    """Raises UserError for encoders whose hidden states or vectors this network does not take."""
    t5, clip = text.widths.sequences
    size = network.config
    if t5 not in (0, size.joint_attention_dim) or clip > size.joint_attention_dim:
        found, wanted = f"hidden states of {max(t5, clip)} numbers", size.joint_attention_dim
    elif text.widths.vectors["pooled"] != size.pooled_projection_dim:
        found, wanted = f"vectors of {text.widths.vectors['pooled']} numbers", size.pooled_projection_dim
    else:
        return
    raise UserError(f"model.path: the text encoders in '{text.folder}' make {found}; the network takes {wanted}")


def _shape(vae: Vae | PublishedVae, sizes: Sizes) -> tuple[int, int, int]:
    side = min(1024 // vae.scale, sizes.positions * PATCH)
    return (vae.channels, side, side)


def _said_of(text: Sd3Text) -> list[str]:
    if not (absent := text.absent()):
        return []
    cut = f", and captions are cut at {CLIP_TOKENS} tokens" if "t5" not in text.encoders else ""
    return [f"no {' and no '.join(absent)} in '{text.folder}': zeros take their place{cut}"]
