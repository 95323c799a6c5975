"""The model that a run leaves: written when it ends, and read again for sampling."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dedistill.data.encode import cached_text
from dedistill.distributed.launcher import require_gpu
from dedistill.errors import UserError
from dedistill.io.atomic import step_of, whole_folder, write_synced
from dedistill.models.model import Model, build_model, expected_parameters
from dedistill.recipe import Recipe, to_toml
from dedistill.recipe.resolve import filled
from dedistill.runs.checkpoint import damage, list_checkpoints

# --- what a run leaves for others ------------------------------------------------------------------------------------


MARK = "run.json"
"""Beside the family's own files: which step of the run the folder holds."""


def export_model(model: Model, folder: Path, step: int, recipe: Recipe) -> None:
    """Write ``model`` as ``folder``, in place of an older one. Raises UserError naming it when the disk refuses."""
    try:
        with whole_folder(folder) as temporary:
            trained = [*model.components.facts.get("trained", []), {"step": step, "recipe": to_toml(recipe)}]
            model.family.save(replace(model.components, facts=model.components.facts | {"trained": trained}), temporary)
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


def snapshot_header(recipe: Recipe, step: int, predicts: dict[str, Any]) -> dict[str, str]:
    """What a sampler must know to use the weights; safetensors headers hold strings only. predicts: as
    ``prediction_facts`` says it."""
    return {
        "format": "pt",
        "dedistill.step": str(step),
        "dedistill.run": recipe.run.name,
        "dedistill.family": recipe.model.family,
        "dedistill.masked_attention": filled(recipe.model.mask, "model.mask"),
        "dedistill.sigma_density": recipe.timesteps.density,
        "dedistill.recipe": to_toml(recipe),
        **{f"dedistill.{key}": str(value) for key, value in predicts.items()},
    }


# --- the model that a finished run left behind, ready for sampling ---------------------------------------------------


def open_finished(recipe: Recipe, weights: Path | None = None) -> Model:
    """The network of ``recipe`` with the weights of its finished run, or with the snapshot ``weights``.

    A run that trained the whole network left a model folder; a run with an adapter left snapshots and checkpoints on
    top of its base. Raises UserError when there is nothing yet.
    """
    device = sampling_device()
    out = Path(recipe.run.out)
    if weights is None and recipe.adapter is None:
        folder = out / "model"
        if not folder.exists():
            raise UserError(f"'{folder}' does not exist: train this recipe first (dedistill train)")
        trained = recipe.model.model_copy(update={"path": str(folder), "new": None})
        return _build(recipe.model_copy(update={"model": trained}), device)
    model = _build(recipe, device)
    model.load_file(weights or last_weights(out), recipe)
    return model


def open_base(recipe: Recipe) -> Model:
    """The network of ``recipe`` as training finds it, without the adapter."""
    model = _build(recipe, sampling_device())
    if model.adapter:
        model.adapter.detach_from_base()
    return model


def _build(recipe: Recipe, device: str) -> Model:
    """With the prompts that training had encoded, so that guidance starts from the very empty prompt it was trained on."""
    require_gpu(lambda: expected_parameters(recipe))
    model = build_model(recipe, device)
    model.text_cache |= cached_text(recipe, model.family, model.components)
    return model


def sampling_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def last_weights(out: Path) -> Path:
    """The newest snapshot of a run directory, else the weights in its newest undamaged checkpoint."""
    snapshots = {p: step for p in (out / "snapshots").glob("*.safetensors") if (step := step_of(p)) is not None}
    if snapshots:
        return max(snapshots, key=snapshots.__getitem__)
    checkpoints = list_checkpoints(out / "checkpoints")
    problems = []
    for checkpoint in reversed(checkpoints):
        if not (problem := damage(checkpoint)):
            return checkpoint / "trainable.safetensors"
        problems.append(f"'{checkpoint}' is damaged: {problem}")
    details = "\n" + "\n".join(problems) if problems else ""
    raise UserError(f"'{out}' holds no snapshot and no good checkpoint: train this recipe first{details}")
