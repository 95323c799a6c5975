"""FLUX in pixel space: diffusers' FluxTransformer2DModel on small images, with a frozen word-level text encoder."""

import json
import math
from pathlib import Path
from typing import cast

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from dedistill.errors import UserError
from dedistill.flow.path import dynamic_shift
from dedistill.io.json_files import read_object
from dedistill.models.conditioning import Conditioning
from dedistill.models.family import MADE, Components, Pass, prediction_facts
from dedistill.models.flux.network import FluxNetwork
from dedistill.models.pixel_flux import SPEC
from dedistill.models.places import check_folder
from dedistill.models.pretrained import load_whole, without_weights
from dedistill.models.words import WordEncoder
from dedistill.recipe.model_tables import Architecture, Model
from dedistill.recipe.resolve import filled


class PixelFlux(FluxNetwork):
    spec = SPEC
    max_text_length = 512

    def load(self, spec: Model, *, seed: int, denoiser: bool = True) -> Components:
        """``spec`` is a recipe's [model] table. Raises UserError when the folder is not a model of this family."""
        for key, plain in (("revision", None), ("components", None), ("guidance", None), ("null", None), ("t5_mask", True)):
            if getattr(spec, key) != plain:
                raise UserError(f"model.{key}: has no effect on {self.spec.name}; leave it out", 2)
        if spec.path is not None:
            return self._from_folder(Path(spec.path), filled(spec.mask, "model.mask"))
        if spec.new is None:
            raise UserError("model: a path of trained weights, or the sizes of a new network, are needed", 2)
        return self.build(spec.new, mask=filled(spec.mask, "model.mask"), seed=seed)

    def build(self, new: Architecture, *, mask: str = "bool", seed: int = 0) -> Components:
        """A network with random weights that depend on ``seed`` alone; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser = FluxTransformer2DModel(
                patch_size=1,
                in_channels=new.channels * new.patch**2,
                num_layers=new.layers,
                num_single_layers=new.single_layers,
                attention_head_dim=new.head_dim,
                num_attention_heads=new.heads,
                joint_attention_dim=new.text_dim,
                pooled_projection_dim=new.pooled_dim,
                guidance_embeds=False,
                axes_dims_rope=tuple(new.rope_axes),
            )
        image = (new.channels, new.height, new.width)
        return Components(denoiser, WordEncoder(new.text_dim, new.pooled_dim), image, mask)

    def tiny(self, seed: int, shape: tuple[int, int, int] = (1, 8, 16)) -> Components:
        sizes = Architecture(
            channels=shape[0],
            height=shape[1],
            width=shape[2],
            patch=shape[1] // 2,
            layers=1,
            single_layers=1,
            heads=2,
            head_dim=16,
            rope_axes=[4, 6, 6],
            text_dim=16,
            pooled_dim=16,
        )
        return self.build(sizes, seed=seed)

    def full_size(self, spec: Model) -> Components:
        mask = filled(spec.mask, "model.mask")
        with torch.device("meta"):
            if spec.new is not None:
                return self.build(spec.new, mask=mask)
            folder = Path(spec.path or "")
            check_folder(self.spec, folder)
            # where there is none, an earlier stage will make it
            return self._from_folder(folder, mask, empty=True) if (folder / "transformer").exists() else self.tiny(0)

    def passes(self, spec: Model, height: int, width: int, length: int) -> dict[str, Pass]:
        return {}

    def write_tiny(self, spec: Model, folder: Path, image: tuple[int, int, int] | None, *, full_depth: bool) -> None:
        self.save(self.tiny(0, image or (1, 8, 16)), folder)

    def save(self, components: Components, folder: Path) -> None:
        _denoiser(components).save_pretrained(folder / "transformer")
        self.save_rest(components, folder)

    def save_rest(self, components: Components, folder: Path) -> None:
        made = {key: components.facts[key] for key in MADE if key in components.facts}
        facts = (
            made
            | prediction_facts(self.spec, components)
            | {
                "family": self.spec.name,
                "sample_shape": components.sample_shape,
                "mask": components.mask,
                "shift": components.sample_shift or "auto",
                "text": _text(components).config(),
            }
        )
        (folder / "dedistill.json").write_text(json.dumps(facts, indent=1) + "\n")

    def _from_folder(self, folder: Path, mask: str, *, empty: bool = False) -> Components:
        """empty: the denoiser by its config alone, without numbers."""
        check_folder(self.spec, folder)
        missing = f"model.path: no {self.spec.name} model in '{folder}' (train it first)"
        facts = read_object(folder / "dedistill.json", missing)
        try:
            shape = facts["picture"] if "picture" in facts else facts["sample_shape"]  # the first: of models made before
            image, text = tuple(shape), WordEncoder(**facts["text"])
        except (ValueError, KeyError, TypeError, ArithmeticError) as e:
            raise UserError(f"{missing}: {e}") from e
        place = folder / "transformer"
        if empty:
            config = read_object(place / "config.json", "model.path")
            denoiser = without_weights(FluxTransformer2DModel, config, f"model.path: '{place}'")
        else:
            denoiser = load_whole(FluxTransformer2DModel, place, "model.path")
        made = {key: facts[key] for key in MADE if key in facts}
        made = {"base": {"path": str(folder), "revision": None}} | made
        return Components(denoiser, text, image, mask, facts=made)

    def encode_text(self, components: Components, captions: list[str], length: int) -> Conditioning:
        return _text(components)(captions, length)

    def encode_images(self, components: Components, pixels: Tensor, noise: Tensor) -> Tensor:
        """The pixels themselves; as grey, where there is one channel."""
        return pixels if components.sample_shape[0] == pixels.shape[1] else pixels.mean(1, keepdim=True)

    def decode(self, components: Components, latents: Tensor) -> Tensor:
        return latents

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, int, int]:
        if (height, width) != components.sample_shape[1:]:
            raise UserError(
                f"this network makes images of {components.sample_shape[2]} x {components.sample_shape[1]} pixels only", 2
            )
        return components.sample_shape

    def tokens(self, components: Components, shape: tuple[int, ...]) -> int:
        return _tokens(shape, _denoiser(components))

    def shift(self, components: Components, tokens: int) -> float:
        return dynamic_shift(tokens)


def _denoiser(components: Components) -> FluxTransformer2DModel:
    return components.denoiser


def _text(components: Components) -> WordEncoder:
    return cast(WordEncoder, components.text)


def _tokens(image: tuple[int, ...], denoiser: FluxTransformer2DModel) -> int:
    return math.prod(image) // denoiser.config.in_channels
