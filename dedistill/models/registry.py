"""Model families by name, the package's own and those of others. A family's code is imported when it is searched for."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dedistill.errors import UserError
from dedistill.models.spec import UNKNOWN, Config, Licence, ModelSpec, Published
from dedistill.recipe.model_tables import Model

if TYPE_CHECKING:
    from dedistill.models.family import Family

OWN = {name: f"dedistill.models.{name}:SPEC" for name in ("flux", "sd3", "sdxl", "sd15", "pixel_flux", "example")}
GROUP = "dedistill.families"
"""Entry points by which other packages add a family: its name -> "package.module:SPEC"."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_IN_HUB_CACHE = re.compile(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)/snapshots(?:/|$)")


def families() -> list[str]:
    """Names of all families, the package's own first."""
    return list(_places())


@cache
def _places() -> dict[str, str]:
    return OWN | {point.name: point.value for point in entry_points(group=GROUP) if point.name not in OWN}


def imported(place: str) -> object:
    """What "package.module:name", or "package.module", stands for."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name) if name else import_module(module)


def get_spec(name: str, where: str = "model.family") -> ModelSpec:
    """The family called ``name`` as data; ``where`` is the place in the recipe, for the error."""
    places = _places()
    if name not in places:
        near = get_close_matches(name, places, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(places)}"
        raise UserError(f"{where}: unknown family '{name}', {hint}", exit_code=2)
    return cast(ModelSpec, imported(places[name]))


def get_family(name: str, where: str = "model.family") -> "Family":
    """The family called ``name``."""
    return cast("type[Family]", imported(get_spec(name, where).family))()


def spec_of(config: Config, family: str | None = None) -> ModelSpec:
    """The family of a denoiser with that config.json: the one that a recipe or folder names, else the first that has its class.

    Raises UserError for a class that it, or no family, has.
    """
    kind = str(config.get("_class_name"))
    searched = [family] if family in _places() else families()
    for name in searched:
        if kind in (spec := get_spec(name)).networks and spec.has(config):
            return spec
    known = sorted({network for name in searched for network in get_spec(name).networks})
    whose = f"not one of {family}" if searched == [family] else "one of no family"
    raise UserError(f"config.json names a network, {kind!r} (_class_name), that is {whose}; known: {', '.join(known)}")


def text_length(family: "Family", length: int, where: str = "model.text_length") -> int:
    """``length``: tokens that a caption is padded or cut to. Raises UserError for more than the family's text encoder takes."""
    if length > family.max_text_length:
        raise UserError(f"{where}: {length} tokens; {family.spec.name} takes at most {family.max_text_length}", exit_code=2)
    return length


# --- defaults of a recipe that are the family's; recipe.resolve asks for them by name --------------------------------


def family_defaults(model: Model) -> dict[str, Any]:
    """Dotted keys of a recipe with such a [model] table, and their values; empty for an unknown family."""
    own = get_spec(model.family).defaults(model) if model.family in _places() else {}
    return {"sample.shift": "auto", "model.mask": "bool", "model.t5_mask": True} | own


def defaults_before(model: Model) -> dict[str, Any]:
    """The same in runs that were started before recipe.json held them."""
    return get_spec(model.family).defaults_before(model) if model.family in _places() else {}


# --- what model folders say of themselves ---------------------------------------------------------------------------


def checked_facts(facts: dict[str, Any], where: str) -> dict[str, Any]:
    """``facts``, what dedistill.json or a header says of weights, if all that is read of them is of its kind.

    where: the file, as messages call it. Raises UserError that names it and the key.
    """
    base = facts.get("base", {})
    chains = {key: (facts.get(key, []), kinds) for key, kinds in _STEPS.items()}
    wrong = [key for key, (rows, kinds) in chains.items() if not (isinstance(rows, list) and all(_are(r, kinds) for r in rows))]
    if not _are(base, {}) or not isinstance(base.get("path") or "", str):
        wrong.append("base")
    texts = ("components", "family", "mask", "quantized", "absent", "prediction")
    wrong += [key for key in texts if not isinstance(facts.get(key), str | None)]
    if wrong:
        raise UserError(f"{where}: '{wrong[0]}' is not what dedistill writes there; fetch the file again, or remove it")
    return facts


_Kinds = Mapping[str, type | tuple[str, ...]]
_TRAINING: _Kinds = {"recipe": str, "step": int}
_MERGE: _Kinds = {
    "recipe": str,
    "adapter_header": dict,
    "dtype": ("bf16", "fp32"),
    "rounding": ("stochastic", "nearest", "none"),
}
_STEPS = {"trained": _TRAINING, "merges": _MERGE}
"""What is read of each training and merge, and the kinds of its values, or the words."""


