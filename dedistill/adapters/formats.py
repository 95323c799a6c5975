"""Spellings of adapter files: what other programs call the same tensors.

``lycoris_<path with _>.…`` is what we, LyCORIS and SimpleTuner write and ComfyUI reads; ``<folder>.<path>.…`` is read by
ComfyUI and diffusers, the folder being that of the denoiser in a pipeline; ``<folder>.<path>.lora_A/B.weight`` is PEFT's LoRA;
``lora_unet_<original path with _>.…`` is
kohya's LoRA, on the fused layers of the model's own repository. A path with underscores cannot be taken apart again, so
every reading here needs the names of the network's linears.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor

from dedistill.adapters.attach import file_name
from dedistill.adapters.delta import rank, scale
from dedistill.adapters.strength import with_alphas
from dedistill.errors import UserError

LOKR = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
LORA = ("lora_up.weight", "lora_down.weight")
DENSE = "diff"
PEFT = {"lora_B.weight": "lora_up.weight", "lora_A.weight": "lora_down.weight"}
_WHOLE = (
    {"lora_up.weight", "lora_down.weight"},
    *({*w1, *w2} for w1 in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}) for w2 in ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})),
)


class LayerNames(Protocol):
    """The tables, a module, of what a network's layers are called in the files of the model's own repository."""

    KOHYA_MODULE: str
    """What sd-scripts calls the code that reads its LoRA files of this network."""

    def original_parts(self, module: str) -> tuple[str, tuple[str, ...]]:
        """The original module that holds ``module``, and all modules that it holds, in the order of its rows."""

    def original_name(self, linear: str, shapes: Mapping[str, tuple[int, int]]) -> tuple[str, slice]:
        """The original module that holds the weight of ``linear``, and which of its rows."""

    def original_plan(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Original tensor -> the tensors it is joined from, for all tensors of a network."""

    def join(self, original: str, parts: list[Tensor]) -> Tensor:
        """One original tensor of its parts, as ``original_plan`` lists them."""

    def kohya_name(self, original: str) -> str:
        """An original module as kohya's sd-scripts and ComfyUI spell it in LoRA files."""

    def is_swapped(self, original: str) -> bool:
        """Whether the halves of this original module's rows stand the other way round."""

    def swap_halves(self, rows: Tensor) -> Tensor:
        """The other order of halves along the first dimension; its own inverse."""


FOLDERS = ("transformer", "unet")
"""Where pipelines keep denoisers; tensors' names begin with it in files for them."""

Layers = dict[str, dict[str, Tensor]]
"""Linear -> its factors under LyCORIS' names, alpha included where there is one."""


def by_layer(
    tensors: Mapping[str, Tensor],
    linears: Iterable[str],
    source: str,
    *,
    dense: bool = False,
    folder: str = FOLDERS[0],
    header: Mapping[str, str] | None = None,
) -> Layers:
    """A file in the ``lycoris_``, ``<folder>.`` or PEFT format, taken apart by the ``linears`` it belongs to.

    dense: a layer may also be a whole change of weight, ``diff``, as averages of deltas are. folder: where a pipeline keeps
    this denoiser; names that begin with another one are not its own. header: the file's, which may say how strong it is.
    Raises UserError naming file and tensor for a name that fits no linear, a kind of tensor this program cannot apply
    (DoRA, LoHa, Tucker), and a layer of which a factor is missing: an adapter is read whole or not at all.
    """
    known = {renamed: name for name in linears for renamed in (file_name(name), f"{folder}.{name}")}
    layers: Layers = {}
    for key, tensor in tensors.items():
        linear, factor = known.get(layer_of(key)), key.removeprefix(layer_of(key) + ".")
        factor = PEFT.get(factor, factor)
        if linear is None:
            raise UserError(f"'{source}': tensor '{key}' belongs to no linear of this network")
        if factor not in (*LOKR, *LORA, "alpha", *([DENSE] if dense else [])):
            raise UserError(f"'{source}': tensor '{key}' is of a kind that is not supported; known: LoKr and LoRA of linears")
        if layers.setdefault(linear, {}).setdefault(factor, tensor) is not tensor:
            raise UserError(f"'{source}': '{linear}' has two tensors {factor}, under two names")
    if not layers:
        raise UserError(f"'{source}' holds no tensors")
    for linear, factors in layers.items():
        if set(factors) - {"alpha"} not in (*_WHOLE, {DENSE}):
            raise UserError(f"'{source}': '{linear}' is incomplete, it has only {', '.join(sorted(factors))}")
        for factor, tensor in factors.items():
            if tensor.numel() != 1 if factor == "alpha" else tensor.ndim != 2:
                raise UserError(f"'{source}': '{linear}' has a {factor} of shape {tuple(tensor.shape)}, which none can have")
    return with_alphas(layers, header or {}, source, folder)


