"""A model folder in the forms other programs load: diffusers' own, one file under either set of names, and our int8."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dedistill.base.int8 import Int8Linear, quantize_rows
from dedistill.base.quantize import excluded
from dedistill.errors import UserError
from dedistill.families.naming import naming_of
from dedistill.files import replace_json
from dedistill.release.card import write_card
from dedistill.release.folder import (
    FACTS,
    SHARD_BYTES,
    Denoiser,
    copy_rest,
    linear_shapes,
    new_folder,
    read_facts,
    write_weights,
)
from dedistill.release.headers import model_header
from dedistill.tensorfile import Layout, TensorFile

Stream = Iterator[tuple[str, Tensor]]


def export_model(
    source: Path,
    out: Path,
    form: str,
    *,
    base: str | None = None,
    licence: str | None = None,
    exclude: list[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write model folder ``source`` to the new folder ``out`` in ``form``, with a model card; returns ``out``.

    form: "diffusers" (the whole folder, shards of ``shard_bytes``), "single" (one file, diffusers' names), "bfl" (one
    file, the names of the model's own repository), "int8" (the folder, linears as our int8 except ``exclude``).
    base: hub id of the published model behind it, where provenance and paths do not tell; licence: another one than the
    base's, where the base allows that. One tensor is in memory at a time. Raises UserError, writing nothing, when a
    tensor is missing or unknown, the licence is not ours to give, ``out`` exists, or the disk is full.
    """
    net = Denoiser(source)
    facts = read_facts(source)
    if any(dtype == torch.int8 for _, dtype in net.layout.values()):
        raise UserError(f"'{source}' is an int8 export already; export the folder it was made from")
    with new_folder(out) as folder:
        write_card(folder, out.name, form, net.config, facts, str(source), base=base, licence=licence)
        _FORMS[form](net, folder, out.name, facts, exclude or [], shard_bytes)
    return out


def _diffusers(net: Denoiser, folder: Path, name: str, facts: dict, exclude: list[str], shard_bytes: int) -> None:
    _write_folder(net, folder, facts, net.layout, net.items(), shard_bytes)


def _single(net: Denoiser, folder: Path, name: str, facts: dict, exclude: list[str], shard_bytes: int) -> None:
    with TensorFile(folder / f"{name}.safetensors", net.layout, model_header(name, net.config, facts)) as out:
        for key, tensor in net.items():
            out.write(key, tensor)


def _bfl(net: Denoiser, folder: Path, name: str, facts: dict, exclude: list[str], shard_bytes: int) -> None:
    naming = naming_of(net.config["_class_name"])
    plan = naming.bfl_plan(net.layout)
    layout = {}
    for bfl, parts in plan.items():
        shapes = [net.layout[part][0] for part in parts]
        layout[bfl] = ((sum(s[0] for s in shapes), *shapes[0][1:]), net.layout[parts[0]][1])
    with TensorFile(folder / f"{name}.safetensors", layout, model_header(name, net.config, facts)) as out:
        for bfl, parts in plan.items():
            out.write(bfl, naming.join(bfl, [net[part] for part in parts]))


def _int8(net: Denoiser, folder: Path, name: str, facts: dict, exclude: list[str], shard_bytes: int) -> None:
    linears = list(linear_shapes(net.skeleton()))
    kept = excluded(exclude, linears)
    weights = {f"{linear}.weight" for linear in linears if linear not in kept}
    layout: dict = {}
    for key, (shape, dtype) in net.layout.items():
        layout[key] = (shape, torch.int8 if key in weights else dtype)
        if key in weights:
            layout[f"{key}_scale"] = ((shape[0], 1), dtype)
    _write_folder(net, folder, {**facts, "quantized": "int8"}, layout, _quantized(net, weights), shard_bytes)


def _quantized(net: Denoiser, weights: set[str]) -> Stream:
    for key, tensor in net.items():
        if key in weights:
            codes, scale = quantize_rows(tensor)
            yield key, codes
            yield f"{key}_scale", scale
        else:
            yield key, tensor


def _write_folder(net: Denoiser, folder: Path, facts: dict, layout: Layout, stream: Stream, shard_bytes: int) -> None:
    (folder / "transformer").mkdir()
    replace_json(folder / "transformer" / "config.json", net.config)
    write_weights(folder / "transformer", layout, stream, shard_bytes)
    copy_rest(net.folder, folder)
    if around := facts.get("components"):
        if not Path(around).is_dir():
            raise UserError(f"'{net.folder}' takes text encoders and VAE from '{around}', which is not there")
        copy_rest(Path(around), folder)
    if facts:
        replace_json(folder / FACTS, {k: v for k, v in facts.items() if k != "components"})


_FORMS: dict[str, Callable[..., None]] = {"diffusers": _diffusers, "single": _single, "bfl": _bfl, "int8": _int8}
FORMS = tuple(_FORMS)


def load_int8(folder: str | Path) -> nn.Module:
    """The denoiser of an int8 export, frozen, to be given to a pipeline as its ``transformer``."""
    stored = Denoiser(Path(folder))
    net, tensors = stored.skeleton(), {name: tensor.clone() for name, tensor in stored.items()}
    for name in linear_shapes(net):
        if (scale := tensors.pop(f"{name}.weight_scale", None)) is not None:
            bias = tensors.pop(f"{name}.bias", None)
            net.set_submodule(name, Int8Linear(tensors.pop(f"{name}.weight"), scale, bias))
    state: dict[str, Any] = {n: t for n, t in net.state_dict().items() if not t.is_meta} | tensors
    net.load_state_dict(state, assign=True)
    return net.requires_grad_(False).eval()
