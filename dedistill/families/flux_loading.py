"""Where a FLUX model's files are, and its denoiser read from them: safetensors only, whole or not at all."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dedistill.errors import UserError

HUB_FILES = [
    *("*.json", "*/*.json", "*/*.txt", "*/*.model"),
    *("transformer/*.safetensors", "text_encoder*/*.safetensors", "vae/*.safetensors"),
]
"""Not the single-file copies that such repositories keep beside the folders."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Place:
    """transformer: folder or single file; components: folder with text encoders, tokenizers, VAE and scheduler."""

    transformer: Path
    components: Path
    scheduler: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    """What dedistill.json says about weights of ours, e.g. the mask they were trained with."""


def locate(path: str, revision: str | None, components: str | None) -> Place:
    """Find all parts of a model; downloads a hub id at its pinned revision. Raises UserError naming the missing part."""
    here = _local(path, revision, "model.path")
    facts = _json(here / "dedistill.json") if (here / "dedistill.json").exists() else {}
    other = components or facts.get("components")
    if here.is_file() and other is None:
        raise UserError(
            "model.components: a single file holds the denoiser alone; name the folder or hub id with text encoders and VAE", 2
        )
    around = here if other is None or (here / "vae").is_dir() else _local(other, revision, "model.components")
    transformer = here if here.is_file() else here / "transformer"
    if not transformer.exists():
        raise UserError(f"model.path: '{here}' has no folder 'transformer': not a FLUX model in diffusers' layout")
    scheduler = around / "scheduler" / "scheduler_config.json"
    return Place(transformer, around, _json(scheduler) if scheduler.exists() else {}, facts)


def _local(path: str, revision: str | None, key: str) -> Path:
    if (here := Path(path)).exists():
        return here
    if not _HUB_ID.fullmatch(path):
        raise UserError(f"{key}: '{path}' does not exist")
    if revision is None:
        raise UserError(f"{key}: '{path}' is no local folder; for a hub id pin its commit with model.revision", 2)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as e:
        raise UserError(f"{key}: '{path}' at revision '{revision}' cannot be fetched, and no such local folder: {e}") from e


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"model.path: '{path}' cannot be read: {e}") from e


def load_transformer(place: Path) -> FluxTransformer2DModel:
    """The denoiser in its stored dtype. Its depth is what the files hold, whatever the config says.

    Raises UserError when a tensor is missing, unknown, or of another shape.
    """
    tensors = _read(place)
    if not tensors:
        raise UserError(f"model.path: no safetensors in '{place}'")
    if place.is_file():
        raise UserError(f"model.path: '{place}': single files are not read yet")
    config = {k: v for k, v in _json(place / "config.json").items() if not k.startswith("_")}
    stacks = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
    config |= {key: _depth(tensors, stack) for key, stack in stacks.items()}
    return build(config, tensors, str(place))


def build(config: dict, tensors: dict[str, Tensor], source: str) -> FluxTransformer2DModel:
    """A network whose parameters are ``tensors`` themselves: nothing is copied, and nothing may be left over."""
    with torch.device("meta"):
        net = FluxTransformer2DModel.from_config(config)
    own = dict(net.named_parameters()) | dict(net.named_buffers())
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape")):
        if names:
            raise UserError(f"model.path: '{source}': {len(names)} tensors are {what}, e.g. {names[0]}")
    net.load_state_dict(tensors, assign=True)
    return net.eval()


def _read(place: Path) -> dict[str, Tensor]:
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                tensors |= {name: _aligned(f.get_tensor(name)) for name in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise UserError(f"model.path: '{file}' cannot be read as safetensors: {e}") from e
    return tensors


def _aligned(tensor: Tensor) -> Tensor:
    """Mapped tensors may start anywhere; some kernels crash on that."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _depth(tensors: dict[str, Tensor], stack: str) -> int:
    return 1 + max((int(n.split(".")[1]) for n in tensors if n.startswith(f"{stack}.")), default=-1)
