"""The README.md of a release: a Hugging Face model card with the right licence."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dedistill.errors import UserError
from dedistill.io.atomic import replace_file
from dedistill.models.pipeline_files import base_of, is_hub_id, licence_for
from dedistill.release.headers import read_recipe, source_name, source_of, told_guidance

_TEMPLATES = Path(__file__).parent / "templates"
_TAGS = ["text-to-image", "de-distilled", "classifier-free-guidance"]


def write_card(
    folder: Path,
    title: str,
    form: str,
    config: dict[str, Any],
    facts: dict[str, Any],
    source: str,
    *,
    base: str | None = None,
    licence: str | None = None,
) -> None:
    """Write ``folder/README.md``. base, licence: what the user says of both.

    Raises UserError when network or provenance contradict the base, or the licence is not the user's to choose.
    """
    if base and not is_hub_id(base):
        raise UserError(
            f"--base {base}: no hub id; a card names the published model, such as black-forest-labs/FLUX.1-schnell", 2
        )
    recorded = base_of(source_of(facts) or source, config)
    claimed = base_of(base, config) if base else None
    if claimed and recorded and claimed != recorded:
        raise UserError(f"--base {base}: this model goes back to {recorded.id}", exit_code=2)
    known, name = recorded or claimed, base or (recorded.id if recorded else None)
    terms = licence_for(known, licence)
    merges = facts.get("merges", [])
    data = ModelCardData(
        license=terms.id,
        license_name=terms.name or None,
        license_link=terms.link or None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=name,
        base_model_relation=("quantized" if form == "int8" else "finetune") if name else None,
        tags=[*_TAGS, *sorted({_kind(m) for m in merges})],
    )
    template = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    ).get_template("card.md.j2")
    recipes = [read_recipe(m["recipe"]) for m in merges]
    trained = [{"step": t["step"], "training": _training(read_recipe(t["recipe"]))} for t in facts.get("trained", [])]
    body = template.render(
        title=title,
        form=form,
        base=name or source_name(facts),
        licence=terms,
        masked=facts.get("mask") == "bool",
        guidance=told_guidance(config, facts),
        trained=trained,
        call=_call(told_guidance(config, facts)),
        merges=[{**m, "training": _training(r)} for m, r in zip(merges, recipes)],
    )
    replace_file(folder / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")).encode())


def _call(guidance: str) -> str:
    """Arguments of the pipeline's call, in the card's example."""
    told = f", guidance_scale={guidance}" if guidance.replace(".", "", 1).isdigit() else ""
    return f'negative_prompt="blurry", true_cfg_scale=3.5{told}, num_inference_steps=28'


def _kind(merge: dict[str, Any]) -> str:
    return read_recipe(merge["recipe"]).get("adapter", {}).get("kind", "adapter")


def _training(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings a reader of the card asks for, in words of the recipe."""
    names = {
        "train": ("objective", "steps", "batch", "lr", "schedule", "optimizer"),
        "timesteps": ("density", "alpha", "beta", "shift"),
        "data": ("source", "caption_dropout"),
        "adapter": ("kind", "init"),
        "model": ("mask", "text_length"),
    }
    return {f"{t}.{k}": recipe[t][k] for t, keys in names.items() for k in keys if k in recipe.get(t, {})}
