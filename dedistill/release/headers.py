"""Headers of released files, and what a release tells of how it was made.

``modelspec.*`` is SAI ModelSpec 1.0.1, ``ss_*`` are kohya's, ``lycoris_config`` is what LyCORIS and SimpleTuner build the
same network from, ``dedistill.*`` is what a sampler must know to use the weights.
"""

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dedistill.adapters.delta import rank, scale
from dedistill.adapters.formats import Layers, factor_shapes, is_lora
from dedistill.adapters.targets import Shape, factor_sides
from dedistill.errors import UserError
from dedistill.models.image_prompts import parted
from dedistill.models.pipeline_files import public_config
from dedistill.models.registry import last_name, licence_for, public_name, published
from dedistill.models.spec import ModelSpec
from dedistill.recipe.embedded import read_recipe
from dedistill.recipe.fields import Table
from dedistill.recipe.schema import Recipe
from dedistill.recipe.toml import fields_of, table_in, table_to_toml
from dedistill.release.folder import names_of

# --- what a release tells of how it was made -------------------------------------------------------------------------


_FACTS = (
    *("family", "base", "merges", "trained", "quantized"),
    *("guidance", "mask", "t5_mask", "null", "text_length", "text", "absent", "sample_shape", "picture", "shift"),
    *("prediction", "sigma_range", "above_range"),
)
"""Keys of dedistill.json that whoever uses the weights needs."""
_BASE = ("sha256", "path", "revision")
_STEP = (
    *("step", "into_sha256", "adapter", "adapter_sha256", "adapter_header", "recipe"),
    *("dtype", "rounding", "kept", "lost", "error", "zeros"),
)
_HEADER = (
    *("step", "run", "family", "masked_attention", "sigma_density", "recipe", "previous", "sha256", "ema", "ema_inputs"),
    *("prediction", "sigma_range", "above_range", "guidance", "shift"),
)
"""What else is told of the base, of a training or merge, and in an adapter's header after "dedistill."."""


def public_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What ``dedistill.json`` says of a model folder, as a release may say it: keys that we write, and no local paths."""
    public = _those(facts, _FACTS)
    if "base" in public:
        public["base"] = _those(public["base"], _BASE) | {"path": source_name(facts)}
    for key in ("merges", "trained"):
        if key in public:
            public[key] = [_public_step(step) for step in public[key]]
    return public_config(public)


def _public_step(step: dict[str, Any]) -> dict[str, Any]:
    public = _those(step, _STEP) | {"recipe": public_recipe(step["recipe"])}
    if "adapter" in step:
        public["adapter"] = last_name(step["adapter"])
    if "adapter_header" in step:  # of other trainers too, whose headers tell of folders
        public["adapter_header"] = own_entries(step["adapter_header"])
    return public


def _those(table: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key in keys}


def own_entries(header: dict[str, str]) -> dict[str, str]:
    """The entries of an adapter's header that are ours, with a public recipe."""
    public = public_config(_those(header, tuple(f"dedistill.{key}" for key in _HEADER)))
    if "dedistill.recipe" in public:
        public["dedistill.recipe"] = public_recipe(public["dedistill.recipe"])
    return public


def source_name(facts: dict[str, Any]) -> str:
    """What a model folder goes back to, as a release names it; empty when it does not say."""
    base = facts.get("base", {})
    return public_name(str(base.get("path") or ""), base.get("revision"))


def public_recipe(text: str) -> str:
    """A recipe's TOML without run.out, places and names of data and images in prompts, its model named and not located.

    That is still what the card, a merge and the formats read. To train by it, say where things are. Comments, keys that this
    version does not know and texts that are places are left out; unchanged where there is nothing to hide.
    """
    recipe = read_recipe(text)
    public = public_config(_known(recipe, Recipe))
    for table, keys in (("run", ("out",)), ("train", ("lpips",)), ("data", ("path", "pairs", "cache"))):
        for key in keys:
            public.get(table, {}).pop(key, None)
    for row in public.get("data", {}).get("sets", []):
        for key in ("path", "name"):
            row.pop(key, None)
    model = recipe.get("model", {})
    for key in ("path", "components", "image_prompts"):
        if key in model:
            public["model"][key] = public_name(model[key], None if key == "image_prompts" else model.get("revision"))
    if "prompts" in public.get("preview", {}):
        public["preview"]["prompts"] = [parted(prompt)[0] for prompt in public["preview"]["prompts"]]
    if "negative" in public.get("sample", {}):
        public["sample"]["negative"] = parted(public["sample"]["negative"])[0]
    return text if public == recipe and "#" not in text else table_to_toml(public)


