"""FLUX.1-Redux: tokens that SigLIP's features of an image become, beside the text's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from torch import Tensor, nn

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models.conditioning import Conditioning, Tokens
from dedistill.models.flux import SPEC
from dedistill.models.flux.published import REDUX
from dedistill.models.image_prompts import SCALES, ImagePrompts
from dedistill.models.pretrained import check_folder, load_whole, reading
from dedistill.models.registry import get_it

KEY = "model.image_prompts"
PARTS = ("image_encoder", "feature_extractor", "image_embedder")
BATCH = 8


class Siglip:
    """Vision tower of a folder as FLUX.1-Redux-dev has it."""

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{KEY}: {folder}: no such folder{get_it(SPEC, str(folder), REDUX.id)}", 2)
        if missing := [part for part in PARTS if not (folder / part).is_dir()]:
            raise UserError(f"{KEY}: '{folder}' has no folder '{missing[0]}'; it must be that of FLUX.1-Redux-dev", 2)
        config = read_object(folder / "image_encoder" / "config.json", KEY)
        try:
            self.shape = (config["image_size"] // config["patch_size"]) ** 2, int(config["hidden_size"])
        except (KeyError, TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"{KEY}: '{folder}/image_encoder' has no usable config.json: {e!r}") from e
        self._loaded: nn.Module | None = None

    def files(self) -> list[Path]:
        return [file for part in PARTS[:2] for file in (self.folder / part).iterdir() if file.is_file()]

    def unload(self) -> None:
        self._loaded = None

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], device: torch.device | str) -> Tensor:
        """The last hidden states [n, T, D], float32, as diffusers' FluxPriorReduxPipeline takes them."""
        from transformers import SiglipImageProcessor, SiglipVisionModel

        source = f"{KEY}: the image encoder in '{self.folder}'"
        extractor = self.folder / "feature_extractor"
        check_folder(extractor, source)
        with reading(f"{KEY}: '{extractor}' cannot be read"):
            processor = SiglipImageProcessor.from_pretrained(extractor, local_files_only=True, trust_remote_code=False)
        if self._loaded is None:
            self._loaded = load_whole(SiglipVisionModel, self.folder / "image_encoder", source, dtype="auto").to(device).eval()
        first = next(self._loaded.parameters())
        found = []
        for start in range(0, len(images), BATCH):
            pixels = processor.preprocess(
                images=list(images[start : start + BATCH]), do_resize=True, do_convert_rgb=True, return_tensors="pt"
            ).pixel_values
            found.append(self._loaded(pixels.to(first.device, first.dtype)).last_hidden_state.float())
        return torch.cat(found)


class Redux(ImagePrompts):
    """What a folder of FLUX.1-Redux-dev makes of images for a network of ``width`` text features."""

    def __init__(self, folder: Path, width: int):
        super().__init__(Siglip(folder))
        source = f"{KEY}: the embedder in '{folder}'"
        self.embedder = load_whole(ReduxImageEncoder, folder / "image_embedder", source).eval().requires_grad_(False)
        takes, makes = self.embedder.config.redux_dim, self.embedder.config.txt_in_features
        if takes != self.encoder.shape[1]:
            raise UserError(f"{source} takes {takes} features, and its image encoder makes {self.encoder.shape[1]}")
        if makes != width:
            raise UserError(f"{source} is for a denoiser that takes {makes} text features; this one takes {width}", 2)

    def tokens(self, text: Conditioning) -> Conditioning:
        """``text`` with its images' features as tokens of the text's width, float32."""
        if len(text.sequences) == 1:
            return text
        scales = text.vectors.get(SCALES)
        sequences = [text.sequences[0]]
        for i, image in enumerate(text.sequences[1:]):
            embedder = self.embedder.to(image.embeds.device)
            embeds = embedder(image.embeds.float()).image_embeds
            sequences.append(Tokens(embeds if scales is None else embeds * scales[:, i, None, None], image.mask))
        return replace(text, sequences=tuple(sequences))
