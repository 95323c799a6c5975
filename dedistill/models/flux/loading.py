"""Where a FLUX model's files are, and its denoiser read from them: safetensors only, whole or not at all."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dedistill.errors import UserError, amount
from dedistill.io.json_files import parse_object, read_object
from dedistill.io.safetensors import DTYPES
from dedistill.io.weights import open_weights, weight_files
from dedistill.models.flux import SPEC, naming
from dedistill.models.flux.published import scheduler_file
from dedistill.models.pretrained import DEEPEST, check_finite, without_weights
from dedistill.models.registry import checked_facts, get_it, looks_local

HUB_FILES = [
    *("*.json", "*/*.json", "*/*.txt", "*/*.model"),
    *("transformer/*.safetensors", "text_encoder*/*.safetensors", "vae/*.safetensors"),
]
"""Not the single-file copies that such repositories keep beside the folders."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Place:
    """transformer: folder or single file; components: folder with text encoders, tokenizers, VAE and scheduler."""

    transformer: Path
    components: Path
    scheduler: dict[str, Any] = field(default_factory=dict)
    scheduler_file: Path = Path()
    """Where that is from, or was looked for."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What dedistill.json says about weights of ours, e.g. the mask they were trained with."""


def locate(path: str, revision: str | None, components: str | None) -> Place:
    """Find all parts of a model; downloads a hub id at its pinned revision. Raises UserError naming the missing part."""
    here = _local(path, revision, "model.path")
    facts = _facts(here)
    if quantized := facts.get("quantized"):
        raise UserError(f"model.path: '{here}' is an {quantized} export; train on the unquantized folder it was made from")
    other = components or facts.get("components")
    if here.is_file() and other is None:
        raise UserError(
            "model.components: a single file holds the denoiser alone; name the folder or hub id with text encoders and VAE", 2
        )
    around = here if other is None or (here / "vae").is_dir() else _local(other, revision, "model.components")
    transformer = here if here.is_file() else here / "transformer"
    if not transformer.exists():
        raise UserError(f"model.path: '{here}' has no folder 'transformer': not a FLUX model in diffusers' layout")
    scheduler = scheduler_file(here, around)
    return Place(transformer, around, read_object(scheduler, "model.path") if scheduler.exists() else {}, scheduler, facts)


def _facts(here: Path) -> dict[str, Any]:
    """What weights of ours say of themselves: dedistill.json of a folder, the header of a single file."""
    if here.is_dir():
        file = here / "dedistill.json"
        return checked_facts(read_object(file, "model.path"), f"model.path: '{file}'") if file.exists() else {}
    header = open_weights(here, "model.path").metadata() or {}
    where = f"model.path: '{here}': dedistill.facts in its header"
    return checked_facts(parse_object(header.get("dedistill.facts", "{}"), where), where)


def _local(path: str, revision: str | None, key: str) -> Path:
    if (here := Path(path)).exists():
        return here
    if looks_local(path):
        raise UserError(f"{key}: {path}: no such file or folder{get_it(SPEC, path)}", 2)
    if not _COMMIT.fullmatch(revision or ""):
        raise UserError(
            f"{key}: '{path}' is not a local folder. For a hub id pin its commit, 40 hexadecimal digits, with model.revision; "
            "a branch or tag may change under a run",
            2,
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=HUB_FILES))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as e:
        hint = " (accept its terms on huggingface.co and run hf auth login)" if isinstance(e, GatedRepoError) else ""
        raise UserError(
            f"{key}: '{path}' at revision '{revision}' cannot be fetched, and no such local folder{hint}: {e}"
        ) from e


