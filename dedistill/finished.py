"""The model that a finished run left behind, ready for sampling."""

from pathlib import Path

import torch

from dedistill.assemble import Model, build_model
from dedistill.engine.checkpoint import damage, list_checkpoints
from dedistill.errors import UserError
from dedistill.files import step_of
from dedistill.prepare import known_text
from dedistill.recipe import Recipe


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
            raise UserError(f"'{folder}' does not exist: train this recipe first (python -m dedistill.train ...)")
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
    model = build_model(recipe, device)
    model.known |= known_text(recipe, model.family, model.parts)
    return model


def sampling_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def last_weights(out: Path) -> Path:
    """The newest snapshot of a run directory, else the weights in its newest undamaged checkpoint."""
    snapshots = [p for p in (out / "snapshots").glob("*.safetensors") if step_of(p) is not None]
    if snapshots:
        return max(snapshots, key=step_of)
    checkpoints = list_checkpoints(out / "checkpoints")
    problems = []
    for checkpoint in reversed(checkpoints):
        if not (problem := damage(checkpoint)):
            return checkpoint / "trainable.safetensors"
        problems.append(f"'{checkpoint}' is damaged: {problem}")
    told = "\n" + "\n".join(problems) if problems else ""
    raise UserError(f"'{out}' holds no snapshot and no good checkpoint: train this recipe first{told}")
