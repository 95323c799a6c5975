"""Who may do what with which base model, and the ids that catalogues know the bases by."""

import re
from dataclasses import dataclass
from pathlib import Path

from dedistill.errors import UserError


@dataclass(frozen=True)
class Licence:
    """As a Hugging Face model card states it; ``id`` "other" comes with a name and a link."""

    id: str
    name: str = ""
    link: str = ""


APACHE = Licence("apache-2.0")
UNKNOWN = Licence("unknown")
DEV = Licence(
    "other",
    "flux-1-dev-non-commercial-license",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
)


@dataclass(frozen=True)
class Base:
    """A published base: its hub id, its licence, and its architecture in SAI ModelSpec headers."""

    id: str
    licence: Licence
    architecture: str


BASES = (
    Base("black-forest-labs/FLUX.1-schnell", APACHE, "flux-1-schnell"),
    Base("black-forest-labs/FLUX.1-Redux-dev", DEV, "flux-1-dev"),
    Base("black-forest-labs/FLUX.1-dev", DEV, "flux-1-dev"),
    Base("ostris/Flex.1-alpha", APACHE, "flux-1"),
    Base("ostris/OpenFLUX.1", APACHE, "flux-1-schnell"),
    Base("jimmycarter/LibreFLUX", APACHE, "flux-1-schnell"),
)
DEFAULT_ARCHITECTURE = "flux-1"
_DEV = next(base for base in BASES if base.id.endswith("FLUX.1-dev"))
_FLEX_LAYERS = 8
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_IN_HUB_CACHE = re.compile(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots(?:/|$)")


def base_of(source: str, config: dict) -> Base | None:
    """The published base behind ``source`` (a hub id, or a path that has the model's name in it), or None.

    config: the denoiser's. A guidance embedding means a derivative of FLUX.1-dev, whatever the path says, unless there
    are only the 8 double blocks of Flex.1-alpha. Raises UserError when name and network contradict each other.
    """
    named = next((base for base in BASES if base.id.partition("/")[2].lower() in source.lower()), None)
    if not config.get("guidance_embeds"):
        return named
    by_shape = next(b for b in BASES if "Flex" in b.id) if config.get("num_layers") == _FLEX_LAYERS else _DEV
    if named is None:
        return by_shape
    if by_shape is _DEV and named.licence is not DEV:
        raise UserError(
            f"'{source}' reads like {named.id}, but the network has FLUX.1-dev's guidance embedding: "
            "it is a derivative of that, or its path is misleading; rename the folder or correct --base"
        )
    return named


def is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and not Path(text).exists()


def public_name(path: str, revision: str | None = None) -> str:
    """A base as others may know it: its hub id where that is known, else the last name of a local path.

    path, revision: model.path and model.revision of a recipe. Only with a revision is a path a hub id, unless the table
    of published bases has it.
    """
    if revision and is_hub_id(path):
        return path
    if cached := _IN_HUB_CACHE.search(path):
        return f"{cached[1]}/{cached[2]}"
    named = base_of(path, {})
    return named.id if named else Path(path).name


def licence_for(base: Base | None, wanted: str | None) -> Licence:
    """The licence a derivative of ``base`` is under. Raises UserError where ``wanted`` gives away what is not ours to give."""
    if base is None:
        return Licence(wanted) if wanted else UNKNOWN
    if base.licence is DEV and wanted not in (None, DEV.id, DEV.name):
        raise UserError(
            f"a derivative of {base.id} is under its {DEV.name}, it cannot be released as '{wanted}' ({DEV.link})", 2
        )
    return base.licence if wanted is None or base.licence is DEV else Licence(wanted)
