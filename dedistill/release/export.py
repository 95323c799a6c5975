"""Models and adapters in the formats that other programs load."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dedistill.adapters.compatibility import Verdict, check_adapter
from dedistill.adapters.files import read_tensors
from dedistill.adapters.formats import ADAPTER_FORMATS, KOHYA, Layers, as_kohya, by_layer, check_shapes, is_lora
from dedistill.adapters.naming import FOLDERS, LayerNames
from dedistill.adapters.targets import Shape, adaptable
from dedistill.errors import UserError
from dedistill.io.atomic import as_json, replace_file, replace_json
from dedistill.io.safetensors import Layout, TensorFile
from dedistill.models.pipeline_files import Files, copy_files, is_pipeline, pipeline_files, public_config
from dedistill.models.quantize import QuantizedLinear, excluded, linear_names, quantize_rows
from dedistill.models.registry import adapter_family, check_adapter_family, families, get_spec, spec_of
from dedistill.models.spec import ModelSpec
from dedistill.recipe.embedded import read_recipe
from dedistill.recipe.model_tables import Model
from dedistill.recipe.objectives import OBJECTIVES
from dedistill.recipe.resolve import shift_note
from dedistill.release.card import write_card
from dedistill.release.folder import (
    FACTS,
    SHARD_BYTES,
    Denoiser,
    names_of,
    network_config,
    new_folder,
    read_facts,
    skeleton,
    write_weights,
)
from dedistill.release.headers import adapter_header, last_recipe, lycoris_config, model_header, origin_note, public_facts
from dedistill.release.rounding import UNKNOWN, RelativeSize, relative_size

# --- adapter files for other programs --------------------------------------------------------------------------------


def export_adapter(
    file: Path, out: Path, format: str, model: Path | None = None, say: Callable[[str], None] = lambda message: None
) -> Path:
    """Write adapter ``file`` to ``out`` in one of ``ADAPTER_FORMATS``; returns ``out``.

    model: folder of the base; without it, the base that the file's own recipe names, at its full size. The "lycoris"
    format gets ``lycoris_config.json`` beside it, from which SimpleTuner goes on. ``say`` is told how large the change is
    against the base's weights, and what small ones lose in other programs. Raises UserError, writing nothing, when the file
    does not fit that network whole, ``out`` or another adapter's config exists, or a LoKr is to become a LoRA.
    """
    if os.path.lexists(out):
        raise UserError(f"'{out}' already exists: choose another --out, or remove it")
    opened = _open(file, model)
    layers, spec, header = opened.layers(), opened.spec, opened.header
    renamed = _renamed(layers, format, spec, opened.shapes)
    metadata = adapter_header(out.stem, format, header, layers, opened.shapes, opened.config, spec)
    config_file = out.with_name("lycoris_config.json")
    table = as_json(lycoris_config(layers, opened.shapes)) if format == "lycoris" else b""
    if table and os.path.lexists(config_file) and not (config_file.is_file() and config_file.read_bytes() == table):
        raise UserError(f"'{config_file}' exists and is of another adapter: choose another folder for --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TensorFile(out, {name: (tuple(t.shape), t.dtype) for name, t in renamed.items()}, metadata) as written:
        for name, tensor in renamed.items():
            written.write(name, tensor)
    if table:
        replace_file(config_file, table)
    say(f"{out.name}: {opened.size(layers) or UNKNOWN}")
    if note := origin_note(header, str(opened.place or ""), opened.config, spec):
        say(note)
    _say_shifts(read_recipe(header.get("dedistill.recipe", "")), spec, opened.place, say)
    return out


@dataclass(frozen=True)
class _Opened:
    """An adapter file and the network that it belongs to."""

    file: Path
    tensors: dict[str, Tensor]
    header: dict[str, str]
    config: dict[str, Any]
    spec: ModelSpec
    shapes: dict[str, Shape]
    place: Path | None
    """Folder of that network, where it is there."""
    base: Denoiser | None
    """Its weights, where they are there."""

    def layers(self) -> Layers:
        """Raises UserError for a file that does not fit the network whole."""
        source = str(self.file)
        naming, folder = names_of(self.spec), self.spec.folder
        found = by_layer(self.tensors, self.shapes, source, folder=folder, header=self.header, naming=naming)
        try:
            check_shapes(found, self.shapes, source)
        except UserError as e:
            raise UserError(f"{e}; if its base is another network, name the base's folder with --model") from e
        return found

    def size(self, layers: Layers) -> RelativeSize | None:
        """None where the weights of the base are not there, or are codes."""
        if self.base is None or any(not dtype.is_floating_point for _, dtype in self.base.layout.values()):
            return None
        return relative_size(layers, self.base)


def _open(file: Path, model: Path | None, *, by_headers: bool = False) -> _Opened:
    """by_headers: take the base's shapes as its files tell them, where they are there; it need not be a whole network then."""
    tensors, header = read_tensors(file)
    read_recipe(header.get("dedistill.recipe", ""), f"'{file}'")  # where it cannot be read, the file is named
    place = model or _local_base(header)
    config = config_for(tensors, header, model)
    try:
        base = Denoiser(place, compare=not by_headers) if place else None
    except UserError:  # it is not whole, or damaged: its config tells the shapes all the same
        base = None
    base = base if base and base.layout else None
    shapes = base.shapes() if base and by_headers else adaptable(skeleton(config))
    return _Opened(file, tensors, header, config, _spec_for(config, header, str(file)), shapes, place, base)


