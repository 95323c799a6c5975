"""Published models of FLUX's shape: what is known of them before a byte is fetched."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open


@dataclass(frozen=True)
class Shape:
    """Double-stream and single-stream blocks, and whether there is a guidance embedding."""

    layers: int
    single_layers: int
    guidance: bool


PUBLISHED = {
    "black-forest-labs/FLUX.1-schnell": Shape(19, 38, False),
    "black-forest-labs/FLUX.1-dev": Shape(19, 38, True),
    "ostris/Flex.1-alpha": Shape(8, 38, True),
    "ostris/OpenFLUX.1": Shape(19, 38, False),
    "jimmycarter/LibreFLUX": Shape(19, 38, False),
}
SCHNELL = PUBLISHED["black-forest-labs/FLUX.1-schnell"]


def shape_of(path: str, revision: str | None = None) -> Shape:
    """The shape of a local folder by its config, of a single file by its header, of a published model by its name in the
    table, of another hub id by its config there, else schnell's. No weights are read or fetched."""
    named = {known.rpartition("/")[2]: shape for known, shape in PUBLISHED.items()}
    place = Path(path)
    try:
        if place.is_file():
            return _of_file(place)
        config = place / "transformer" / "config.json"
        if config.exists():
            return _of_config(config)
        if place.name not in named and revision and not place.exists():
            return _of_config(_config_on_the_hub(path, revision))
    except (OSError, ValueError, AttributeError, SafetensorError):
        pass  # whoever loads the weights says what is wrong with them
    return named.get(place.name, SCHNELL)


def _of_config(config: Path) -> Shape:
    """Sizes that a config leaves out are diffusers' own, schnell's."""
    sizes = json.loads(config.read_text())
    layers, single = sizes.get("num_layers", SCHNELL.layers), sizes.get("num_single_layers", SCHNELL.single_layers)
    return Shape(layers, single, bool(sizes.get("guidance_embeds", False)))


def _of_file(file: Path) -> Shape:
    """By the names of its tensors, in diffusers' or BFL's spelling."""
    with safe_open(file, framework="numpy") as f:
        names = list(f.keys())
    double, single = (
        {m[1] for name in names if (m := re.search(rf"(?:^|\.){stack}\.(\d+)\.", name))}
        for stack in ("(?:transformer_blocks|double_blocks)", "(?:single_transformer_blocks|single_blocks)")
    )
    return Shape(len(double), len(single), any("guidance_embedder." in name or "guidance_in." in name for name in names))


def _config_on_the_hub(path: str, revision: str) -> Path:
    """Fetched once: a commit never changes. Raises OSError or ValueError where that fails."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(path, "transformer/config.json", revision=revision))
