"""What the example does: its network, what its network is told, and between the two what models.family.Family asks for."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from dedistill.errors import UserError
from dedistill.flow.parameterization import to_velocity
from dedistill.io.json_files import read_object
from dedistill.models.conditioning import Conditioning, Widths
from dedistill.models.example import SPEC
from dedistill.models.family import MADE, Components, Guidance, Output, Pass, States, prediction_facts
from dedistill.models.places import check_folder
from dedistill.models.pretrained import load_whole
from dedistill.models.quantize import float_dtype
from dedistill.models.words import WordEncoder
from dedistill.recipe.model_tables import Model

SCALE = 8
"""Pixels per latent, each way."""
SECOND = 4
"""Tokens of the second sequence at most."""
HIGHEST = 0.9
"""Sigma up to which the network is asked: noise alone says nothing of the image."""


class Block(nn.Module):
    """A convolution, then attention of every place to both sequences of text."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.to_q, self.to_kv, self.to_out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x [B, D, H, W], text [B, T, D], mask [B, T]."""
        x = x + self.conv(F.silu(self.norm(x)))
        key, value = self.to_kv(text).chunk(2, -1)
        seen = F.scaled_dot_product_attention(self.to_q(x.flatten(2).mT), key, value, attn_mask=mask[:, None])
        return x + self.to_out(seen).mT.unflatten(2, x.shape[2:])


