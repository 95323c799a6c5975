"""What a run was made from: the bytes of its base and its data, so that it is never continued from others in silence."""

import hashlib
from pathlib import Path

from dedistill.data.registry import data_files
from dedistill.io.hashing import Hashed, Stamp, hash_file
from dedistill.recipe import Recipe

_MODEL_FILES = ("*.safetensors", "config.json", "dedistill.json")


def model_files(path: Path) -> list[Path]:
    """The files that say what the model in folder ``path`` computes, sorted; ``path`` itself when it is a file."""
    if path.is_file():
        return [path]
    return sorted(found for pattern in _MODEL_FILES for found in path.rglob(pattern))


def input_files(recipe: Recipe) -> dict[str, list[Path]]:
    """Recipe key -> files that training reads because of it."""
    m = recipe.model  # a hub id has no files here; its commit stands in the recipe
    places = {"model.path": m.path, "model.components": m.components}
    files = {key: model_files(Path(place)) for key, place in places.items() if place is not None}
    files["data.path"] = data_files(recipe.data)
    return {key: found for key, found in files.items() if found}


def fingerprint(files: list[Path], known: dict | None) -> dict:
    """{"sha256", "files": {path: its stamp and "sha256"}}; a file is read only if its stamp is another one than in ``known``.

    A large base is so hashed once per run, not at every start.
    """
    before, found = (known or {}).get("files", {}), {}
    for path in files:
        hashed = hash_file(path, _read_entry(before.get(str(path), {})))
        found[str(path)] = {**hashed.stamp._asdict(), "sha256": hashed.sha256}
    digest = hashlib.sha256("".join(f"{path}\0{entry['sha256']}\n" for path, entry in found.items()).encode())
    return {"sha256": digest.hexdigest(), "files": found}


def _read_entry(entry: dict) -> Hashed | None:
    """None for one of an earlier version, which kept size and mtime only: the file is read once more."""
    whole = entry.keys() == {*Stamp._fields, "sha256"}
    return Hashed(Stamp(*(entry[key] for key in Stamp._fields)), entry["sha256"]) if whole else None


def changed_files(before: dict, now: dict) -> list[str]:
    """Paths whose bytes differ between two fingerprints, or that only one of them has."""
    old, new = ({path: entry["sha256"] for path, entry in f["files"].items()} for f in (before, now))
    return sorted(path for path in old.keys() | new.keys() if old.get(path) != new.get(path))
