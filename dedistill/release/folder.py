"""Denoisers as folders and files of tensors, read and written one tensor at a time."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dedistill.adapters.naming import FOLDERS, LayerNames
from dedistill.adapters.targets import Shape
from dedistill.errors import UserError, amount
from dedistill.io.atomic import replace_json, whole_folder
from dedistill.io.json_files import read_object
from dedistill.io.safetensors import DTYPES, Layout, TensorFile, is_finite
from dedistill.io.weights import open_weights, weight_files
from dedistill.models.pretrained import without_weights
from dedistill.models.registry import checked_facts, imported, spec_of
from dedistill.models.spec import ModelSpec

SHARD_BYTES = 10 * 1000**3
"""diffusers' own default: a larger network is written as several files with an index."""
WEIGHTS = "diffusion_pytorch_model"
FACTS = "dedistill.json"
CODES = "dedistill_int8"
"""How an int8 export calls that file, so that no program takes codes for weights."""
_DTYPE = {name: dtype for dtype, name in DTYPES.items()}


class Denoiser:
    """The denoiser of a model folder: its family, config, and the names, shapes and dtypes of its tensors, read on demand."""

    def __init__(self, folder: Path, *, compare: bool = True):
        """compare: with the tensors that such a network has, for which diffusers is loaded; UserError where they differ."""
        self.folder = folder
        self.config = network_config(folder)
        self.spec = spec_of(self.config, read_facts(folder).get("family"))
        place = folder / self.spec.folder
        self._files: dict[str, Any] = {}  # kept open: opening one again for each tensor costs milliseconds
        self.layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in weight_files(place):
            file = open_weights(path)
            for name in file.keys():  # noqa: SIM118
                if name in self.layout:
                    raise UserError(f"'{path}' holds '{name}', which another file of the folder holds as well")
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPE:
                    raise UserError(f"'{path}': tensor '{name}' is stored as {part.get_dtype()}, which is not supported")
                self._files[name], self.layout[name] = file, (tuple(part.get_shape()), _DTYPE[part.get_dtype()])
        if not compare:
            return
        shapes = {name: tuple(tensor.shape) for name, tensor in self.skeleton().state_dict().items()}
        own = set(shapes)
        scales = {n for n in self.layout if n.endswith(".weight_scale") and n.removesuffix("_scale") in own}
        for names, what in ((own - self.layout.keys(), "misses"), (self.layout.keys() - own - scales, "does not know")):
            if names:
                raise UserError(f"'{place}': its network {what} {amount(len(names), 'tensor')}, e.g. '{min(names)}'")
        if other := [name for name, shape in shapes.items() if self.layout[name][0] != shape]:
            raise UserError(
                f"'{place}': {amount(len(other), 'tensor is', 'tensors are')} of another shape than config.json says, e.g. "
                f"'{other[0]}', {self.layout[other[0]][0]} for {shapes[other[0]]}"
            )

    def __getitem__(self, name: str) -> Tensor:
        """Raises UserError, naming folder and tensor, where it holds NaN or Inf."""
        tensor: Tensor = self._files[name].get_tensor(name)
        if not is_finite(tensor):
            raise UserError(f"'{self.folder}': tensor '{name}' holds numbers that are not finite (NaN or Inf)")
        return tensor

    def items(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name in names if names is not None else self.layout:
            yield name, self[name]

    def shapes(self) -> dict[str, Shape]:
        """Of the weights of its linears and convolutions, by the layers' names, as the files tell them."""
        weights = {name.removesuffix(".weight"): shape for name, (shape, _) in self.layout.items() if name.endswith(".weight")}
        return {name: shape for name, shape in weights.items() if len(shape) > 1}

    def skeleton(self) -> nn.Module:
        """The network without weights (meta device), of the class that config.json names."""
        return skeleton(self.config)


def network_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder's denoiser."""
    places = [folder / name / "config.json" for name in FOLDERS]
    return read_object(next((place for place in places if place.exists()), places[0]))


def skeleton(config: dict[str, Any]) -> nn.Module:
    """A network without weights (meta device) from its config.json. Raises UserError for one of no family."""
    network: Any = imported(spec_of(config).networks[config["_class_name"]])
    return without_weights(network, config, "the denoiser")


def names_of(spec: ModelSpec) -> LayerNames | None:
    """The tables of what other programs call a family's layers."""
    return cast(LayerNames, imported(spec.names)) if spec.names else None


def write_weights(folder: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write ``tensors``, in the order of ``layout``, as diffusers' weight file, or as shards with an index."""
    stem = CODES if any(dtype == torch.int8 for _, dtype in layout.values()) else WEIGHTS
    shards = _shards(layout, shard_bytes)
    names = [
        f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    stream = iter(tensors)
    for file, shard in zip(names, shards):
        with TensorFile(folder / file, shard, {"format": "pt"}) as out:
            for _ in shard:
                out.write(*next(stream))
    if len(shards) > 1:
        total = sum(map(_bytes, layout.values()))
        where = {name: file for file, shard in zip(names, shards) for name in shard}
        replace_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that appears complete or not at all. Raises UserError when it exists, or when the disk refuses."""
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"'{path}' already exists: choose another --out, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_folder(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot write '{path}': {e}. Nothing was left behind.") from e


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``dedistill.json`` says of a model folder; empty without one."""
    return checked_facts(read_object(folder / FACTS), f"'{folder / FACTS}'") if (folder / FACTS).exists() else {}


def _shards(layout: Layout, limit: int) -> list[dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    shards: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{}]
    size = 0
    for name, entry in layout.items():
        if shards[-1] and size + _bytes(entry) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += _bytes(entry)
    return shards


def _bytes(entry: tuple[tuple[int, ...], torch.dtype]) -> int:
    return torch.Size(entry[0]).numel() * entry[1].itemsize
