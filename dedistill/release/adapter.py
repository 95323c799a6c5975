"""Adapter files for other programs: read whole, spelt anew, with the header each of them looks into."""

from pathlib import Path
from typing import Any

from dedistill.adapters.check import Verdict, check_adapter
from dedistill.adapters.files import read_tensors
from dedistill.adapters.formats import SPELLINGS, as_kohya, by_layer, check_shapes
from dedistill.errors import UserError
from dedistill.families.naming import naming_of, published_config
from dedistill.files import as_json, replace_file
from dedistill.release.folder import linear_shapes, network_config, skeleton
from dedistill.release.headers import adapter_header, lycoris_config
from dedistill.release.public import read_recipe
from dedistill.tensorfile import TensorFile


def export_adapter(file: Path, out: Path, spelling: str, model: Path | None = None) -> Path:
    """Write adapter ``file`` to ``out`` in a spelling of adapters.formats; returns ``out``.

    model: folder of the base; without it, the base that the file's own recipe names, at its full size. The "lycoris"
    spelling gets ``lycoris_config.json`` beside it, from which SimpleTuner goes on. Raises UserError, writing nothing,
    when the file does not fit that network whole, ``out`` or another adapter's config exists, or a LoKr is to become a LoRA.
    """
    if out.exists():
        raise UserError(f"'{out}' already exists: choose another --out, or remove it")
    tensors, header = read_tensors(file)
    config = config_for(tensors, header, model)
    shapes = linear_shapes(skeleton(config))
    layers = by_layer(tensors, shapes, str(file))
    try:
        check_shapes(layers, shapes, str(file))
    except UserError as e:
        raise UserError(f"{e}; if its base is another network, name the base's folder with --model") from e
    spelt = as_kohya(layers, naming_of(config["_class_name"]), shapes) if spelling == "kohya" else SPELLINGS[spelling](layers)
    metadata = adapter_header(out.stem, spelling, header, layers, config)
    config_file = out.with_name("lycoris_config.json")
    told = as_json(lycoris_config(layers)) if spelling == "lycoris" else b""
    if told and config_file.exists() and config_file.read_bytes() != told:
        raise UserError(f"'{config_file}' exists and is of another adapter: choose another folder for --out, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TensorFile(out, {name: (tuple(t.shape), t.dtype) for name, t in spelt.items()}, metadata) as written:
        for name, tensor in spelt.items():
            written.write(name, tensor)
    if told:
        replace_file(config_file, told)
    return out


def check_file(file: Path, model: Path | None = None) -> list[Verdict]:
    """What each program makes of adapter ``file`` on the network in folder ``model``, as in :func:`export_adapter`."""
    tensors, header = read_tensors(file)
    config = config_for(tensors, header, model)
    return check_adapter(tensors, linear_shapes(skeleton(config)), naming_of(config["_class_name"]))


def config_for(tensors: dict[str, Any], header: dict[str, str], model: Path | None) -> dict[str, Any]:
    """The config of the network that an adapter belongs to."""
    if model is not None:
        return network_config(model)
    table = read_recipe(header.get("dedistill.recipe", "")).get("model", {})
    source = table.get("path") or ""
    for folder in (Path(source), Path(table.get("components") or source)):  # a single file has its shape beside its encoders
        if (folder / "transformer" / "config.json").exists():
            return network_config(folder)
    return published_config(source, guidance=any("guidance" in name for name in tensors))