class ExampleNet(ModelMixin, ConfigMixin):
    """Predicts the noise in ``noisy`` [B, C, H, W] at ``sigma`` [B]."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, channels: int = 3, width: int = 32, layers: int = 2, text_widths: tuple[int, ...] = (16, 24)):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 3, padding=1)
        self.time, self.text = nn.Linear(16, width), nn.ModuleList(nn.Linear(n, width) for n in text_widths)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.gradient_checkpointing = False

    def forward(self, noisy: Tensor, sigma: Tensor, embeds: list[Tensor], masks: list[Tensor]) -> Tensor:
        angles = sigma[:, None] * 2.0 ** torch.arange(8, device=sigma.device)
        waves = torch.cat([angles.sin(), angles.cos()], 1).to(noisy.dtype)
        x = self.conv_in(noisy) + self.time(waves)[:, :, None, None]
        text, mask = torch.cat([linear(e) for linear, e in zip(self.text, embeds)], 1), torch.cat(masks, 1)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, text, mask)
            else:
                x = block(x, text, mask)
        return self.conv_out(F.silu(x))


class TwoTexts:
    """Every word twice, in sequences of different widths; of the second only the first words."""

    def __init__(self, widths: tuple[int, ...]):
        self.widths, self._encoders = Widths(tuple(widths)), [WordEncoder(width, 0) for width in widths]

    def __call__(self, captions: list[str], length: int) -> Conditioning:
        lengths = (length, min(length, SECOND))
        return Conditioning(tuple(e(captions, n).tokens for e, n in zip(self._encoders, lengths)))

    def tokens(self, captions: list[str]) -> list[int]:
        return self._encoders[0].tokens(captions)

    def check(self) -> None:
        """There are no files."""

    def unload(self) -> None:
        """There is nothing to free."""


class MeanCodec:
    """A latent is the mean colour of 8 x 8 pixels."""

    def check(self) -> None:
        """There are no files."""

    def unload(self) -> None:
        """There is nothing to free."""

    def in_tiles(self) -> bool:
        return False


class Example:
    spec = SPEC
    max_text_length = 512

    def load(self, spec: Model, *, seed: int, denoiser: bool = True) -> Components:
        plain = dict.fromkeys(("revision", "components", "guidance", "null", "new")) | {"t5_mask": True, "mask": "bool"}
        for key, value in plain.items():
            if getattr(spec, key) != value:
                raise UserError(f"model.{key}: has no effect on {SPEC.name}; leave it out", 2)
        folder = Path(spec.path or "")
        check_folder(SPEC, folder)
        facts, config = (read_object(folder / f, "model.path") for f in ("dedistill.json", f"{SPEC.folder}/config.json"))
        try:
            widths, channels = config["text_widths"], config["channels"]
        except KeyError as e:
            raise UserError(f"model.path: no {SPEC.name} model in '{folder}': {e} is missing") from e
        network = load_whole(ExampleNet, folder / SPEC.folder, "model.path") if denoiser else nn.Module()
        made = {"base": {"path": str(folder), "revision": None}} | {key: facts[key] for key in MADE if key in facts}
        image = (channels, SPEC.resolution // SCALE, SPEC.resolution // SCALE)
        return Components(network, TwoTexts(widths), image, vae=MeanCodec(), facts=made)

    def full_size(self, spec: Model) -> Components:
        check_folder(SPEC, Path(spec.path or ""))
        config = Path(spec.path or "") / SPEC.folder / "config.json"
        with torch.device("meta"):
            net = ExampleNet.from_config(read_object(config)) if config.exists() else ExampleNet(width=256, layers=8)
        side = SPEC.resolution // SCALE
        return Components(net, TwoTexts(net.config.text_widths), (net.config.channels, side, side), vae=MeanCodec())

    def passes(self, spec: Model, height: int, width: int, length: int) -> dict[str, Pass]:
        return {}

    def write_tiny(self, spec: Model, folder: Path, image: tuple[int, int, int] | None, *, full_depth: bool) -> None:
        self.save(self.tiny(0, layers=8 if full_depth else 2), folder)

    def tiny(self, seed: int, layers: int = 2) -> Components:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser = ExampleNet(layers=layers)
        return Components(denoiser, TwoTexts(denoiser.config.text_widths), (3, 8, 8), vae=MeanCodec())

    def save(self, components: Components, folder: Path) -> None:
        cast(ExampleNet, components.denoiser).save_pretrained(folder / SPEC.folder)
        self.save_rest(components, folder)

    def save_rest(self, components: Components, folder: Path) -> None:
        made = {key: components.facts[key] for key in MADE if key in components.facts}
        facts = (
            made
            | prediction_facts(SPEC, components)
            | {"family": SPEC.name, "mask": "bool", "shift": components.sample_shift or "auto"}
        )
        (folder / "dedistill.json").write_text(json.dumps(facts, indent=1) + "\n")

    def cache_inputs(self, components: Components, length: int) -> dict[str, dict[str, Any]]:
        text = {"family": SPEC.name, "widths": str(components.text.widths.sequences), "text_length": length}
        return {"latents": {"family": SPEC.name, "codec": f"mean of {SCALE} x {SCALE}"}, "text": text}

    def encode_text(self, components: Components, captions: list[str], length: int) -> Conditioning:
        return cast(TwoTexts, components.text)(captions, length)

    def encode_images(self, components: Components, pixels: Tensor, noise: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, SCALE)

    def decode(self, components: Components, latents: Tensor) -> Tensor:
        return F.interpolate(latents.float(), scale_factor=SCALE, mode="bilinear")

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, int, int]:
        if height % SCALE or width % SCALE:
            raise UserError(f"images of {width} x {height} pixels: both sides must be multiples of {SCALE}", 2)
        return (components.sample_shape[0], height // SCALE, width // SCALE)

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
            raise UserError(f"{SPEC.name} has no guidance embedding; leave guidance out")
        dtype = float_dtype(components.denoiser)
        embeds, masks = [s.embeds.to(dtype) for s in text.sequences], [s.mask.to(noisy.device) for s in text.sequences]
        noise = denoiser(noisy.to(dtype), sigma.float().clamp(max=HIGHEST), embeds, masks)
        return to_velocity("epsilon", noise.to(noisy.dtype), noisy, sigma, HIGHEST)

    def tokens(self, components: Components, shape: tuple[int, ...]) -> int:
        return shape[1] * shape[2]

    def shift(self, components: Components, tokens: int) -> float:
        return 1.0

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        return list(cast(ExampleNet, denoiser).blocks)

    passed_on = ("x",)

    def joins_text(self, block: nn.Module) -> bool:
        return False

    def unchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        return cast(Tensor, args[0])

    def states(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output, text: Conditioning) -> States:
        return {"image": (args[0].flatten(2).mT, cast(Tensor, output).flatten(2).mT, None)}

    def presets(self, denoiser: nn.Module) -> dict[str, list[str]]:
        return {"blocks": ["blocks.**"], "attention": ["blocks.*.to_*"]}
