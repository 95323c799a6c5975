"""An adapter added into its dense base, tensor by tensor, as a model folder that ``model.path`` takes again."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dedistill.adapters.delta import weight_change
from dedistill.adapters.files import read_tensors
from dedistill.adapters.formats import Layers, by_layer, check_shapes
from dedistill.adapters.targets import adaptable
from dedistill.errors import UserError
from dedistill.io.atomic import replace_json
from dedistill.io.hashing import file_sha256
from dedistill.io.safetensors import Digest
from dedistill.models.family import Denoiser
from dedistill.models.places import check_origin
from dedistill.models.registry import check_adapter_family, get_family
from dedistill.recipe import Recipe, to_toml
from dedistill.release.folder import FACTS, SHARD_BYTES, names_of, new_folder, read_facts, write_weights
from dedistill.release.headers import origin_note
from dedistill.release.rounding import RoundingStats, round_stochastic

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
REPORT = "merge.json"


@dataclass
class Merged:
    """What became of the delta, in all and per linear, and the hash of the base it went into."""

    layers: dict[str, RoundingStats] = field(default_factory=dict)
    base_sha256: str = ""
    note: str = ""
    """What a user should know of the adapter's origin, or nothing."""

    @property
    def total(self) -> RoundingStats:
        return sum(self.layers.values(), RoundingStats())

    @property
    def summary(self) -> str:
        """What was kept and where rounding did most, in one line."""
        worst = max(self.layers, key=lambda name: self.layers[name].facts()["error"])
        error = self.layers[worst].facts()["error"]
        return f"change kept {self.total.facts()['kept']:.1%}, worst layer {worst}: rounding error {error:.1%} of its change"


def merge_adapter(
    recipe: Recipe,
    weights: Path,
    out: Path,
    *,
    dtype: str = "bf16",
    rounding: str = "stochastic",
    shard_bytes: int = SHARD_BYTES,
) -> Merged:
    """Write base + adapter to ``out``: the recipe's ``model.path``, unquantized, plus the delta of ``weights`` (a snapshot).

    The sum is float32. dtype "bf16" rounds it once, "stochastic" (keyed by the recipe's seed: same input, same bytes) or
    "nearest", which loses most of a delta below the rounding step; "fp32" keeps it. Tensors without a delta are the
    base's own in the new dtype. Beside the denoiser the folder gets what the family writes, ``dedistill.json`` with the
    provenance (a chain where the base was merged before), and ``merge.json`` with what was kept of each layer.

    Raises UserError when the file does not fit the network whole, or ``out`` exists; then nothing is written.
    """
    if recipe.model.path is None:
        raise UserError(f"{recipe.where('model')}: a merge needs trained weights to go into: set model.path", 2)
    family = get_family(recipe.model.family, recipe.where("model.family"))
    tensors, header = read_tensors(weights)
    check_adapter_family(header, family.spec, str(weights))
    check_origin(header, recipe, weights)
    components = family.load(recipe.model, seed=recipe.run.seed)
    shapes = adaptable(components.denoiser)
    spec, source = family.spec, str(weights)
    layers = by_layer(tensors, shapes, source, dense=True, folder=spec.folder, header=header, naming=names_of(spec))
    check_shapes(layers, shapes, str(weights))
    state = components.denoiser.state_dict()
    layout = {name: (tuple(t.shape), DTYPES[dtype]) for name, t in state.items()}
    config = dict(cast(Denoiser, components.denoiser).config)
    merged, digest = Merged(note=origin_note(header, recipe.model.path, config, spec)), hashlib.sha256()
    with new_folder(out) as folder:
        components.sample_shift = recipe.sample.shift
        family.save_rest(components, folder)  # first, since it may refuse: the weights take long
        stream = _merged_tensors(state, layers, DTYPES[dtype], rounding, recipe.run.seed, merged, digest)
        place = folder / family.spec.folder
        place.mkdir()
        write_weights(place, layout, stream, shard_bytes)
        cast(Denoiser, components.denoiser).save_config(place)
        merged.base_sha256 = digest.hexdigest()
        facts = read_facts(folder) | provenance(recipe, components.facts, weights, header, merged, dtype, rounding)
        replace_json(folder / FACTS, facts)
        per_layer = {name: stats.facts() for name, stats in merged.layers.items()}
        replace_json(folder / REPORT, {"total": merged.total.facts(), "layers": per_layer})
    return merged


def is_merge_of(folder: Path, weights: Path) -> bool:
    """Whether ``folder`` holds a model that the bytes of ``weights`` were merged into by :func:`merge_adapter`'s defaults."""
    step = [{}, *read_facts(folder).get("merges", [])][-1] if (folder / FACTS).is_file() else {}
    wanted = {"adapter_sha256": file_sha256(weights), "dtype": "bf16", "rounding": "stochastic"}
    return all(step.get(key) == value for key, value in wanted.items())


def _merged_tensors(
    state: dict[str, Tensor],
    layers: Layers,
    dtype: torch.dtype,
    rounding: str,
    seed: int,
    merged: Merged,
    digest: Digest,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the new network one after the other, filling ``merged`` and the hash of the base on the way."""
    for name in list(state):
        base = state.pop(name).detach().cpu()
        digest.update(f"{name} {base.dtype} {tuple(base.shape)}\n".encode())
        digest.update(base.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        linear = name.removesuffix(".weight")
        if linear == name or linear not in layers:
            yield name, base.to(dtype)
            continue
        delta = weight_change(layers[linear]).view_as(base)
        total = base.float() + delta
        if not total.isfinite().all():
            raise UserError(f"the merged weight of '{linear}' is not finite: the adapter or its base is damaged")
        new = round_stochastic(total, seed, name) if (dtype, rounding) == (torch.bfloat16, "stochastic") else total.to(dtype)
        merged.layers[linear] = RoundingStats.measure(base.to(dtype), new, delta)
        yield name, new


def provenance(
    recipe: Recipe, before: dict[str, Any], weights: Path, header: dict[str, str], merged: Merged, dtype: str, rounding: str
) -> dict[str, Any]:
    """What a merged folder says of itself: ``base``, what it all goes back to, and ``merges``, oldest first.

    before: what the base says of itself.
    """
    base = before.get("base") or {"path": recipe.model.path, "revision": recipe.model.revision}
    if not before.get("merges"):
        base = {"sha256": merged.base_sha256} | base
    step = {
        "into_sha256": merged.base_sha256,
        "adapter": str(weights),
        "adapter_sha256": file_sha256(weights),
        "adapter_header": {k: v for k, v in header.items() if k != "dedistill.recipe"},
        "recipe": header.get("dedistill.recipe") or to_toml(recipe),
        "dtype": dtype,
        "rounding": rounding if dtype == "bf16" else "none",
        **merged.total.facts(),
    }
    return {"base": base, "merges": [*before.get("merges", []), step]}
