"""The README.md of a release: a Hugging Face model card with the right licence."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from dedistill.errors import UserError
from dedistill.io.atomic import replace_file
from dedistill.models.registry import is_hub_id, licence_for, published
from dedistill.models.spec import ModelSpec, Published
from dedistill.recipe.embedded import read_recipe
from dedistill.release.headers import guidance_fact, public_facts, recipes_of, source_name, source_of

_OWN = "dedistill.release"
_TAGS = ["text-to-image", "de-distilled", "classifier-free-guidance"]


def write_card(
    folder: Path,
    title: str,
    format: str,
    config: dict[str, Any],
    spec: ModelSpec,
    facts: dict[str, Any],
    source: str,
    *,
    base: str | None = None,
    licence: str | None = None,
) -> None:
    """Write ``folder/README.md``. base, licence: what the user says of both.

    Raises UserError when network or provenance contradict the base, or the licence is not the user's to choose.
    """
    known = _base_of(config, spec, source_of(facts) or source, base)
    name = base or (known.id if known else None)
    public = public_facts(facts)
    merges = public.get("merges", [])
    terms = licence_for(known, licence, spec, recipes_of(facts))
    data = ModelCardData(
        license=terms.id,
        license_name=terms.name or None,
        license_link=terms.link or None,
        library_name="diffusers" if spec.card else "dedistill",
        pipeline_tag="text-to-image",
        base_model=name,
        base_model_relation=("quantized" if format == "int8" else "finetune") if name else None,
        tags=[*_TAGS, *sorted({_kind(m) for m in merges})],
    )
    guidance = guidance_fact(spec.distilled_guidance(config), public)
    fields: dict[str, Any] = {
        "title": title,
        "format": format,
        "base": name or source_name(facts),
        "family": spec.name,
        "guidance": guidance,
    }
    fields |= {"masked": public.get("mask") == "bool", "call": _call(guidance), "facts": public}
    trained = [{"step": t["step"], "training": _training(read_recipe(t["recipe"]))} for t in public.get("trained", [])]
    body = _template(_OWN, "templates/card.md.j2").render(
        **fields,
        use=_template(*(spec.card.split(":") if spec.card else (_OWN, "templates/use.md.j2"))).render(**fields).strip(),
        licence=terms,
        licensor="the base model" if known and known.licence == terms else spec.image_prompts and spec.image_prompts.id,
        trained=trained,
        # earlier versions wrote what was lost instead
        merges=[{"kept": 1 - m.get("lost", 0.0)} | m | {"training": _training(read_recipe(m["recipe"]))} for m in merges],
    )
    replace_file(folder / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")).encode())


def _base_of(config: dict[str, Any], spec: ModelSpec, origin: str, base: str | None) -> Published | None:
    """The published model that one with ``config``, made from ``origin``, goes back to. base: which one the user says it is."""
    if base and not is_hub_id(base):
        raise UserError(
            f"--base {base}: not a hub id; a card names the published model, such as black-forest-labs/FLUX.1-schnell", 2
        )
    recorded = published(spec, origin, config)
    claimed = published(spec, base, config) if base else None
    if claimed and recorded and claimed != recorded:
        # by its shape alone it may be any of that shape
        alike = (claimed.sizes, claimed.licence) == (recorded.sizes, recorded.licence)
        if published(spec, origin, {}) or not alike:
            raise UserError(f"--base {base}: this model goes back to {recorded.id}", exit_code=2)
    return claimed or recorded


def _template(package: str, name: str) -> Template:
    """A text of this room, or one that a family brings."""
    own = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    return own.from_string((files(package) / name).read_text())


def _call(guidance: str) -> str:
    """Arguments of the pipeline's call, in the card's example."""
    distilled = f", guidance_scale={guidance}" if guidance.replace(".", "", 1).isdigit() else ""
    return f'negative_prompt="blurry", true_cfg_scale=3.5{distilled}, num_inference_steps=28'


def _kind(merge: dict[str, Any]) -> str:
    return read_recipe(merge["recipe"]).get("adapter", {}).get("kind", "adapter")


def _training(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings a reader of the card asks for, in words of the recipe."""
    names = {
        "train": ("objective", "steps", "batch", "lr", "schedule", "optimizer"),
        "timesteps": ("density", "alpha", "beta", "shift"),
        "sample": ("shift",),
        "data": ("source", "caption_dropout"),
        "adapter": ("kind", "init"),
        "model": ("mask", "text_length"),
    }
    return {f"{t}.{k}": recipe[t][k] for t, keys in names.items() for k in keys if k in recipe.get(t, {})}
