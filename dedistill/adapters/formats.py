"""Adapter files by layer: read by any naming, written in the four that other programs load.

``lycoris_<path with _>.…`` is what we, LyCORIS and SimpleTuner write and ComfyUI reads; ``<folder>.<path>.…`` is read by
ComfyUI and diffusers, the folder being that of the denoiser in a pipeline; ``<folder>.<path>.lora_A/B.weight`` is PEFT's LoRA;
``lora_unet_<original path with _>.…`` is kohya's LoRA, on the fused layers of the model's own repository.
"""

import math
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from dedistill.adapters.delta import rank, scale
from dedistill.adapters.naming import (
    DENSE,
    DOWN,
    FOLDERS,
    LOKR,
    LORA,
    PEFT,
    ROWS,
    UP,
    LayerNames,
    Place,
    file_name,
    is_of_encoder,
    other_kind,
    places,
    split_key,
    swap_halves,
)
from dedistill.adapters.strength import with_alphas
from dedistill.adapters.targets import Shape
from dedistill.errors import UserError

_WHOLE = (
    {UP, DOWN},
    {DENSE},
    *({*w1, *w2} for w1 in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}) for w2 in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})),
)

Layers = dict[str, dict[str, Tensor]]
"""Linear -> its factors under LyCORIS' names, alpha included where there is one."""

# --- in --------------------------------------------------------------------------------------------------------------


def by_layer(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    source: str,
    *,
    dense: bool = False,
    folder: str = FOLDERS[0],
    header: Mapping[str, str] | None = None,
    naming: LayerNames | None = None,
) -> Layers:
    """A file by any naming of ``naming.py``, taken apart by the layers it belongs to, whose weights' shapes are ``shapes``.

    A LoRA or LoKr of a fused layer becomes one of each linear in it, exactly: a LoRA's rows are cut, and columns that serve
    one linear only go to it alone; of a LoKr, the first factor is cut where the rows allow it, else the product (``ROWS``).

    dense: a layer may also be a whole change of weight, ``diff``, as averages of deltas are. folder: where a pipeline keeps
    this denoiser. header: the file's, which may say how strong it is. naming: what the family calls its layers elsewhere;
    without it, only the network's own names are known.
    Raises UserError naming file and tensor for a name that fits no linear, a kind of tensor this program cannot apply
    (DoRA, LoHa, Tucker), and a layer of which a factor is missing: an adapter is read whole or not at all.
    """
    layers: Layers = {}
    for place, factors in _by_place(tensors, places(shapes, folder, naming), source, dense).items():
        _check_whole(factors, place, source)
        for linear, own in _parts(factors, place).items():
            if linear in layers:
                raise UserError(f"'{source}': '{linear}' has two adapters, its own and that of a fused layer")
            layers[linear] = own
    return with_alphas(layers, header or {}, source, folder)