@dataclass(frozen=True)
class Checked:
    """What is known of an adapter file."""

    verdicts: list[Verdict]
    layers: int
    kind: str
    """LoRA, LoKr, or empty for another one."""
    fault: str
    """Why this program cannot apply it, or nothing."""
    size: RelativeSize | None


def check_file(file: Path, model: Path | None = None) -> Checked:
    """What each program makes of adapter ``file`` on the network in folder ``model``, as in :func:`export_adapter`."""
    opened, layers, fault = _open(file, model, by_headers=True), Layers(), ""
    try:
        layers = opened.layers()
    except UserError as e:
        fault = str(e)
    names = names_of(opened.spec)
    verdicts = check_adapter(opened.tensors, opened.shapes, names, opened.spec.folder, opened.header)
    kind = ("LoRA" if is_lora(layers) else "LoKr") if layers else ""
    return Checked(verdicts, len(layers), kind, fault, opened.size(layers) if layers else None)


def _spec_for(config: dict[str, Any], header: dict[str, str], source: str) -> ModelSpec:
    """The family of a network with that config: the one that the adapter ``source`` names, as several may share a class.

    Raises UserError where the adapter is of another.
    """
    try:
        spec = spec_of(config, adapter_family(header))
    except UserError:
        spec = spec_of(config)
    check_adapter_family(header, spec, source)
    return spec


def _needed_names(spec: ModelSpec, format: str) -> LayerNames:
    if names := names_of(spec):
        return names
    raise UserError(f"'{format}' is not for {spec.name}: other programs have no names of their own for its layers", 2)


def _renamed(layers: Layers, format: str, spec: ModelSpec, shapes: dict[str, Shape]) -> dict[str, Tensor]:
    if format == KOHYA:
        return as_kohya(layers, _needed_names(spec, format), shapes)
    return ADAPTER_FORMATS[format](layers, spec.folder)


def _model_table(header: dict[str, str]) -> dict[str, Any]:
    table = read_recipe(header.get("dedistill.recipe", "")).get("model", {})
    return table if isinstance(table, dict) else {}


def _local_base(header: dict[str, str]) -> Path | None:
    """Where the recipe in an adapter's header has its base, if a denoiser is there."""
    table = _model_table(header)
    source = table.get("path") or ""
    folders = (Path(source), Path(table.get("components") or source))  # a single file has its shape beside its encoders
    return next((f for f in folders if any((f / name / "config.json").exists() for name in FOLDERS)), None)