def _are(row: object, kinds: _Kinds) -> bool:
    if not isinstance(row, dict):
        return False
    for key, kind in kinds.items():
        if not (row.get(key) in kind if isinstance(kind, tuple) else isinstance(row.get(key), kind)):
            return False
    shares, header = (row.get(key, 0.0) for key in ("kept", "lost")), row.get("adapter_header", {})
    texts = (row.get("adapter", ""), *header.values())
    return all(isinstance(share, int | float) for share in shares) and all(isinstance(text, str) for text in texts)


def adapter_family(header: Mapping[str, str]) -> str | None:
    """The family that an adapter file says it is of, by its name or that of its architecture; None where it does not say."""
    if told := header.get("dedistill.family"):
        return told
    named, specs = header.get("modelspec.architecture", "").partition("/")[0], map(get_spec, families())
    return next((s.name for s in specs if named in {s.architecture, *(p.architecture for p in s.published)}), None)


def check_adapter_family(header: Mapping[str, str], spec: ModelSpec, source: str) -> None:
    """Raises UserError for an adapter file ``source`` of another family than ``spec``."""
    if (told := adapter_family(header)) not in (None, spec.name):
        raise UserError(
            f"'{source}' is an adapter of {told}, and the model is one of {spec.name}: it fits its own family alone", 2
        )


# --- bases as others know them ---------------------------------------------------------------------------------------


def is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and not Path(text).exists()


def looks_local(path: str) -> bool:
    """Whether ``path`` is meant as a place on this machine, be it there or not: it is no hub id, or begins like a folder."""
    first = path.partition("/")[0]
    return path.endswith(".safetensors") or first in _FOLDERS or not _HUB_ID.fullmatch(path) or Path(first).exists()


_FOLDERS = (".", "..", "models", "data", "runs", "exports", "checkpoints")
"""What no one is called on the hub, and folders of models are."""


def get_it(spec: ModelSpec, path: str, known: str = "") -> str:
    """How to fetch the model that was to lie at ``path``; empty where no published one bears its name.

    known: hub id of the model that is meant, where the name does not tell.
    """
    plain = lambda text: re.sub(r"[\W_]", "", text).lower()  # noqa: E731 - FLUX.1-schnell is flux1-schnell in file names
    found = next((p for p in spec.published if plain(p.id.partition("/")[2]) in plain(path)), None)
    if not (hub_id := found.id if found else known):
        return ""
    file = path.endswith(".safetensors")
    folder = f"models/{hub_id.rpartition('/')[2]}" if file else path
    gated = any(p.id == hub_id and p.gated for p in spec.published)
    return (
        f"; get it with: hf download {hub_id} --local-dir {folder}"
        + (", and set model.path to that folder" if file else "")
        + (" (it is gated: accept its terms on huggingface.co and run hf auth login first)" if gated else "")
    )


def public_name(path: str, revision: str | None = None) -> str:
    """A base as others may know it: its hub id where that is known, else the last name of a local path.

    path, revision: model.path and model.revision of a recipe. Only with a revision is a path a hub id, unless some family
    has it among its published models.
    """
    if revision and is_hub_id(path):
        return path
    if cached := _IN_HUB_CACHE.search(path):
        return f"{cached[1]}/{cached[2]}"
    named = next((base for name in families() if (base := published(get_spec(name), path, {}))), None)
    return named.id if named else last_name(path)


def last_name(path: str) -> str:
    """Of a place on any system; empty for somebody's home folder."""
    above, name = ["", "", *re.split(r"[/\\]+", path.rstrip("/\\"))][-2:]
    return "" if above.lower() in ("home", "users") or name.startswith("~") else name


def published(spec: ModelSpec, source: str, config: Mapping[str, Any]) -> Published | None:
    """The published model behind ``source``, of a denoiser with that config. Raises UserError where these contradict."""
    return spec.base_of(spec.published, source, config)


def licence_for(
    base: Published | None, wanted: str | None, spec: ModelSpec | None = None, recipes: Iterable[Mapping[str, Any]] = ()
) -> Licence:
    """The licence a derivative of ``base`` is under, trained by ``recipes`` of the family ``spec``: a binding one of either.

    Raises UserError where ``wanted`` gives away what is not ours to give.
    """
    if spec and spec.image_prompts and any(recipe.get("model", {}).get("image_prompts") for recipe in recipes):
        base = base if base and base.licence.binding else spec.image_prompts
    if base is None:
        return Licence(wanted) if wanted else UNKNOWN
    own = base.licence
    if own.binding and wanted not in (None, own.id, own.name):
        raise UserError(
            f"a derivative of {base.id} is under its {own.name}, so it cannot be released as '{wanted}' ({own.link})", 2
        )
    return own if wanted is None or own.binding else Licence(wanted)