def layer_of(key: str) -> str:
    """What stands before the factor's name in a tensor's name (LoRA's factors have a dot themselves)."""
    return key.removesuffix(".weight").rpartition(".")[0]


def check_shapes(layers: Layers, shapes: Mapping[str, tuple[int, int]], source: str) -> None:
    """Raise UserError, naming file and layer, where the factors do not make up the weight [out, in] of their linear."""
    for linear, f in layers.items():
        if DENSE in f:
            fits, found = True, tuple(f[DENSE].shape)
        elif "lora_up.weight" in f:
            up, down = f["lora_up.weight"].shape, f["lora_down.weight"].shape
            fits, found = len(up) == len(down) == 2 and up[1] == down[0], (up[0], down[-1])
        else:
            (rows, columns), (height, width) = factor_shapes(f)
            fits = all(f[f"{w}_a"].shape[1] == f[f"{w}_b"].shape[0] for w in ("lokr_w1", "lokr_w2") if w not in f)
            found = (rows * height, columns * width)
        if not fits or found != tuple(shapes[linear]):
            raise UserError(
                f"'{source}': '{linear}' gives a weight of shape {found}, the network's has {tuple(shapes[linear])}"
            )


def factor_shapes(factors: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the two Kronecker factors of a LoKr layer, multiplied out."""
    first, second = (
        tuple(factors[w].shape) if w in factors else (factors[f"{w}_a"].shape[0], factors[f"{w}_b"].shape[1])
        for w in ("lokr_w1", "lokr_w2")
    )
    return cast(tuple[int, int], first), cast(tuple[int, int], second)


def is_lora(layers: Layers) -> bool:
    """Whether every layer is a LoRA."""
    return all("lora_up.weight" in factors for factors in layers.values())


def as_lycoris(layers: Layers, folder: str = FOLDERS[0]) -> dict[str, Tensor]:
    """``lycoris_<path with _>``, as our own snapshots are; a layer without alpha gets one, at which its scale is 1."""
    out: dict[str, Tensor] = {}
    for linear, factors in layers.items():
        alpha = {"alpha": torch.tensor(float(rank(factors) or 1))}
        out |= {f"{file_name(linear)}.{factor}": tensor for factor, tensor in (alpha | factors).items()}
    return out


def as_transformer(layers: Layers, folder: str = FOLDERS[0]) -> dict[str, Tensor]:
    """``<folder>.<path>`` with the scale multiplied into the factors: diffusers takes no alpha beside a LoKr."""
    return {f"{folder}.{n}.{factor}": t for n, f in layers.items() for factor, t in baked(f).items()}


def as_peft(layers: Layers, folder: str = FOLDERS[0]) -> dict[str, Tensor]:
    """``<folder>.<path>.lora_A.weight`` and ``lora_B.weight``, scale multiplied in. Raises UserError for a LoKr."""
    _only_lora(layers, "peft")
    return {f"{folder}.{n}.{peft}": baked(f)[own] for n, f in layers.items() for peft, own in reversed(PEFT.items())}


def as_kohya(layers: Layers, naming: LayerNames, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """kohya's LoRA of the fused layers, exactly the same change of weight; alpha = rank. Raises UserError for a LoKr.

    naming: what the family calls its layers elsewhere; shapes: (out, in) of every linear. q, k and v of one fused
    layer have different down matrices: these are stacked, and each up matrix fills its own rows and columns of the
    fused one, so ranks add up and nothing is approximated.
    """
    _only_lora(layers, "kohya")
    groups = dict(map(naming.original_parts, layers))
    out: dict[str, Tensor] = {}
    for bfl, parts in groups.items():
        factors = {part: baked(layers[part]) for part in parts if part in layers}
        down = torch.cat([f["lora_down.weight"] for f in factors.values()])
        up = down.new_zeros(sum(shapes[part][0] for part in parts), len(down))
        column = 0
        for part, f in factors.items():
            own = f["lora_up.weight"]
            up[naming.original_name(part, shapes)[1], column : column + own.shape[1]] = own
            column += own.shape[1]
        if naming.is_swapped(bfl):
            up = naming.swap_halves(up)
        name = naming.kohya_name(bfl)
        out |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        out[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return out


def baked(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors without alpha, its scale multiplied into one of them (untouched where the scale is 1)."""
    by, own = scale(factors), {name: tensor for name, tensor in factors.items() if name != "alpha"}
    if by != 1:
        last = next(n for n in ("lora_up.weight", "lokr_w2_a", "lokr_w1_a") if n in own)
        own[last] = (own[last].float() * by).to(own[last].dtype)
    return own


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