def config_for(tensors: dict[str, Any], header: dict[str, str], model: Path | None) -> dict[str, Any]:
    """The config of the network that an adapter belongs to."""
    if model is not None:
        return network_config(model)
    if folder := _local_base(header):
        return network_config(folder)
    table = _model_table(header)
    source = table.get("path") or ""
    spec = get_spec(table.get("family") or next(iter(families())))
    if spec.full_config is None:
        raise UserError(f"the base of this adapter, '{source}', is not there: name its folder with --model")
    return spec.full_config(source, any("guidance" in name for name in tensors))


def _say_shifts(recipe: dict[str, Any], spec: ModelSpec, base: Path | None, say: Callable[[str], None]) -> None:
    """Where the weights were trained at another shift of sigma than images are made with. base: the model's folder."""
    objective = recipe.get("train", {}).get("objective", "flow")
    if not recipe or (objective in OBJECTIVES and OBJECTIVES[objective].own_sigmas):
        return
    path = str(base) if base else recipe.get("model", {}).get("path")
    trained, sampled = recipe.get("timesteps", {}).get("shift", 1.0), recipe.get("sample", {}).get("shift", "auto")
    # a folder of ours has the scheduler of sample.shift; what auto was in training is no longer known there
    own = spec.shift(Model.model_construct(family=spec.name, path=path)) if path and sampled == "auto" else None
    if note := shift_note(trained, sampled, lambda: own):
        say(note)


# --- A model folder in the formats other programs load ---------------------------------------------------------------


Stream = Iterator[tuple[str, Tensor]]
_NAMED = 5
"""So many of the files that are left out are named."""


