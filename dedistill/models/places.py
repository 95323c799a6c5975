"""Where the files of a model in diffusers' layout are: a folder, a hub id at its commit, or one file and a folder beside it."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dedistill.adapters.naming import FOLDERS
from dedistill.errors import UserError
from dedistill.io.hashing import file_sha256
from dedistill.io.json_files import parse_object, read_object
from dedistill.io.weights import open_weights
from dedistill.models.pipeline_files import model_files, scheduler_file
from dedistill.models.registry import checked_facts, families, get_it, get_spec, looks_local, public_name
from dedistill.models.spec import ModelSpec
from dedistill.recipe import Recipe
from dedistill.recipe.embedded import read_recipe
from dedistill.recipe.model_tables import Model

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Place:
    """denoiser: folder or single file; components: folder with text encoders, tokenizers, VAE and scheduler."""

    denoiser: Path
    components: Path
    scheduler: dict[str, Any] = field(default_factory=dict)
    scheduler_file: Path = Path()
    """Where that is from, or was looked for."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What dedistill.json says about weights of ours, e.g. the mask they were trained with."""


def named_path(model: Model) -> str:
    """model.path of a recipe whose family needs one."""
    if model.path is None:
        raise UserError("model.path: this family starts from trained weights: a diffusers folder, a hub id, or a file", 2)
    return model.path


def locate(spec: ModelSpec, path: str, revision: str | None, components: str | None) -> Place:
    """Find all parts of a model; downloads a hub id at its pinned revision. Raises UserError naming the missing part."""
    here = _local(spec, path, revision, "model.path")
    check_folder(spec, here)
    facts = _facts(here)
    if quantized := facts.get("quantized"):
        raise UserError(f"model.path: '{here}' is an {quantized} export; train on the unquantized folder it was made from")
    other = components or facts.get("components")
    if here.is_file() and other is None:
        raise UserError(
            "model.components: a single file holds the denoiser alone; name the folder or hub id with text encoders and VAE", 2
        )
    around = here if other is None or (here / "vae").is_dir() else _local(spec, other, revision, "model.components")
    denoiser = here if here.is_file() else here / spec.folder
    if not denoiser.exists():
        raise UserError(f"model.path: '{here}' has no folder '{spec.folder}': not a model of {spec.name} in diffusers' layout")
    scheduler = scheduler_file(here, around)
    return Place(denoiser, around, read_object(scheduler, "model.path") if scheduler.exists() else {}, scheduler, facts)


def check_folder(spec: ModelSpec, folder: Path) -> None:
    """Raises UserError for a model folder of another family, by what it says of itself and its denoiser's config."""
    if not folder.is_dir():
        return
    config = next((file for name in FOLDERS if (file := folder / name / "config.json").exists()), None)
    own = read_object(config, "model.path") if config else {}
    told, kind = _facts(folder).get("family"), own.get("_class_name")
    if told in (None, spec.name) and (not kind or (kind in spec.networks and spec.has(own))):
        return
    named = (name for name in families() if kind in get_spec(name).networks and get_spec(name).has(own))
    other = told if told not in (None, spec.name) else next(named, "")
    what = f"a {kind} of {other}, not of {spec.name}; set model.family = '{other}'"
    raise UserError(f"model.path: '{folder}' holds {what if other else f'a {kind}, which is no network of {spec.name}'}", 2)


def _facts(here: Path) -> dict[str, Any]:
    """What weights of ours say of themselves: dedistill.json of a folder, the header of a single file."""
    if here.is_dir():
        file = here / "dedistill.json"
        return checked_facts(read_object(file, "model.path"), f"model.path: '{file}'") if file.exists() else {}
    header = open_weights(here, "model.path").metadata() or {}
    where = f"model.path: '{here}': dedistill.facts in its header"
    return checked_facts(parse_object(header.get("dedistill.facts", "{}"), where), where)


def _local(spec: ModelSpec, path: str, revision: str | None, key: str) -> Path:
    if (here := Path(path)).exists():
        return here
    if looks_local(path):
        raise UserError(f"{key}: {path}: no such file or folder{get_it(spec, path)}", 2)
    if not _COMMIT.fullmatch(revision or ""):
        raise UserError(
            f"{key}: '{path}' is not a local folder. For a hub id pin its commit, 40 hexadecimal digits, with model.revision; "
            "a branch or tag may change under a run",
            2,
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_hub_files(spec.folder)))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as e:
        hint = " (accept its terms on huggingface.co and run hf auth login)" if isinstance(e, GatedRepoError) else ""
        raise UserError(
            f"{key}: '{path}' at revision '{revision}' cannot be fetched, and no such local folder{hint}: {e}"
        ) from e


def _hub_files(folder: str) -> list[str]:
    """Not the single-file copies that such repositories keep beside the folders."""
    return [
        *("*.json", "*/*.json", "*/*.txt", "*/*.model"),
        *(f"{folder}/*.safetensors", "text_encoder*/*.safetensors", "vae/*.safetensors"),
    ]


def check_origin(header: dict[str, str], recipe: Recipe, path: Path) -> None:
    """Refuse adapter weights that were trained on another base, or in another form, than ``recipe`` says.

    header: that of the file at ``path``. A base that is no longer where it was may have been moved: then only names of
    tensors are compared; a copy of it elsewhere is the same base. A released file tells no more of a local base than its
    name, which has to be the same.
    """
    made = read_recipe(header.get("dedistill.recipe", ""), f"'{path}'")
    if not made or recipe.adapter is None:
        return
    kind, table, here = made.get("adapter", {}).get("kind"), made.get("model", {}), recipe.model.path
    base = table.get("path")
    if kind != recipe.adapter.kind:
        found = f"a {kind}" if kind else "no adapter, as its header says"
        raise UserError(f"'{path}' is {found}, the recipe's adapter a {recipe.adapter.kind}: use the file's own recipe")
    if base is None or here is None:
        return
    other = f"'{path}' was trained on '{base}', the recipe's model.path is '{here}': use the file's own recipe"
    if "out" not in made.get("run", {}) and not table.get("revision"):  # a release, which names a local base but not its place
        if base != public_name(here, recipe.model.revision):
            raise UserError(f"{other}; if it is the same model under another name, give its folder the name '{base}'")
        return
    places = Path(base), Path(here)
    moved = places[0].exists() != places[1].exists()
    if not moved and places[0].resolve() != places[1].resolve() and not _same_bytes(*places):
        raise UserError(other)


def _same_bytes(one: Path, other: Path) -> bool:
    """Whether two models are there and copies of each other."""
    files, others = model_files(one), model_files(other)
    return files.keys() == others.keys() != set() and all(file_sha256(f) == file_sha256(others[n]) for n, f in files.items())
