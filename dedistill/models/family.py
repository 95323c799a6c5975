"""What a model family provides. Everything else in the program knows only this."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dedistill.errors import UserError
from dedistill.flow.parameterization import Prediction
from dedistill.flow.schedule import Schedule
from dedistill.models.conditioning import Conditioning, Widths
from dedistill.models.image_prompts import ImagePrompts
from dedistill.models.spec import ModelSpec
from dedistill.recipe.model_tables import Model

MADE = ("base", "merges", "trained")
"""What a model folder says of how its weights were made; families write it and read it back."""


@dataclass
class Components:
    """A loaded model: the denoiser that is trained or adapted, and what stays frozen around it."""

    denoiser: nn.Module
    """An empty module where the denoiser was left out."""
    text: "TextEncoders"
    """What encodes captions."""
    sample_shape: tuple[int, int, int]
    """Channels, height and width of what the denoiser sees."""
    mask: str = "bool"
    text_length: int = 0
    """Tokens captions are padded to, where the family keeps it with the model."""
    image_prompts: ImagePrompts | None = None
    """What encodes images that prompts name; None where the network cannot be told any, or is not."""
    vae: "Codec | None" = None
    """Codec between pixels and what the denoiser sees; None where that is pixels."""
    guidance: float | None = None
    """What a distilled guidance embedding is fed in training; None without one."""
    takes_guidance: bool = False
    """Whether there is such an embedding, and it is not bypassed."""
    new_guidance: bool = False
    """Whether that embedding is none of the files, but was added, all zeros."""
    source: object = None
    """Where the files are and what they say beside weights; the family's own."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the folder or file says of how its weights were made: base, merges, masks."""
    notes: list[str] = field(default_factory=list)
    """What a user should know before training on it."""
    schedule: Schedule | None = None
    """Of a denoiser that is read as one trained by diffusion: what it predicts, at which noise levels. None: a flow model."""
    prediction: Prediction | None = None
    """What the denoiser's output is read as; None for a family whose networks all predict velocity."""
    sample_shift: float | str | None = None
    """sample.shift of the recipe: a number goes into what is saved as well."""
    device: torch.device | str = "cpu"
    """Where encoders run when they are used."""

    @property
    def read_as(self) -> dict[str, Any]:
        """What whoever uses the denoiser's weights, or trains on what they made, must know of its output."""
        return self.schedule.facts if self.schedule else {"prediction": self.prediction} if self.prediction else {}


def prediction_facts(spec: ModelSpec, components: Components) -> dict[str, Any]:
    """What every file says of a denoiser's output, also where all networks of the family predict one thing."""
    return components.read_as or {"prediction": spec.prediction}


class TextEncoders(Protocol):
    """What makes conditioning of captions. ``widths`` and ``tokens`` are needed where captions are cached."""

    @property
    def widths(self) -> Widths:
        """Of what it makes; loads nothing."""

    def tokens(self, captions: list[str]) -> list[int]:
        """Tokens of each caption in the longest sequence, end token included, however long."""

    def check(self) -> None:
        """Raises UserError where its files are not whole, as far as their headers tell: before anything else is encoded."""

    def unload(self) -> None:
        """Free its memory; what is asked next loads again."""


@dataclass(frozen=True)
class Unseen:
    """Text encoders of which no more is known than what they make."""

    widths: Widths

    def tokens(self, captions: list[str]) -> list[int]:
        raise UserError("model.path: the text encoders' files are not there")

    def check(self) -> None:
        """There is nothing to look at."""

    def unload(self) -> None:
        """There is nothing to free."""


class Codec(Protocol):
    """Between pixels and what the denoiser sees."""

    def check(self) -> None:
        """As TextEncoders."""

    def unload(self) -> None:
        """Free its memory; what is asked next loads again."""

    def in_tiles(self) -> bool:
        """Decode in tiles from now on, with faint seams, for a tenth of the memory; False: it cannot, or does so already."""


States = dict[str, tuple[Tensor, Tensor, Tensor | None]]
"""Stream of hidden states -> (before, after) a block, both [B, N, D], and which of the N count [B, N]; None: all."""


Output = Tensor | tuple[Tensor, ...]
"""What a block of a network returns."""


Guidance = float | Tensor | None
"""What a distilled guidance embedding is fed."""


class Denoiser(Protocol):
    """What is asked of ``Components.denoiser`` beside being a module; diffusers' models have it."""

    @property
    def config(self) -> Mapping[str, Any]: ...

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., object]) -> None:
        """Where gradients are wanted, call a block as ``gradient_checkpointing_func(block, *args)``."""

    def save_config(self, save_directory: Path) -> None: ...


