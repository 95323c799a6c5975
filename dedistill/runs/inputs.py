"""The bytes that a run was made from: which files they are, and whether they are still the same, wherever they lie now."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from dedistill.data.encode import data_files
from dedistill.data.pairs import FACTS
from dedistill.io.hashing import Hashed, Stamp, hash_file
from dedistill.models.pipeline_files import model_files
from dedistill.recipe import Recipe

Files = Mapping[str, Path]
"""Name inside the folder that a recipe names -> the file; "." -> a single file, whatever it is called."""


def input_files(recipe: Recipe) -> dict[str, Files]:
    """Recipe key -> files that training reads because of it."""
    m = recipe.model  # a hub id has no files here; its commit stands in the recipe
    places = {"model.path": m.path, "model.components": m.components, "model.image_prompts": m.image_prompts}
    places["train.lpips"] = recipe.train.lpips
    files = {key: model_files(Path(place)) for key, place in places.items() if place is not None}
    files["data.path"] = {file.name: file for file in data_files(recipe.data)}
    files["data.pairs"] = {FACTS: Path(recipe.data.pairs) / FACTS} if recipe.data.pairs else {}
    return {key: found for key, found in files.items() if found}


class Fingerprint(TypedDict):
    """Which bytes some files had."""

    sha256: str
    """Of the names and hashes of all."""
    files: dict[str, dict[str, int | str]]
    """Name -> its :class:`Stamp` and "sha256"."""


def fingerprint(files: Files, known: Fingerprint | None) -> Fingerprint:
    """Of ``files`` as they are; one is read only if its stamp is another one than in ``known``.

    A large base is so hashed once per run, not at every start.
    """
    before = known["files"] if known else {}
    found: dict[str, dict[str, int | str]] = {}
    for name, path in files.items():
        hashed = hash_file(path, _read_entry(before.get(name, {})))
        found[name] = {**hashed.stamp._asdict(), "sha256": hashed.sha256}
    digest = hashlib.sha256("".join(f"{name}\0{entry['sha256']}\n" for name, entry in found.items()).encode())
    return {"sha256": digest.hexdigest(), "files": found}


def _read_entry(entry: Mapping[str, int | str]) -> Hashed | None:
    """None for one of an earlier version, which kept size and mtime only: the file is read once more."""
    whole = entry.keys() == {*Stamp._fields, "sha256"}
    return Hashed(Stamp(*(int(entry[key]) for key in Stamp._fields)), str(entry["sha256"])) if whole else None


def changed_files(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Names whose bytes differ between two fingerprints, or that only one of them has."""
    old, new = ({name: entry["sha256"] for name, entry in f["files"].items()} for f in (before, now))
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