def export_model(
    source: Path,
    out: Path,
    format: str,
    *,
    base: str | None = None,
    licence: str | None = None,
    exclude: list[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """Write model folder ``source`` to the new folder ``out`` in ``format``, with a model card; returns ``out``.

    format: "diffusers" (the whole folder, shards of ``shard_bytes``), "single" (one file, diffusers' names), "bfl" (one
    file, the names of the model's own repository), "int8" (the folder, linears as our int8 except ``exclude``).
    base: hub id of the published model behind it, where provenance and paths do not tell; licence: another one than the
    base's, where the base allows that. One tensor is in memory at a time. What is written is for others: it names no place
    on this machine and holds nothing but the pipeline; ``say`` is told what was left out. Raises UserError, writing nothing,
    when a tensor is missing or unknown, a file is a link to elsewhere, the licence is not ours to give, ``out`` exists, or
    the disk is full.
    """
    stored = Denoiser(source)
    facts = read_facts(source)
    if any(dtype == torch.int8 for _, dtype in stored.layout.values()):
        raise UserError(f"'{source}' is an int8 export already; export the folder it was made from")
    files, left_out = _around(source, facts, stored.spec) if format in _FOLDERS else ({}, [])
    with new_folder(out) as folder:
        write_card(folder, out.name, format, stored.config, stored.spec, facts, str(source), base=base, licence=licence)
        _MODEL_FORMATS[format](stored, folder, out.name, facts, exclude or [], shard_bytes)
        copy_files(files, folder)
    _say_shifts(read_recipe(last_recipe(facts)), stored.spec, source, say)
    if left_out:
        others = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        say(f"left out, as no part of the pipeline: {', '.join(left_out[:_NAMED])}{others}")
    return out


def _around(source: Path, facts: dict[str, Any], spec: ModelSpec) -> tuple[Files, list[str]]:
    """What the release of ``source`` holds beside the denoiser, from there and from where its components are."""
    files, left_out = pipeline_files(source, spec.folder)
    if around := facts.get("components"):
        if not Path(around).is_dir():
            raise UserError(f"'{source}' takes text encoders and VAE from '{around}', which is not there")
        if not is_pipeline(Path(around)):
            raise UserError(
                f"'{source / FACTS}' says that text encoders and VAE are in '{around}', which is not a pipeline folder: it has "
                "no vae/config.json or no text_encoder*/config.json. Nothing is taken from there; correct 'components'"
            )
        others, more = pipeline_files(Path(around), spec.folder)
        files, left_out = others | files, [*left_out, *(str(Path(around) / name) for name in more)]
    return files, left_out


def _diffusers(stored: Denoiser, folder: Path, name: str, facts: dict[str, Any], exclude: list[str], shard_bytes: int) -> None:
    _write_folder(stored, folder, facts, stored.layout, stored.items(), shard_bytes)


def _single(stored: Denoiser, folder: Path, name: str, facts: dict[str, Any], exclude: list[str], shard_bytes: int) -> None:
    with TensorFile(
        folder / f"{name}.safetensors", stored.layout, model_header(name, stored.config, facts, stored.spec)
    ) as out:
        for key, tensor in stored.items():
            out.write(key, tensor)


def _bfl(stored: Denoiser, folder: Path, name: str, facts: dict[str, Any], exclude: list[str], shard_bytes: int) -> None:
    naming = _needed_names(stored.spec, "bfl")
    plan = naming.original_plan(stored.layout)
    layout = {}
    for bfl, parts in plan.items():
        shapes = [stored.layout[part][0] for part in parts]
        layout[bfl] = ((sum(s[0] for s in shapes), *shapes[0][1:]), stored.layout[parts[0]][1])
    with TensorFile(folder / f"{name}.safetensors", layout, model_header(name, stored.config, facts, stored.spec)) as out:
        for bfl, parts in plan.items():
            out.write(bfl, naming.join(bfl, [stored[part] for part in parts], stored.layout))


def _int8(stored: Denoiser, folder: Path, name: str, facts: dict[str, Any], exclude: list[str], shard_bytes: int) -> None:
    linears = linear_names(stored.skeleton())
    kept = excluded(exclude, linears)
    weights = {f"{linear}.weight" for linear in linears if linear not in kept}
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for key, (shape, dtype) in stored.layout.items():
        layout[key] = (shape, torch.int8 if key in weights else dtype)
        if key in weights:
            layout[f"{key}_scale"] = ((shape[0], 1), dtype)
    _write_folder(stored, folder, {**facts, "quantized": "int8"}, layout, _quantized(stored, weights), shard_bytes)


def _quantized(stored: Denoiser, weights: set[str]) -> Stream:
    for key, tensor in stored.items():
        if key in weights:
            codes, scale = quantize_rows(tensor)
            yield key, codes
            yield f"{key}_scale", scale
        else:
            yield key, tensor


def _write_folder(
    stored: Denoiser, folder: Path, facts: dict[str, Any], layout: Layout, stream: Stream, shard_bytes: int
) -> None:
    place = folder / stored.spec.folder
    place.mkdir()
    replace_json(place / "config.json", public_config(stored.config))
    write_weights(place, layout, stream, shard_bytes)
    if facts:
        replace_json(folder / FACTS, public_facts(facts))


_MODEL_FORMATS: dict[str, Callable[..., None]] = {"diffusers": _diffusers, "single": _single, "bfl": _bfl, "int8": _int8}
MODEL_FORMATS = tuple(_MODEL_FORMATS)
_FOLDERS = ("diffusers", "int8")


def formats_of(spec: ModelSpec) -> tuple[str, ...]:
    """The formats that a family's models can be exported in."""
    return tuple(format for format in MODEL_FORMATS if format != "bfl" or spec.names)


def load_int8(folder: str | Path) -> nn.Module:
    """The denoiser of an int8 export, frozen, to be given to a pipeline as its ``transformer``."""
    stored = Denoiser(Path(folder))
    network, tensors = stored.skeleton(), {name: tensor.clone() for name, tensor in stored.items()}
    for name in linear_names(network):
        if (scale := tensors.pop(f"{name}.weight_scale", None)) is not None:
            bias = tensors.pop(f"{name}.bias", None)
            network.set_submodule(name, QuantizedLinear(tensors.pop(f"{name}.weight"), scale, bias))
    state: dict[str, Any] = {n: t for n, t in network.state_dict().items() if not t.is_meta} | tensors
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()
