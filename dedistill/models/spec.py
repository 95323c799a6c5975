"""What is known of a model family before anything heavy is imported: data only, no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dedistill.recipe.model_tables import Model


@dataclass(frozen=True)
class Licence:
    """As a Hugging Face model card states it; ``id`` "other" comes with a name and a link."""

    id: str
    name: str = ""
    link: str = ""
    binding: bool = False
    """Whether what is made from the model stays under it."""


APACHE = Licence("apache-2.0")
UNKNOWN = Licence("unknown")


@dataclass(frozen=True)
class Published:
    """A published model: its hub id, its licence, its architecture in SAI ModelSpec headers, and sizes as its config says."""

    id: str
    licence: Licence
    architecture: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False
    """Whether the hub hands it only to those who are logged in and accepted its terms."""
    prediction: str = ""
    """What its output is read as (model.prediction), where its own files say something else."""
    parent: str = ""
    """Hub id of the published model that it was distilled from, where that is known: what a de-distilled one can be held to."""


Config = Mapping[str, Any]
"""A denoiser's config.json."""


def named_in(published: tuple[Published, ...], source: str, config: Config) -> Published | None:
    """The first model of which ``source`` (a hub id or a path) has the name in it."""
    return next((p for p in published if p.id.partition("/")[2].lower() in source.lower()), None)


@dataclass(frozen=True)
class ModelSpec:
    """A family as data. What it does is in its ``family``; nothing outside its folder asks for its name."""

    name: str
    """model.family of a recipe."""
    family: str
    """Where its behaviour is, "package.module:Class" (models.family.Family)."""
    networks: Mapping[str, str]
    """Names of its denoisers' classes, as a config.json has them -> "package.module:Class"."""
    has: Callable[[Config], bool] = field(default=lambda config: True, kw_only=True)
    """Whether a denoiser of such a class, with that config, is one of its own: where several families share a class."""
    architecture: str
    """In SAI ModelSpec headers, of a model whose base is not published."""
    folder: str = "transformer"
    """Where a model folder keeps the denoiser; also what names of tensors begin with in files for pipelines."""
    prediction: Literal["flow", "epsilon", "v"] = "flow"
    """What the denoiser predicts, as SAI ModelSpec says it."""
    resolution: int = 1024
    """Side of images that the model is made for, in pixels."""
    defaults: Callable[[Model], dict[str, Any]] = lambda model: {}
    """Dotted keys of a recipe with such a [model] table -> their values where the recipe leaves them out."""
    defaults_before: Callable[[Model], dict[str, Any]] = lambda model: {}
    """The same in runs that were started before recipe.json held them. Never changed."""
    published: tuple[Published, ...] = ()
    base_of: Callable[[tuple[Published, ...], str, Config], Published | None] = named_in
    """The published model behind a path or hub id and a denoiser's config. Raises UserError where these contradict."""
    full_config: Callable[[str, bool], dict[str, Any]] | None = None
    """config.json at full size of a hub id, or of the usual model; True: with a distilled guidance embedding."""
    image_prompts: Published | None = None
    """What encodes images of prompts (model.image_prompts); what is trained with it is under its licence as well."""
    distilled_guidance: Callable[[Config], bool] = lambda config: False
    """Whether a denoiser of that config has an embedding for distilled guidance."""
    shift: Callable[[Model], float | None] = lambda model: None
    """What shift = "auto" stands for, where that is one number for all sizes and is known without loading the model."""
    names: str | None = None
    """Module, or "module:object", with the tables (adapters.naming.LayerNames) of what other programs call its layers; None:
    they know none."""
    card: str | None = None
    """Package and file of a Jinja template that shows in a model card how the model is used in other programs."""
