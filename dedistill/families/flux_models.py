"""Published models of FLUX's shape: what is known of them before a byte is fetched."""

import json
from dataclasses import dataclass
from pathlib import Path


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


def shape_of(path: str) -> Shape:
    """The shape of a local folder by its config, of a published model by its name in the table, else schnell's."""
    try:
        config = json.loads((Path(path) / "transformer" / "config.json").read_text())
        return Shape(config["num_layers"], config["num_single_layers"], config["guidance_embeds"])
    except (OSError, ValueError, KeyError):
        named = {known.rpartition("/")[2]: shape for known, shape in PUBLISHED.items()}
        return named.get(Path(path).name, SCHNELL)