def load_transformer(place: Path, components: Path, *, empty: bool = False) -> FluxTransformer2DModel:
    """The denoiser in its stored dtype, from diffusers' folder or from one file with diffusers' or BFL's names.

    Its depth is what the files hold, whatever a config says. empty: on the meta device, by the files' headers alone.
    Raises UserError when a tensor is missing, unknown, of another shape, or not made of finite numbers.
    """
    tensors = _read(place, empty=empty)
    if place.is_file():
        denoiser = _from_file(tensors, place, components)
    else:
        if not tensors:
            raise UserError(f"model.path: no safetensors in '{place}'")
        config = {k: v for k, v in read_object(place / "config.json", "model.path").items() if not k.startswith("_")}
        stacks = {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"}
        config |= {key: _depth(tensors, stack, str(place)) for key, stack in stacks.items()}
        denoiser = build(config, tensors, str(place))
    if not empty:
        check_finite(tensors, f"model.path: '{place}'")
    return denoiser


PREFIX = "model.diffusion_model."
"""Before every name in files that hold a whole pipeline's denoiser as ComfyUI saves it."""


def _from_file(tensors: dict[str, Tensor], file: Path, components: Path) -> FluxTransformer2DModel:
    if any(name.startswith(PREFIX) for name in tensors):  # what else such a file holds are encoders and VAE
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    bfl = any(name.startswith("double_blocks.") for name in tensors)
    config = _config_of(tensors, _BFL_SIZES if bfl else _SIZES, str(file), components)
    if bfl:
        shapes = {n: tuple(p.shape) for n, p in empty_network(config, str(file)).named_parameters()}
        tensors = naming.from_bfl(tensors, shapes, str(file))
    return build(config, tensors, str(file))


_SIZES = {
    "stacks": ("transformer_blocks", "single_transformer_blocks"),
    "image": "x_embedder.weight",
    "text": "context_embedder.weight",
    "pooled": "time_text_embed.text_embedder.linear_1.weight",
    "head": "transformer_blocks.0.attn.norm_q.weight",
    "guidance": "time_text_embed.guidance_embedder.linear_1.weight",
}
_BFL_SIZES = {
    "stacks": ("double_blocks", "single_blocks"),
    "image": "img_in.weight",
    "text": "txt_in.weight",
    "pooled": "vector_in.in_layer.weight",
    "head": "double_blocks.0.img_attn.norm.query_norm.scale",
    "guidance": "guidance_in.in_layer.weight",
}
"""Which tensors tell a network's sizes, by either set of names."""


def _config_of(tensors: dict[str, Tensor], names: dict[str, Any], source: str, components: Path) -> dict[str, Any]:
    """The config of a network from the shapes of its tensors; what shapes cannot tell from the folder of its components."""
    if missing := [names[k] for k in ("image", "text", "pooled", "head") if names[k] not in tensors]:
        raise UserError(f"model.path: '{source}' is not a FLUX denoiser: it has no tensor '{missing[0]}'")
    for key, dimensions in (("image", 2), ("text", 2), ("pooled", 2), ("head", 1)):
        if tensors[names[key]].ndim != dimensions:
            raise UserError(f"model.path: '{source}': '{names[key]}' has the shape {tuple(tensors[names[key]].shape)}")
    hidden, channels = tensors[names["image"]].shape
    head = tensors[names["head"]].shape[0]
    beside = components / "transformer" / "config.json"
    known = read_object(beside, "model.path") if beside.exists() else {}
    axes = known.get("axes_dims_rope", [16, 56, 56])
    if not isinstance(axes, list) or not all(isinstance(n, int) for n in axes) or not head or sum(axes) != head:
        raise UserError(f"model.path: '{source}' has heads of {head}; positions of {axes} do not fit them")
    return {
        "num_layers": _depth(tensors, names["stacks"][0], source),
        "num_single_layers": _depth(tensors, names["stacks"][1], source),
        "in_channels": channels,
        "num_attention_heads": hidden // head,
        "attention_head_dim": head,
        "joint_attention_dim": tensors[names["text"]].shape[1],
        "pooled_projection_dim": tensors[names["pooled"]].shape[1],
        "guidance_embeds": names["guidance"] in tensors,
        "axes_dims_rope": list(axes),
    }


def build(config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> FluxTransformer2DModel:
    """A network whose parameters are ``tensors`` themselves: nothing is copied, and nothing may be left over."""
    denoiser = empty_network(config, source)
    own = dict(denoiser.named_parameters()) | dict(denoiser.named_buffers())
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if scales := [name for name in unknown if name.endswith(_SCALED)]:
        raise UserError(
            f"model.path: '{source}' holds scaled fp8 weights ('{scales[0]}'), which are not trained on; take the model in bf16"
        )
    shapes = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    codes = [n for n in own.keys() & tensors.keys() if not tensors[n].is_floating_point()]
    for names, what in (
        (missing, "missing"),
        (unknown, "unknown"),
        (shapes, "of another shape"),
        (codes, "of whole numbers: quantized by another program"),
    ):
        if names:
            raise UserError(f"model.path: '{source}': {amount(len(names), 'tensor is', 'tensors are')} {what}, e.g. {names[0]}")
    denoiser.load_state_dict(tensors, assign=True)
    return denoiser.eval()


_SCALED = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", "scaled_fp8")


def empty_network(config: dict[str, Any], source: str) -> FluxTransformer2DModel:
    """On the meta device."""
    return without_weights(FluxTransformer2DModel, config, f"model.path: '{source}'")


def _read(place: Path, *, empty: bool = False) -> dict[str, Tensor]:
    """All tensors of a file, or of the files of a folder that count. empty: on the meta device, by their headers."""
    tensors: dict[str, Tensor] = {}
    for file in [place] if place.is_file() else weight_files(place, "model.path"):
        opened = open_weights(file, "model.path")
        try:
            for name in opened.keys():  # noqa: SIM118
                if name in tensors:
                    raise UserError(f"model.path: '{file}' holds '{name}', which another file of the folder holds as well")
                tensors[name] = _header(opened, name) if empty else _aligned(opened.get_tensor(name))
        except (OSError, SafetensorError) as e:
            raise UserError(f"model.path: '{file}' cannot be read as safetensors: {e}") from e
    return tensors


def _header(opened: safe_open, name: str) -> Tensor:
    part = opened.get_slice(name)
    known = {code: dtype for dtype, code in DTYPES.items()}
    # of other kinds, such as fp8, only whether they are floating point is looked at
    dtype = known.get(part.get_dtype(), torch.float32 if part.get_dtype().startswith("F") else torch.uint8)
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")


def _aligned(tensor: Tensor) -> Tensor:
    """Mapped tensors may start anywhere; some kernels crash on that."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _depth(tensors: dict[str, Tensor], stack: str, source: str) -> int:
    """How many blocks the files hold. Names that are none of a block are left to :func:`build`."""
    numbers = {int(m.group(1)) for n in tensors if (m := re.match(rf"{stack}\.(\d{{1,9}})\.", n))}
    if len(numbers) > DEEPEST or numbers != set(range(len(numbers))):
        gap = next((i for i in range(len(numbers)) if i not in numbers), len(numbers))
        raise UserError(f"model.path: '{source}': {len(numbers):,} blocks '{stack}', and none of number {gap}; fetch it again")
    return len(numbers)