CAPTIONS = "encoding captions"
"""Its networks' blocks wait in the memory of the CPU where the device has no room for them."""
DECODING = "decoding an image"
"""What previews do while the denoiser stays where it is; other passes come before it."""


@dataclass(frozen=True)
class Pass:
    """Something that runs beside training."""

    modules: list[nn.Module]
    """Whose weights are on the device meanwhile."""
    call: Callable[[], object]
    smaller: Callable[[], object] | None = None
    """The same in less memory, as it runs where there is too little for ``call``."""


class Family(Protocol):
    spec: ModelSpec
    max_text_length: int
    """Tokens of a caption that its encoders take."""

    def load(self, spec: Model, *, seed: int, denoiser: bool = True) -> Components:
        """The components a recipe's [model] table asks for, from a folder or with random weights.

        denoiser False: all but the denoiser, for encoding before training.
        """

    def cache_inputs(self, components: Components, length: int) -> dict[str, dict[str, Any]]:
        """What encoded "latents" and "text" depend on beside image and caption: settings, and lists of weight files."""

    def full_size(self, spec: Model) -> Components:
        """What ``spec`` names as names and shapes without numbers, also where its files are not there: the denoiser on the meta
        device, and of encoders and codec as much as tells the shapes of what the denoiser sees."""

    def passes(self, spec: Model, height: int, width: int, length: int) -> dict[str, Pass]:
        """What runs on a device beside training, by name: encoders and codec of full size on one image of that many pixels, and
        captions of ``length`` tokens. Called with the meta device as default; empty where it is hardly anything."""

    def write_tiny(self, spec: Model, folder: Path, image: tuple[int, int, int] | None, *, full_depth: bool) -> None:
        """A small random model in the layout that ``load`` reads, built like the one ``spec`` names: for rehearsals.

        image: the shape of samples where the data give it. full_depth: as many blocks, else a few of each kind.
        What encodes image prompts, where ``spec`` names that, goes to ``folder``/image_prompts.
        """

    def save(self, components: Components, folder: Path) -> None:
        """Write ``components`` so that ``load`` with ``path = folder`` gives them back."""

    def save_rest(self, components: Components, folder: Path) -> None:
        """What ``save`` writes beside the denoiser, for writers that stream the denoiser themselves."""

    def encode_text(self, components: Components, captions: list[str], length: int) -> Conditioning:
        """Captions padded to ``length`` tokens. The empty caption has exactly one real token."""

    def encode_images(self, components: Components, pixels: Tensor, noise: Tensor) -> Tensor:
        """What the denoiser sees of pixels [B, 3, H, W] in [-1, 1]; noise [B, C, h, w] samples the codec's posterior."""

    def decode(self, components: Components, latents: Tensor) -> Tensor:
        """Pixels [B, C, H, W], about [-1, 1], of what the denoiser sees."""

    def latent_shape(self, components: Components, height: int, width: int) -> tuple[int, int, int]:
        """Shape of what the denoiser sees of an image. Raises UserError for a size it cannot have."""

    def velocity(
        self,
        components: Components,
        denoiser: nn.Module,
        noisy: Tensor,
        sigma: Tensor,
        text: Conditioning,
        guidance: Guidance = None,
    ) -> Tensor:
        """noise - data as ``denoiser`` (the denoiser, or a module that wraps it) predicts it; noisy [B, C, H, W], sigma [B].

        guidance: value for a distilled guidance embedding, or one for each sample [B]; None for the one of training. A frozen
        base runs without autocast:
        what goes into the network is to have its dtype (``float_dtype``); what comes out and goes through formulas, noisy's.
        """

    def tokens(self, components: Components, shape: tuple[int, ...]) -> int:
        """Image tokens of a sample of that shape."""

    def shift(self, components: Components, tokens: int) -> float:
        """The model's own shift of sigma for that many image tokens: what shift = "auto" means, in training and for images."""

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        """The unit of checkpointing, swapping and sharding, in the order in which a pass calls them."""

    passed_on: tuple[str, ...]
    """Names of the inputs of ``blocks`` that the block before has returned."""

    def joins_text(self, block: nn.Module) -> bool:
        """Whether one of ``blocks`` puts text before the image, and so takes what is joined as the image, with no text."""

    def presets(self, denoiser: nn.Module) -> dict[str, list[str]]:
        """Named sets of layers of ``denoiser`` as name patterns."""

    def unchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        """What one of ``blocks`` would return if it changed nothing of what it was called with."""

    def states(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output, text: Conditioning) -> States:
        """The hidden states that one of ``blocks`` was called with and returned. text: what the network was told."""
