"""What a run leaves for others: a trained network as a model folder, whole or not there, and the header of snapshots."""

import json
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError

from dedistill.assemble import Model
from dedistill.errors import UserError
from dedistill.files import whole_folder, write_synced
from dedistill.recipe import Recipe, to_toml

MARK = "run.json"
"""Beside the family's own files: which step of the run the folder holds."""


def export_model(model: Model, folder: Path, step: int, recipe: Recipe) -> None:
    """Write ``model`` as ``folder``, in place of an older one. Raises UserError naming it when the disk refuses."""
    try:
        with whole_folder(folder) as temporary:
            trained = [*model.parts.facts.get("trained", []), {"step": step, "recipe": to_toml(recipe)}]
            model.family.save(replace(model.parts, facts=model.parts.facts | {"trained": trained}), temporary)
            write_synced(temporary / MARK, (json.dumps({"step": step}) + "\n").encode())
    except (OSError, SafetensorError) as e:  # safetensors reports a full disk in its own way
        raise UserError(f"cannot write the model folder '{folder}': {e}. The checkpoint of step {step} is intact.") from e


def exported_step(folder: Path) -> int | None:
    """The step that ``folder`` was exported at; None when there is no whole export."""
    try:
        step = json.loads((folder / MARK).read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def snapshot_header(recipe: Recipe, step: int) -> dict[str, str]:
    """What a sampler must know to use the weights; safetensors headers hold strings only."""
    return {
        "format": "pt",
        "dedistill.step": str(step),
        "dedistill.run": recipe.run.name,
        "dedistill.family": recipe.model.family,
        "dedistill.masked_attention": recipe.model.mask,
        "dedistill.sigma_density": recipe.timesteps.density,
        "dedistill.recipe": to_toml(recipe),
    }
