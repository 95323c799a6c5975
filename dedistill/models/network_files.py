"""A denoiser from its files: safetensors only, whole or not at all, its depth what the files hold."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import Tensor, nn

from dedistill.errors import UserError, amount
from dedistill.io.json_files import read_object
from dedistill.io.weights import empty_tensor, open_weights, weight_files
from dedistill.models.pretrained import DEEPEST, without_weights

Net = TypeVar("Net", bound=nn.Module)
PREFIX = "model.diffusion_model."
"""Before every name in files that hold a whole pipeline's denoiser as ComfyUI saves it."""
_SCALED = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", "scaled_fp8")


def read_network(place: Path, *, empty: bool = False) -> dict[str, Tensor]:
    """All tensors of a file without :data:`PREFIX`, or of the files of a folder that count.

    empty: on the meta device, by their headers. Raises UserError for a folder without any, and for a name in two files.
    """
    tensors: dict[str, Tensor] = {}
    for file in [place] if place.is_file() else weight_files(place, "model.path"):
        opened = open_weights(file, "model.path")
        try:
            for name in opened.keys():  # noqa: SIM118
                if name in tensors:
                    raise UserError(f"model.path: '{file}' holds '{name}', which another file of the folder holds as well")
                tensors[name] = empty_tensor(opened, name) if empty else _aligned(opened.get_tensor(name))
        except (OSError, SafetensorError) as e:
            raise UserError(f"model.path: '{file}' cannot be read as safetensors: {e}") from e
    if not tensors and not place.is_file():
        raise UserError(f"model.path: no safetensors in '{place}'")
    if any(name.startswith(PREFIX) for name in tensors):  # what else such a file holds are encoders and VAE
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return tensors


def _aligned(tensor: Tensor) -> Tensor:
    """Mapped tensors may start anywhere; some kernels crash on that."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def stored_config(folder: Path) -> dict[str, Any]:
    """config.json of a denoiser's folder, without what libraries write for themselves."""
    return {k: v for k, v in read_object(folder / "config.json", "model.path").items() if not k.startswith("_")}


def depth(tensors: Mapping[str, Tensor], stack: str, source: str) -> int:
    """How many blocks ``stack`` has in the files. Names that are none of a block are left to :func:`build`."""
    numbers = {int(m.group(1)) for n in tensors if (m := re.match(rf"{stack}\.(\d{{1,9}})\.", n))}
    if len(numbers) > DEEPEST or numbers != set(range(len(numbers))):
        gap = next((i for i in range(len(numbers)) if i not in numbers), len(numbers))
        raise UserError(f"model.path: '{source}': {len(numbers):,} blocks '{stack}', and none of number {gap}; fetch it again")
    return len(numbers)


def as_deep(config: dict[str, Any], tensors: Mapping[str, Tensor], stacks: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """A folder's ``config`` with the numbers of blocks in its files. stacks: key of the config -> name of the blocks.

    Raises UserError where the config has another number: blocks at the end of a file may have been lost.
    """
    for key, stack in stacks.items():
        found = depth(tensors, stack, str(folder))
        if isinstance(said := config.get(key), int) and said != found:
            held = amount(found, "block")
            raise UserError(
                f"model.path: '{folder / 'config.json'}' has {key} = {said:,}, and the files hold {held} '{stack}': "
                "fetch the folder again"
            )
        config = config | {key: found}
    return config


def build(kind: type[Net], config: dict[str, Any], tensors: dict[str, Tensor], source: str) -> Net:
    """A network of class ``kind`` whose parameters are ``tensors`` themselves: nothing is copied, nothing may be left over."""
    denoiser = without_weights(kind, config, f"model.path: '{source}'")
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