def _by_place(
    tensors: Mapping[str, Tensor], known: Mapping[str, Place], source: str, dense: bool
) -> dict[Place, dict[str, Tensor]]:
    found: dict[Place, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        layer, factor = split_key(key)
        if kind := other_kind(key):
            raise UserError(f"'{source}' is {kind} (tensor '{key}'), which is not supported; known: LoKr and LoRA")
        if (place := known.get(layer)) is None:
            strange.append(key)
        elif factor not in (*LOKR, *LORA, "alpha", *([DENSE] if dense else [])):
            raise UserError(f"'{source}': tensor '{key}' is of a kind that is not supported; known: LoKr and LoRA")
        elif factor in found.setdefault(place, {}):
            raise UserError(f"'{source}': '{place.name}' has two tensors {factor}, under two names")
        else:
            found[place][factor] = _computable(tensor)
    if strange:
        others = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        why = ": it is of a text encoder, which is not adapted here" if is_of_encoder(strange[0]) else ""
        raise UserError(f"'{source}': tensor '{strange[0]}' belongs to no layer of this network{others}{why}")
    if not found:
        raise UserError(f"'{source}' holds no tensors")
    return found


def _computable(tensor: Tensor) -> Tensor:
    """In a dtype that is computed with: bfloat16 holds all numbers of the small ones, float32 those of integers in files."""
    if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return tensor
    return tensor.to(torch.bfloat16 if tensor.is_floating_point() else torch.float32)


def _check_whole(factors: Mapping[str, Tensor], place: Place, source: str) -> None:
    if set(factors) - {"alpha"} not in _WHOLE:
        raise UserError(f"'{source}': '{place.name}' is incomplete, it has only {', '.join(sorted(factors))}")
    for factor, tensor in factors.items():
        if tensor.numel() != 1 if factor == "alpha" else tensor.ndim not in (2, 4) or not tensor.numel():
            shape = f"of shape {tuple(tensor.shape)}, which none can have"
            raise UserError(f"'{source}': '{place.name}' has {'an' if factor == 'alpha' else 'a'} {factor} {shape}")
    if place.rows and (rows := _shape(factors)[0]) != (wanted := max(stop for part in place.rows for _, stop in part)):
        raise UserError(f"'{source}': '{place.name}' gives a weight of {rows} rows, the network's has {wanted}")


def _parts(factors: dict[str, Tensor], place: Place) -> Layers:
    """The factors of each linear in a layer of a file."""
    if not place.rows:
        return {place.linears[0]: factors}
    found = {linear: _rows(factors, rows) for linear, rows in zip(place.linears, place.rows)}
    return _own_columns(found) if UP in factors and len(found) > 1 else found


def _rows(factors: dict[str, Tensor], rows: tuple[tuple[int, int], ...]) -> dict[str, Tensor]:
    """Factors of some rows of the product: the left one cut, which is exact; all of them and ``ROWS`` where none can be."""
    left = next(name for name in (UP, DENSE, "lokr_w1", "lokr_w1_a") if name in factors)
    height = factor_shapes(factors)[1][0] if left.startswith("lokr") else 1
    if any(end % height for part in rows for end in part):
        return factors | {ROWS: torch.tensor(rows)}
    return factors | {left: torch.cat([factors[left][start // height : stop // height] for start, stop in rows])}


def _own_columns(parts: Layers) -> Layers:
    """LoRAs of one fused layer without the columns that serve another linear only: the inverse of what ``as_kohya`` joins.

    As they are where a column serves several, as in a LoRA that was trained on the fused layer.
    """
    used = torch.stack([(factors[UP] != 0).any(0) for factors in parts.values()])
    if (used.sum(0) > 1).any() or not used.any():
        return parts
    owner = used.int().argmax(0)
    for column in range(1, len(owner)):  # one that serves none stands among those of its linear
        if not used[:, column].any():
            owner[column] = owner[column - 1]
    owner[: int(used.any(0).int().argmax())] = owner[int(used.any(0).int().argmax())]
    narrow: Layers = {}
    for i, (linear, factors) in enumerate(parts.items()):
        if (own := owner == i).any():
            narrow[linear] = {UP: factors[UP][:, own], DOWN: factors[DOWN][own]}
            if "alpha" in factors:
                narrow[linear]["alpha"] = factors["alpha"].float() * int(own.sum()) / len(own)
    return narrow


def check_shapes(layers: Layers, shapes: Mapping[str, Shape], source: str) -> None:
    """Raise UserError, naming file and layer, where the factors do not make up the weight of their layer."""
    for linear, f in layers.items():
        pairs = [(UP, DOWN), ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")]
        if torn := [(a, b) for a, b in pairs if a in f and f[a].shape[1] != f[b].shape[0]]:
            raise UserError(f"'{source}': {' and '.join(torn[0])} of '{linear}' have different ranks")
        found, wanted = _shape(f), tuple(shapes[linear])
        # windows of one pixel are none; of a product or a dense change they are not told apart from channels
        flat = len(found) == 2 and not is_lora({linear: f})
        if (found if flat else _without_window(found)) != (_flat(wanted) if flat else _without_window(wanted)):
            raise UserError(f"'{source}': '{linear}' gives a weight of shape {found}, the network's has {wanted}")


def _shape(f: Mapping[str, Tensor]) -> Shape:
    """Of the weight that the factors make up: [out, in], or [out, in, height, width] where they tell these apart."""
    if DENSE in f or UP in f:
        return f[DENSE if DENSE in f else UP].shape[0], *f[DENSE if DENSE in f else DOWN].shape[1:]
    (rows, columns), (height, width) = factor_shapes(f)
    rows = int((f[ROWS][:, 1] - f[ROWS][:, 0]).sum()) if ROWS in f else rows * height
    if "lokr_w2" in f:
        return rows, columns * f["lokr_w2"].shape[1], *f["lokr_w2"].shape[2:]
    return rows, columns * width


def _flat(shape: Shape) -> Shape:
    return shape[0], math.prod(shape[1:])


def _without_window(shape: Shape) -> Shape:
    return shape[:2] if set(shape[2:]) <= {1} else shape


def factor_shapes(factors: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the two Kronecker factors of a LoKr layer, multiplied out; of a convolution's second one, with its windows
    as columns."""
    first, second = (
        _flat(tuple(factors[w].shape)) if w in factors else (factors[f"{w}_a"].shape[0], factors[f"{w}_b"].shape[1])
        for w in ("lokr_w1", "lokr_w2")
    )
    return cast(tuple[int, int], first), cast(tuple[int, int], second)


def is_lora(layers: Layers) -> bool:
    """Whether every layer is a LoRA."""
    return all(UP in factors for factors in layers.values())


# --- out -------------------------------------------------------------------------------------------------------------


def as_lycoris(layers: Layers, folder: str = FOLDERS[0]) -> dict[str, Tensor]:
    """``lycoris_<path with _>``, as our own snapshots are; a layer without alpha gets one, at which its scale is 1."""
    _only_whole(layers)
    out: dict[str, Tensor] = {}
    for linear, factors in layers.items():
        alpha = {"alpha": torch.tensor(float(rank(factors) or 1))}
        out |= {f"{file_name(linear)}.{factor}": tensor for factor, tensor in (alpha | factors).items()}
    return out


def as_transformer(layers: Layers, folder: str = FOLDERS[0]) -> dict[str, Tensor]:
    """``<folder>.<path>`` with the scale multiplied into the factors: diffusers takes no alpha beside a LoKr."""
    _only_whole(layers)
    return {f"{folder}.{n}.{factor}": t for n, f in layers.items() for factor, t in baked(f).items()}


def as_peft(layers: Layers, folder: str = FOLDERS[0]) -> dict[str, Tensor]:
    """``<folder>.<path>.lora_A.weight`` and ``lora_B.weight``, scale multiplied in. Raises UserError for a LoKr."""
    _only_lora(layers, "peft")
    return {f"{folder}.{n}.{peft}": baked(f)[own] for n, f in layers.items() for peft, own in reversed(PEFT.items())}


def as_kohya(layers: Layers, naming: LayerNames, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """kohya's LoRA of the fused layers, exactly the same change of weight. Raises UserError for a LoKr.

    naming: what the family calls its layers elsewhere; shapes: (out, in) of every linear. q, k and v of one fused
    layer have different down matrices: these are stacked, and each up matrix fills its own rows and columns of the
    fused one, so ranks add up and nothing is approximated. Where they have one down matrix, it stays one.
    """
    _only_lora(layers, "kohya")
    out: dict[str, Tensor] = {}
    for original, parts in dict(map(naming.original_parts, layers)).items():
        own = {part: layers[part] for part in parts if part in layers}
        name = naming.kohya_name(original)
        if len(parts) == 1 and not naming.is_swapped(original, shapes):  # a convolution's factors have four dimensions
            factors = own[parts[0]]
            inner = torch.tensor(float(rank(factors) or 1))
            out |= {f"{name}.{factor}": tensor for factor, tensor in ({"alpha": inner} | factors).items()}
            continue
        scales = {scale(factors) for factors in own.values()}
        by = scales.pop() if len(scales) == 1 else 1.0  # one for all: it can stay beside the factors, which are not touched
        own = own if not scales else {part: baked(factors) for part, factors in own.items()}
        downs = [factors[DOWN] for factors in own.values()]
        shared = len(downs) > 1 and all(torch.equal(down, downs[0]) for down in downs)
        down = downs[0] if shared else torch.cat(downs)
        up = torch.zeros(sum(shapes[part][0] for part in parts), len(down), dtype=next(iter(own.values()))[UP].dtype)
        column = 0
        for part, factors in own.items():
            width = factors[UP].shape[1]
            up[naming.original_name(part, shapes)[1], column : column + width] = factors[UP]
            column += 0 if shared else width
        if naming.is_swapped(original, shapes):
            up = swap_halves(up)
        out |= {f"{name}.{UP}": up, f"{name}.{DOWN}": down, f"{name}.alpha": torch.tensor(by * len(down))}
    return out


def baked(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors without alpha, its scale multiplied into one of them (untouched where the scale is 1).

    That one becomes float32 where its dtype cannot hold the result.
    """
    by, own = scale(factors), {name: tensor for name, tensor in factors.items() if name != "alpha"}
    if by != 1:
        last = next(n for n in (UP, "lokr_w2_a", "lokr_w1_a") if n in own)
        wanted = own[last].float() * by
        rounded = wanted.to(own[last].dtype)
        own[last] = rounded if torch.equal(rounded.float(), wanted) else wanted
    return own


def _only_whole(layers: Layers) -> None:
    if cut := next((linear for linear, factors in layers.items() if ROWS in factors), None):
        raise UserError(
            f"'{cut}' is part of a LoKr of a fused layer whose factors cannot be cut apart: no adapter format holds it alone; "
            "dedistill merge puts it into the weights"
        )


def _only_lora(layers: Layers, format: str) -> None:
    if not is_lora(layers):
        raise UserError(f"the {format} format has LoRA only; write this LoKr as 'lycoris' or 'transformer'", exit_code=2)


ADAPTER_FORMATS: dict[str, Callable[[Layers, str], dict[str, Tensor]]] = {
    "lycoris": as_lycoris,
    "transformer": as_transformer,
    "peft": as_peft,
}
"""Those that need no tables of other names. Arguments: the layers, and the denoiser's folder in a pipeline."""
KOHYA = "kohya"
