"""Model folders as diffusers lays them out: which files may go on into another one.

What is written is meant to be uploaded. So credentials of a clone, code, pickles and what links fetch from elsewhere must not
get into it, whatever folder it is made from: only what is known is taken.
"""

import re
import shutil
from collections.abc import Collection
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dedistill.errors import UserError
from dedistill.io.atomic import replace_json
from dedistill.io.json_files import read_object
from dedistill.models.registry import is_hub_id
from dedistill.recipe.model_tables import Model
from dedistill.recipe.schema import MOST_SHIFTED

COMPONENTS = (
    *("scheduler", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    *("image_encoder", "feature_extractor"),
)
"""Folders of a pipeline beside its denoiser, to which its model_index.json may add others."""
_READ = re.compile(
    r"((tokenizer|generation|scheduler|preprocessor|processor|image_processor)_)?config\.json|vocab\.(json|txt)|merges\.txt|"
    r"(tokenizer|special_tokens_map|added_tokens)\.json|(spiece|tokenizer|sentencepiece)(\.bpe)?\.model|"
    r"chat_template\.(json|jinja)"
)
"""What diffusers and transformers read in the folder of a component beside its weights; of any other file nobody knows what it
tells."""
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
_TOKENS = ("tokenizer.json", "vocab.json")
"""Tables of words, which may look like paths."""
_INDEX = "model_index.json"
_TOP = (_INDEX, "merge.json")
_LICENCE = re.compile(r"(licen[cs]e|notice|copying)([-_ ][\w -]*)?(\.(md|txt|rst))?", re.IGNORECASE)
_ELSEWHERE = ("README.md", "dedistill.json", "run.json")
"""Written anew into every folder, or the business of one run."""
_PICKLED = "*pytorch_model*.bin"

SCHEDULER = "scheduler/scheduler_config.json"
Files = dict[Path, Path]
"""Path inside the new folder -> the file to be copied there."""


_COMPUTES = ("*.safetensors", "config.json", "dedistill.json")


def model_files(path: Path) -> dict[str, Path]:
    """The files that say what the model in folder ``path`` computes, by their names in it; a single file as "."."""
    if path.is_file():
        return {".": path}
    return {f.relative_to(path).as_posix(): f for f in sorted(f for pattern in _COMPUTES for f in path.rglob(pattern))}


def is_pipeline(folder: Path) -> bool:
    """Whether ``folder`` holds a VAE and text encoders, as a place to take them from must."""
    return (folder / "vae" / "config.json").is_file() and any(folder.glob("text_encoder*/config.json"))


def pipeline_files(source: Path, denoiser: str, only: Collection[str] | None = None) -> tuple[Files, list[str]]:
    """What folder ``source`` holds of a pipeline beside the denoiser, and the names of what else lies there.

    Taken are model_index.json, licences, and in the folders of components the files that the libraries read there by their
    names; never a name that begins with a dot, which is not counted as left out either. denoiser: the folder of
    the denoiser; only: these files and folders alone. Raises UserError for a link that leads out of ``source``, and for a
    component that has its weights only as pickles, or under names that are read on demand alone.
    """
    files: Files = {}
    left_out: list[str] = []
    folders = _components(source)
    for path in _visible(source):
        name = path.name
        if name in (*_ELSEWHERE, denoiser) or (only is not None and name not in only):
            continue
        # a dangling link counts: what it stands for would be missing without a word
        if name in folders and (path.is_dir() or path.is_symlink()):
            inner, others = _component_files(source, path)
            files |= inner
            left_out += others
        elif (name in _TOP or _LICENCE.fullmatch(name)) and not path.is_dir():
            files[Path(name)] = _followed(path, source)
        else:
            left_out.append(name)
    return files, left_out


def copy_files(files: Files, out: Path) -> None:
    """Copy ``files`` into folder ``out``: weights as hard links where the disk allows it, without what their headers may tell,
    and JSON without local paths."""
    from dedistill.io.safetensors import copy_tensors  # here: recipes are read by this file, and need no torch

    for inside, file in files.items():
        target = out / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        is_table = inside.suffix == ".json" and inside.name not in _TOKENS
        if is_table and (config := read_object(file)) != (public := public_config(config)):
            replace_json(target, public)
        elif inside.suffix == ".safetensors":
            copy_tensors(file, target)
        else:
            shutil.copyfile(file, target)


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json, or any table, without the places on this machine that libraries write into it (``_name_or_path``)."""
    return {key: _public(value) for key, value in config.items() if not _is_local(key, value)}


def _public(value: object) -> object:
    if isinstance(value, list):
        return [_public(v) for v in value if not _is_local("", v)]
    return public_config(value) if isinstance(value, dict) else value


def _is_local(key: str, value: object) -> bool:
    if not isinstance(value, str):
        return False
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return absolute or bool(_PLACE.match(value)) or (key.endswith("name_or_path") and not is_hub_id(value))


_PLACE = re.compile(r"~|\.{1,2}[/\\]|(?!https?:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
"""How places begin that are no absolute paths: homes, what lies beside, and schemes that are not the web's."""


def _components(source: Path) -> set[str]:
    """Names of the folders of components, with those that model_index.json names."""
    index = source / _INDEX
    named = read_object(_followed(index, source)) if index.exists() or index.is_symlink() else {}
    return {*COMPONENTS, *(name for name, value in named.items() if isinstance(value, list))}


def _component_files(source: Path, folder: Path) -> tuple[Files, list[str]]:
    _followed(folder, source)
    seen = _visible(folder)
    weights = _weights(folder, source)
    known = [f for f in seen if f.name in weights or _READ.fullmatch(f.name) or _LICENCE.fullmatch(f.name)]
    taken = [f for f in known if f.is_file() or f.is_symlink()]
    if not any(f.name in weights for f in taken):
        if pickles := [f for f in seen if f.match(_PICKLED)]:
            raise UserError(
                f"'{pickles[0]}' is a pickle, which is not passed on, and '{folder}' has no other weights: save them as "
                "safetensors"
            )
        if others := [f for f in seen if f.suffix == ".safetensors"]:
            raise UserError(
                f"'{folder}' has no weights but '{others[0].name}', which is read only where it is asked for by name: call the "
                f"ones that count {' or '.join(_WHOLE)}"
            )
    files = {f.relative_to(source): _followed(f, source) for f in taken}
    return files, [str(f.relative_to(source)) for f in seen if f not in taken]


def _weights(folder: Path, source: Path) -> set[str]:
    """Names of the weights that loaders take of a component: one file, or those of an index, and not what lies beside."""
    found = set(_WHOLE)
    for name in _WHOLE:
        if (index := folder / f"{name}.index.json").exists():
            named = read_object(_followed(index, source)).get("weight_map")
            found |= {index.name, *(f for f in named.values() if isinstance(f, str))} if isinstance(named, dict) else set()
    return found


def _visible(folder: Path) -> list[Path]:
    try:
        return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    except OSError as e:
        raise UserError(f"'{folder}' cannot be read as a folder: {e.strerror}") from e


def _followed(path: Path, source: Path) -> Path:
    """The file or folder that ``path`` in folder ``source`` stands for.

    Raises UserError where a link leads out of ``source`` or to what would not be taken itself. In the cache of the
    Hugging Face hub a snapshot's files are links to the blobs beside it; these are part of it.
    """
    try:
        root, real = source.resolve(), path.resolve()
    except RuntimeError as e:
        raise UserError(f"'{path}' is a link that leads to itself") from e
    if root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs") and real.is_file():
        return real
    if real.is_relative_to(root) and real.exists():
        hidden = any(part.startswith(".") for part in real.relative_to(root).parts)
        if not hidden and (real.is_dir() or real.suffix == path.suffix):
            return real
    raise UserError(
        f"'{path}' leads to '{real}' by a link; a new model folder takes only what is in '{source}' itself: "
        "put a copy in place of the link"
    )


# --- what is known of a model before it is loaded ---------------------------------------------------------------------


def hub_config(path: str, revision: str, folder: str) -> Path:
    """config.json in ``folder`` of a hub id, fetched once: a commit never changes. Raises OSError or ValueError where that
    fails."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(path, f"{folder}/config.json", revision=revision))


def scheduler_file(here: Path, around: Path) -> Path:
    """Of a model in ``here`` whose other components are in ``around``: its own, as merged models have, else theirs."""
    return here / SCHEDULER if (here / SCHEDULER).exists() else around / SCHEDULER


def own_shift(model: Model, published: float | None) -> float | None:
    """As ModelSpec.shift: what the scheduler says, if it is one number. published: without a scheduler."""
    here = Path(model.path or "")
    try:
        around = model.components
        if around is None and (here / "dedistill.json").exists():
            around = read_object(here / "dedistill.json").get("components")
        if (file := scheduler_file(here, Path(around or here))).exists():
            found = read_object(file)
            shift = float(found.get("shift", 1.0))
            return None if found.get("use_dynamic_shifting") or not 0 < shift <= MOST_SHIFTED else shift
    except (OSError, ValueError, TypeError, UserError):
        return None  # whoever loads the model says what is wrong with it
    return published