def _known(table: dict[str, Any], model: type[Table]) -> dict[str, Any]:
    """What ``table`` holds of the keys of ``model``."""
    known = {}
    for key, field in ((key, fields_of(model)[key]) for key in table if key in fields_of(model)):
        inner, value = table_in(field.annotation), table[key]
        rows = [_known(row, inner) for row in (value if isinstance(value, list) else [value])] if inner else []
        known[key] = value if not inner else rows if isinstance(value, list) else rows[0]
    return known


# --- headers of released safetensors files ---------------------------------------------------------------------------


_SPEC = "1.0.1"


def model_header(title: str, config: dict[str, Any], facts: dict[str, Any], spec: ModelSpec) -> dict[str, str]:
    """Of a whole denoiser in one file."""
    public = public_facts(facts)
    return {
        "format": "pt",
        **_modelspec(
            title,
            config,
            spec,
            recipes_of(public),
            source=source_of(facts),
            name=source_name(facts),
            prediction=facts.get("prediction"),
        ),
        "dedistill.base": json.dumps(public.get("base", {})),
        "dedistill.prediction": str(public.get("prediction", spec.prediction)),
        "dedistill.masked_attention": str(public.get("mask", "none")),
        "dedistill.guidance": guidance_fact(spec.distilled_guidance(config), public),
        "dedistill.shift": str(public.get("shift", "auto")),
        "dedistill.recipe": last_recipe(public),
        "dedistill.facts": json.dumps(public),
    }


def adapter_header(
    title: str,
    format: str,
    header: dict[str, str],
    layers: Layers,
    shapes: Mapping[str, Shape],
    config: dict[str, Any],
    spec: ModelSpec,
) -> dict[str, str]:
    """Of an adapter file; ``header`` is that of the snapshot it was made from, whose ``dedistill.*`` are kept.

    The recipe among them is the public one.
    """
    recipe, told = read_recipe(header.get("dedistill.recipe", "")), own_entries(header)
    train, largest = recipe.get("train", {}), max(layers.values(), key=lambda factors: rank(factors) or 0)
    inner, names = rank(largest) or 0, names_of(spec)
    source = recipe.get("model", {}).get("path") or ""
    name = public_name(source, recipe.get("model", {}).get("revision"))
    own = {
        "format": "pt",
        **_modelspec(
            title, config, spec, [recipe], source=source, name=name, kind="/lora", prediction=told.get("dedistill.prediction")
        ),
        "ss_base_model_version": _architecture(source, config, spec),
        "ss_network_module": names.KOHYA_MODULE if names and format == "kohya" else "lycoris.kohya",
        "ss_network_dim": str(inner),
        "ss_network_alpha": f"{inner * (scale(largest) if format in ('lycoris', 'kohya') else 1):g}",
        "ss_network_args": json.dumps({"algo": "lora" if is_lora(layers) else "lokr"}),
        "ss_steps": told.get("dedistill.step", ""),
        "ss_learning_rate": str(train.get("lr", "")),
        "ss_seed": str(recipe.get("run", {}).get("seed", "")),
        "dedistill.guidance": guidance_of(spec.distilled_guidance(config), recipe),
        "dedistill.shift": str(recipe.get("sample", {}).get("shift", "")),
    }
    if format == "lycoris":
        own["lycoris_config"] = json.dumps(lycoris_config(layers, shapes))
    if format == "peft":
        own["lora_adapter_metadata"] = json.dumps({f"{spec.folder}.{k}": v for k, v in peft_config(layers).items()})
    return told | {k: v for k, v in own.items() if v}


def origin_note(header: Mapping[str, str], source: str, config: dict[str, Any], spec: ModelSpec) -> str:
    """What to say of an adapter of another program: whether its header names the base; nothing where it names this one.

    source: path or hub id of the base, config its denoiser's.
    """
    if "dedistill.recipe" in header:
        return ""
    named = header.get("modelspec.architecture", "").partition("/")[0]
    known = {p.architecture for p in spec.published}
    try:
        own = _architecture(source, config, spec)
    except UserError:
        own = spec.architecture
    if named not in known:
        return "the file does not say which base it was trained on: if that is another one, its shapes fit all the same"
    if own in known and own != named:
        return (
            f"by its header the adapter was trained on {named}, and the base is {own}: its shapes fit, what it learned may not"
        )
    return ""


