"""An adapter added into its dense base, tensor by tensor, as a model folder that ``model.path`` takes again."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dedistill.adapters.delta import weight_change
from dedistill.adapters.files import read_tensors
from dedistill.adapters.formats import Layers, by_layer, check_shapes
from dedistill.errors import UserError
from dedistill.flow import keyed
from dedistill.io.atomic import replace_json
from dedistill.io.hashing import file_sha256
from dedistill.io.safetensors import Digest
from dedistill.models.family import Denoiser
from dedistill.models.model import check_origin
from dedistill.models.registry import get_family
from dedistill.recipe import Recipe, to_toml
from dedistill.release.folder import FACTS, SHARD_BYTES, linear_shapes, names_of, new_folder, read_facts, write_weights

# --- from float32 to the dtype of a file, and how much of a small change survives it ---------------------------------


CHUNK = 1 << 22
"""Numbers rounded at a time."""


def round_stochastic(values: Tensor, seed: int, name: str) -> Tensor:
    """float32 -> bfloat16, up with the probability of what is cut off: right on average, a function of (seed, name).

    bfloat16 is the upper half of float32, so a uniform 16-bit number is added to the bits before the lower half is cut.
    What bfloat16 can hold stays as it is, and so do infinities and NaN. Values [...], contiguous or not, on the CPU.
    """
    flat, out = values.contiguous().reshape(-1), torch.empty(values.numel(), dtype=torch.bfloat16)
    rng = keyed.generator(seed, f"round/{name}")
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        noise = torch.from_numpy(rng.integers(0, 1 << 16, len(part), dtype="uint16")).int()
        cut = ((part.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
        out[start : start + CHUNK] = torch.where(part.isfinite(), cut, part).bfloat16()
    return out.reshape(values.shape)


@dataclass
class RoundingStats:
    """Sums over weights from which the losses of a merge are read; they add up over layers."""

    wanted: float = 0.0
    """|delta|^2"""
    along: float = 0.0
    """<kept, delta>"""
    off: float = 0.0
    """|kept - delta|^2"""
    zeros: int = 0
    """Weights that did not move although their delta is not 0."""
    changed: int = 0
    """Weights whose delta is not 0."""

    @classmethod
    def measure(cls, before: Tensor, after: Tensor, delta: Tensor) -> "RoundingStats":
        """before, after: the weight without and with the delta, both as the file stores them; delta float32."""
        kept = after.float() - before.float()
        nonzero = delta != 0
        return cls(
            wanted=float((delta.double() ** 2).sum()),
            along=float((kept.double() * delta.double()).sum()),
            off=float(((kept - delta).double() ** 2).sum()),
            zeros=int((nonzero & (kept == 0)).sum()),
            changed=int(nonzero.sum()),
        )

    def __add__(self, other: "RoundingStats") -> "RoundingStats":
        return RoundingStats(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def facts(self) -> dict[str, float]:
        """lost: share of the delta, along itself, that is gone: 1 - <kept, delta> / <delta, delta>; negative when too
        much arrived. error: |kept - delta| / |delta|, which also counts the noise of rounding. zeros: share of the
        weights with a delta that did not move at all."""
        return {
            "lost": 1 - self.along / self.wanted if self.wanted else 0.0,
            "error": (self.off / self.wanted) ** 0.5 if self.wanted else 0.0,
            "zeros": self.zeros / self.changed if self.changed else 0.0,
        }


# --- an adapter added into its dense base, tensor by tensor, as a model folder that ``model.path`` takes again -------


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
REPORT = "merge.json"


@dataclass
class Merged:
    """What became of the delta, in all and per linear, and the hash of the base it went into."""

    layers: dict[str, RoundingStats] = field(default_factory=dict)
    base_sha256: str = ""

    @property
    def total(self) -> RoundingStats:
        return sum(self.layers.values(), RoundingStats())


def merge_adapter(
    recipe: Recipe,
    weights: Path,
    out: Path,
    *,
    dtype: str = "bf16",
    rounding: str = "stochastic",
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str, RoundingStats], None] = lambda linear, stats: None,
) -> Merged:
    """Write base + adapter to ``out``: the recipe's ``model.path``, unquantized, plus the delta of ``weights`` (a snapshot).

    The sum is float32. dtype "bf16" rounds it once, "stochastic" (keyed by the recipe's seed: same input, same bytes) or
    "nearest", which loses most of a delta below the rounding step; "fp32" keeps it. Tensors without a delta are the
    base's own in the new dtype. Beside the denoiser the folder gets what the family writes, ``dedistill.json`` with the
    provenance (a chain where the base was merged before), and ``merge.json`` with the losses per layer.

    ``say`` is told each layer as it is merged. Raises UserError when the file does not fit the network whole, or ``out``
    exists; then nothing is written.
    """
    if recipe.model.path is None:
        raise UserError(f"{recipe.where('model')}: a merge needs trained weights to go into: set model.path", 2)
    family = get_family(recipe.model.family, recipe.where("model.family"))
    components = family.load(recipe.model, seed=recipe.run.seed)
    tensors, header = read_tensors(weights)
    check_origin(header, recipe, weights)
    shapes = linear_shapes(components.denoiser)
    spec, source = family.spec, str(weights)
    layers = by_layer(tensors, shapes, source, dense=True, folder=spec.folder, header=header, naming=names_of(spec))
    check_shapes(layers, shapes, str(weights))
    state = components.denoiser.state_dict()
    layout = {name: (tuple(t.shape), DTYPES[dtype]) for name, t in state.items()}
    merged, digest = Merged(), hashlib.sha256()
    with new_folder(out) as folder:
        family.save_rest(components, folder)  # first, since it may refuse: the weights take long
        stream = _merged_tensors(state, layers, DTYPES[dtype], rounding, recipe.run.seed, merged, digest, say)
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
    say: Callable[[str, RoundingStats], None],
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
        delta = weight_change(layers[linear])
        total = base.float() + delta
        if not total.isfinite().all():
            raise UserError(f"the merged weight of '{linear}' is not finite: the adapter or its base is damaged")
        new = round_stochastic(total, seed, name) if (dtype, rounding) == (torch.bfloat16, "stochastic") else total.to(dtype)
        merged.layers[linear] = RoundingStats.measure(base.to(dtype), new, delta)
        say(linear, merged.layers[linear])
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
