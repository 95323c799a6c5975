"""Published models of FLUX's shape: what is known of them before a byte is fetched."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.models import pipeline_files
from dedistill.models.spec import APACHE, Config, Licence, Published, named_in
from dedistill.recipe.model_tables import Model

NETWORK = "FluxTransformer2DModel"


@dataclass(frozen=True)
class Shape:
    """Double-stream and single-stream blocks, and whether there is a guidance embedding."""

    layers: int
    single_layers: int
    guidance: bool


DEV = Licence(
    "other",
    "flux-1-dev-non-commercial-license",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    binding=True,
)
FLEX_LAYERS = 8
SCHNELL_LIKE = "flux-1-schnell"


def _sizes(layers: int, single_layers: int, guidance: bool) -> dict[str, Any]:
    return {"num_layers": layers, "num_single_layers": single_layers, "guidance_embeds": guidance}


PUBLISHED = (
    Published("black-forest-labs/FLUX.1-schnell", APACHE, SCHNELL_LIKE, _sizes(19, 38, False), gated=True),
    Published("black-forest-labs/FLUX.1-Redux-dev", DEV, "flux-1-dev", _sizes(19, 38, True), gated=True),
    Published("black-forest-labs/FLUX.1-dev", DEV, "flux-1-dev", _sizes(19, 38, True), gated=True),
    Published("ostris/Flex.1-alpha", APACHE, "flux-1", _sizes(FLEX_LAYERS, 38, True)),
    Published("ostris/OpenFLUX.1", APACHE, SCHNELL_LIKE, _sizes(19, 38, False)),
    Published("jimmycarter/LibreFLUX", APACHE, SCHNELL_LIKE, _sizes(19, 38, False)),
)
REDUX = next(p for p in PUBLISHED if p.id.endswith("Redux-dev"))
_DEV = next(p for p in PUBLISHED if p.id.endswith("FLUX.1-dev"))


def shape_in(sizes: Mapping[str, Any]) -> Shape:
    """By a config.json; sizes that it leaves out are diffusers' own, schnell's."""
    layers, single = sizes.get("num_layers", 19), sizes.get("num_single_layers", 38)
    return Shape(layers, single, bool(sizes.get("guidance_embeds", False)))


SCHNELL = shape_in(PUBLISHED[0].sizes)


def has_guidance(config: Config) -> bool:
    """Whether there is an embedding for distilled guidance."""
    return bool(config.get("guidance_embeds"))


def full_config(source: str, guidance: bool) -> dict[str, Any]:
    """A denoiser's config.json, full size, for a published hub id; FLUX.1-schnell's for any other ``source``."""
    shape = shape_of(source)
    return {"_class_name": NETWORK} | _sizes(shape.layers, shape.single_layers, guidance or shape.guidance)


def base_of(published: tuple[Published, ...], source: str, config: Config) -> Published | None:
    """As ModelSpec.base_of. A guidance embedding means a derivative of FLUX.1-dev, whatever the path says, unless there are
    only the 8 double blocks of Flex.1-alpha."""
    named = named_in(published, source, config)
    if not has_guidance(config):
        return named
    by_shape = next(p for p in published if "Flex" in p.id) if config.get("num_layers") == FLEX_LAYERS else _DEV
    if named is None:
        return by_shape
    if by_shape is _DEV and named.licence is not DEV:
        raise UserError(
            f"'{source}' reads like {named.id}, but the network has FLUX.1-dev's guidance embedding: "
            "it is a derivative of that, or its path is misleading; rename the folder or correct --base"
        )
    return named


def defaults(model: Model) -> dict[str, Any]:
    """Of a recipe, as ModelSpec.defaults."""
    return defaults_before(model) | {"sample.height": 1024, "sample.width": 1024}


def defaults_before(model: Model) -> dict[str, Any]:
    guided = model.path is not None and shape_of(model.path, model.revision).guidance
    return {"model.text_length": 512} | ({"model.guidance": 1.0} if guided else {})


def shape_of(path: str, revision: str | None = None) -> Shape:
    """The shape of a local folder by its config, of a single file by its header, of a published model by its name in the
    table, of another hub id by its config there, else schnell's. No weights are read or fetched."""
    named = {p.id.rpartition("/")[2]: shape_in(p.sizes) for p in PUBLISHED}
    place = Path(path)
    try:
        if place.is_file():
            return _of_file(place)
        config = place / "transformer" / "config.json"
        if config.exists():
            return _of_config(config)
        if place.name not in named and revision and not place.exists():
            return _of_config(pipeline_files.hub_config(path, revision, "transformer"))
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError, UserError):
        pass  # whoever loads the weights says what is wrong with them
    return named.get(place.name, SCHNELL)


def own_shift(model: Model) -> float | None:
    """As ModelSpec.shift."""
    named = named_in(PUBLISHED, model.path or "", {})
    return pipeline_files.own_shift(model, 1.0 if named and named.architecture == SCHNELL_LIKE else None)


def _of_config(config: Path) -> Shape:
    return shape_in(read_object(config))


def _of_file(file: Path) -> Shape:
    """By the names of its tensors, which diffusers and BFL call differently."""
    with safe_open(file, framework="numpy") as f:
        names = list(f.keys())
    double, single = (
        {m[1] for name in names if (m := re.search(rf"(?:^|\.){stack}\.(\d+)\.", name))}
        for stack in ("(?:transformer_blocks|double_blocks)", "(?:single_transformer_blocks|single_blocks)")
    )
    return Shape(len(double), len(single), any("guidance_embedder." in name or "guidance_in." in name for name in names))