def lycoris_config(layers: Layers, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The arguments with which LyCORIS' ``create_lycoris`` makes these layers and no others. shapes: of the weights."""
    algo = "locon" if is_lora(layers) else "lokr"
    per_layer = {}
    for name, factors in layers.items():
        inner = rank(factors)
        per_layer[name] = {"algo": algo, "dim": inner or 1, "alpha": scale(factors) * (inner or 1)}
        if algo == "lokr":
            per_layer[name] |= {"factor": _factor(factors, shapes[name][2:]), "full_matrix": inner is None}
    preset = {
        "enable_conv": any(shapes[name][2:] for name in layers),
        "target_module": [],
        "target_name": list(layers),
        "name_algo_map": per_layer,
    }
    return {"algo": algo, "multiplier": 1.0, "linear_dim": 1, "linear_alpha": 1, "bypass_mode": True, "apply_preset": preset}


def _factor(factors: Mapping[str, Tensor], window: Shape) -> int:
    """The ``factor`` from which LyCORIS makes such factors. window: of a convolution. Raises UserError where none does."""
    w1, (rows, columns) = factor_shapes(factors)
    w2 = (rows, columns // math.prod(window))
    for factor in (-1, *sorted({*w1, *w2})):  # LyCORIS puts the smaller of the two it finds first
        if all(factor_sides(a * b, factor) == (a, b) for a, b in zip(w1, w2)):
            return factor
    raise UserError(f"no LyCORIS factor gives Kronecker factors {w1} and {w2}: write this LoKr as 'transformer'")


def peft_config(layers: Layers) -> dict[str, Any]:
    """PEFT's LoraConfig of a LoRA whose scale is in the weights: alpha = rank everywhere."""
    ranks = {name: rank(factors) for name, factors in layers.items()}
    most = max(inner for inner in ranks.values() if inner is not None)  # a LoRA always has one
    # ^: whole names, else PEFT would also take what ends alike
    others = {f"^{name}": inner for name, inner in ranks.items() if inner != most}
    return {"r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others, "target_modules": sorted(ranks)}


def guidance_of(distilled: bool, recipe: dict[str, Any]) -> str:
    """What the distilled guidance embedding was fed in training: "none" without one, "bypassed", or the value."""
    if not distilled:
        return "none"
    if not recipe:
        return "unknown"
    value = recipe.get("model", {}).get("guidance", 1.0)
    return "bypassed" if value == "bypass" else str(value)


def guidance_fact(distilled: bool, facts: dict[str, Any]) -> str:
    """The same of a model folder, by what it says of itself; "unknown" where it does not."""
    return str(facts.get("guidance", "unknown")) if distilled else "none"


def last_recipe(facts: dict[str, Any]) -> str:
    """The recipe, as TOML, of the last training that made the weights; empty when they do not say."""
    return next((step["recipe"] for step in reversed(_trainings(facts))), "")


def recipes_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Of all trainings that made the weights."""
    return [read_recipe(step["recipe"]) for step in _trainings(facts)]


def _trainings(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [*facts.get("trained", []), *facts.get("merges", [])]


def source_of(facts: dict[str, Any]) -> str:
    """Hub id or path of what a model folder goes back to; empty when it does not say."""
    return str(facts.get("base", {}).get("path", ""))


def _modelspec(
    title: str,
    config: dict[str, Any],
    spec: ModelSpec,
    recipes: list[dict[str, Any]],
    *,
    source: str,
    name: str,
    kind: str = "",
    prediction: str | None = None,
) -> dict[str, str]:
    """recipes: of all trainings; source: hub id or path of what the weights go back to; name: how a release calls it;
    prediction: of these very weights, where that is known."""
    base, recipe = published(spec, source, config), recipes[-1] if recipes else {}
    side = max(recipe.get("data", {}).get("resolutions") or [spec.resolution])
    licence = licence_for(base, None, spec, recipes)
    found = {
        "sai_model_spec": _SPEC,
        "architecture": _architecture(source, config, spec) + kind,
        "implementation": "diffusers",
        "title": title,
        "resolution": f"{side}x{side}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "license": licence.name or licence.id,
        "prediction_type": "flow" if prediction == "velocity" else prediction or spec.prediction,
        "merged_from": base.id if base else name,
    }
    return {f"modelspec.{key}": value for key, value in found.items() if value}


def _architecture(source: str, config: dict[str, Any], spec: ModelSpec) -> str:
    base = published(spec, source, config)
    return base.architecture if base else spec.architecture
