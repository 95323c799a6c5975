"""What a sweep can compare: the base of a run, its last weights, its post-hoc averages."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from dedistill.assemble import Model, build_model
from dedistill.data.source import Source
from dedistill.errors import UserError
from dedistill.files import file_sha256
from dedistill.finished import last_weights, open_finished, sampling_device
from dedistill.recipe import Recipe
from dedistill.sampling.sweep import Candidate


def candidates_of(
    recipe: Recipe, wanted: list[str] | None, *, steps: int | None = None, prefix: bool = False
) -> list[Candidate]:
    """Candidates of one run, in the order base, averages, last.

    wanted: any of ``base``, ``last``, ``posthoc`` (all averages) and names of files in RUN/posthoc without their
    ending; None for all there are. prefix: put the run's name before each. A run without adapter has only ``last``.
    """
    out = Path(recipe.run.out)
    steps = steps or recipe.sample.steps
    label = f"{recipe.run.name} " if prefix else ""
    if recipe.adapter is None:
        return [Candidate(recipe.run.name, _identity(recipe, out / "model"), steps, lambda: open_finished(recipe))]
    averages = {p.stem: p for p in sorted((out / "posthoc").glob("*.safetensors"))}
    known = ["base", *averages, "last"]
    asked = [n for w in wanted or ["base", "posthoc", "last"] for n in (averages if w == "posthoc" else [w])]
    if unknown := [n for n in asked if n not in known]:
        raise UserError(f"no candidate '{unknown[0]}' in '{out}'; there are {', '.join(known)}", exit_code=2)
    found = []
    for name in (n for n in known if n in asked):
        path = None if name == "base" else averages.get(name) or last_weights(out)
        parts = [p for p in (recipe.model.path, path) if p is not None]
        found.append(Candidate(f"{label}{name}", _identity(recipe, *parts), steps, _opener(recipe, path)))
    return found


def _opener(recipe: Recipe, path: Path | None) -> Callable[[], Model]:
    if path is not None:
        return lambda: open_finished(recipe, path)

    def base() -> Model:
        model = build_model(recipe, sampling_device())
        model.adapter.detach_from_base()
        return model

    return base


def _identity(recipe: Recipe, *places: Path | str) -> str:
    """Hash of everything a picture depends on beside prompt and noise: weights in files or folders, and how they are used."""
    digest = hashlib.sha256(json.dumps([recipe.resolved()[k] for k in ("model", "base", "adapter", "sample")]).encode())
    digest.update(str(recipe.run.seed).encode())
    for place in map(Path, places):
        files = sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]
        if not files or not files[0].exists():
            raise UserError(f"no weights in '{place}': train this recipe first")
        for file in files:
            digest.update(file_sha256(file).encode())
    return digest.hexdigest()


def read_prompts(value: str, source: Source) -> tuple[str, ...]:
    """``value`` is a number of prompts to take from the data, or a text file with one prompt per line."""
    if value.isdigit() and int(value) > 0:
        return tuple(source.prompts(0, int(value)))
    try:
        lines = [line.strip() for line in Path(value).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts: '{value}' is neither a number nor a readable text file: {e}", exit_code=2) from e
    if not (prompts := tuple(line for line in lines if line)):
        raise UserError(f"--prompts: '{value}' holds no prompts", exit_code=2)
    return prompts
