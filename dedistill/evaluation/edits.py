"""An image, what a model gives back of it, and edits of it by prompts, over how much it is held to the image."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dedistill.adapters.files import read_tensors
from dedistill.errors import UserError, amount
from dedistill.evaluation.sweep import Candidate, save_png
from dedistill.flow.guidance import CONDITIONAL, UNCONDITIONAL, ClassifierFree
from dedistill.io.atomic import make_folder, replace_file, replace_json
from dedistill.io.hashing import file_sha256
from dedistill.io.images import is_whole_image
from dedistill.models.model import Model
from dedistill.sampling.inversion import Inversion, edit, encoded, read_image, said_of_image, state_of
from dedistill.sampling.sampler import Sampling

INDEX = "inversion.json"


@dataclass(frozen=True, kw_only=True)
class Edits:
    """What is made of one image: a row without a prompt, which is to give it back, and one for each prompt; columns of eta."""

    image: Path
    prompts: tuple[str, ...]
    etas: tuple[float, ...]
    inversion: Inversion
    sampling: Sampling


def make_edits(candidate: Candidate, wanted: Edits, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Make what is missing and write ``inversion.json``; returns it.

    Every file is named by the hash of all that it depends on, so the same command goes on where it ended, and another prompt
    costs no second inversion.
    """
    make_folder(out / "images")
    try:
        image = file_sha256(wanted.image)
    except OSError as e:
        raise UserError(f"'{wanted.image}': {e.strerror or e}", 2) from e
    way = asdict(wanted.inversion)
    stop = way.pop("stop")
    start = {"image": image, "weights": candidate.weights, "steps": wanted.sampling.steps, **way}
    files: dict[tuple[str | None, float], Path] = {}
    for prompt in (None, *wanted.prompts):
        for eta in wanted.etas:
            cell = {**start, "stop": stop, "prompt": prompt, "eta": eta} | (wanted.sampling.facts if prompt is not None else {})
            files[prompt, eta] = out / "images" / f"{_name(cell)}.png"
    source, decoded = (out / "images" / f"{_name(start | {'is': kind})}.png" for kind in ("source", "decoded"))
    missing = {place: file for place, file in files.items() if not is_whole_image(file)}
    if missing or not (is_whole_image(source) and is_whole_image(decoded)):
        _make(candidate, wanted, missing, out / f"{_name(start)}.safetensors", source, decoded, say)
    found = {
        "title": f"{wanted.image.name} by {candidate.name}",
        "settings": _settings(wanted),
        "source": source.relative_to(out).as_posix(),
        "decoded": decoded.relative_to(out).as_posix(),
        "limit": likeness(source, decoded),
        "cells": [
            {"prompt": prompt, "eta": eta, "file": file.relative_to(out).as_posix(), "psnr": likeness(source, file)}
            for (prompt, eta), file in files.items()
        ],
    }
    replace_json(out / INDEX, found)
    return found


def _make(
    candidate: Candidate,
    wanted: Edits,
    missing: dict[tuple[str | None, float], Path],
    kept: Path,
    source: Path,
    decoded: Path,
    say: Callable[[str], None],
) -> None:
    model, how, sampling = candidate.open(), wanted.inversion, wanted.sampling
    pixels = read_image(wanted.image, *_size(model))
    latents = encoded(model, pixels)
    save_png(pixels[0], source)
    save_png(model.decode(latents)[0], decoded)
    model.remember(["", how.source, model.negative, *wanted.prompts])
    state = _state(model, latents, sampling.steps, how, kept)
    say(f"inverted {wanted.image.name}: {amount(len(missing), 'image')} to make")
    unguided = replace(sampling, guidance=ClassifierFree())
    for (prompt, eta), file in missing.items():
        if prompt is None:
            texts, way = {CONDITIONAL: said_of_image(model, how)}, unguided
        else:
            texts, way = {CONDITIONAL: model.encode([prompt]), UNCONDITIONAL: model.encode([model.negative])}, sampling
        image = model.decode(edit(model, texts, state, latents, way, how, eta))[0]
        save_png(image, file, {"prompt": prompt or how.source, "eta": eta, **way.facts, **asdict(how)})
        say(f"eta {eta:g}, {'given back' if prompt is None else prompt}: {likeness(source, file):.1f} dB")


def _size(model: Model) -> tuple[int, int]:
    """Height and width in pixels of what the model makes."""
    height, width = model.decode(torch.zeros(1, *model.components.sample_shape, device=model.device)).shape[2:]
    return height, width


def _state(model: Model, latents: Tensor, steps: int, how: Inversion, kept: Path) -> Tensor:
    """Where all paths begin: kept in a file, since it costs as much as an image does."""
    if kept.exists():
        try:
            return read_tensors(kept)[0]["state"].to(latents.device)
        except (UserError, KeyError):
            pass  # damaged: made again
    state = state_of(model, latents, steps, how)
    if not state.isfinite().all():
        raise UserError("the inversion came to numbers that are not finite (NaN or Inf); try more --steps, or --fast")
    replace_file(kept, save({"state": state.cpu().contiguous()}))
    return state


def likeness(one: Path, other: Path) -> float:
    """Peak signal-to-noise ratio of two images in dB; 99 at most, which equal ones have."""
    import numpy as np
    from PIL import Image

    with Image.open(one) as a, Image.open(other) as b:
        levels = [np.asarray(image.convert("RGB"), dtype=np.float64) for image in (a, b)]
    error = float(np.mean((levels[0] - levels[1]) ** 2))
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255**2 / error))


def _name(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]


def _settings(wanted: Edits) -> dict[str, str]:
    how, sampling = wanted.inversion, wanted.sampling
    begins = "the straight line to noise" if how.fast else f"inversion with gamma {how.gamma:g}"
    said = "zeros" if how.null == "zeros" else f"“{how.source}”" if how.source else "the empty prompt"
    return {
        "start": f"{begins}, asked with {said}",
        "held to the image": f"from {how.start:g} to {how.stop:g} of the steps",
        "edits": sampling.label,
        "seed": str(how.seed),
    }
