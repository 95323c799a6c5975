"""Which program loads which tensors of an adapter file, from tables of the names that each of them looks for.

Read in the programs' sources: ComfyUI (comfy/lora.py, 2025-10), LyCORIS 4.1, SimpleTuner and ai-toolkit (2026-08),
sd-scripts (networks/, 2026-02), diffusers 0.42 (loaders/lora_pipeline.py, loaders/peft.py).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from peft.tuners.lokr.layer import factorization
from torch import Tensor

from dedistill.adapters.attach import file_name
from dedistill.adapters.formats import by_layer, factor_shapes, is_lora
from dedistill.adapters.spellings import LOKR, LORA, PEFT, LayerNames, layer_of
from dedistill.errors import UserError

_LYCORIS = {*LORA, *LOKR, "lokr_t2", "alpha", "dora_scale"}
_KOHYA = {*LORA, "alpha"}


@dataclass(frozen=True)
class Verdict:
    """What one program makes of a file. ``why``: the reason where it refuses the file as a whole."""

    program: str
    loaded: list[str]
    ignored: list[str]
    why: str = ""


class _Names:
    """All names of the network's linears: each a set of names that stand before the factor's."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], naming: LayerNames | None, folder: str):
        self.shapes, self.folder = shapes, folder
        original = {naming.original_parts(name)[0] for name in shapes} if naming else set()
        kohya = {name: naming.kohya_name(name) for name in original} if naming else {}
        self.lycoris = {file_name(n) for n in shapes}
        self.transformer = {f"{folder}.{n}" for n in shapes}
        self.onetrainer = {f"lora_{folder}_" + n.replace(".", "_") for n in shapes}
        self.original = {f"diffusion_model.{name}" for name in original}
        self.kohya = set(kohya.values())
        self.kohya_blocks = {renamed for name, renamed in kohya.items() if "_blocks." in name}


def check_adapter(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], naming: LayerNames | None, folder: str = "transformer"
) -> list[Verdict]:
    """One verdict per program on a file with these ``tensors`` for a network whose linears have these ``shapes``.

    naming: what the family calls its layers elsewhere; None for a family that other programs do not know, of whose files
    only those read anything that go by the network's own names. folder: the denoiser's in a pipeline. Only names and shapes
    are looked at; tensors may be on meta.
    """
    names = _Names(shapes, naming, folder)
    rules = _RULES if naming else {program: _RULES[program] for program in _OWN_NAMES}
    return [_verdict(program, rule(tensors, names), tensors) for program, rule in rules.items()]


def _verdict(program: str, found: set[str] | str, tensors: Mapping[str, Tensor]) -> Verdict:
    why, taken = (found, set()) if isinstance(found, str) else ("", found)
    if all(key.endswith(".alpha") for key in taken):  # a scale of weights that are not loaded is nothing
        taken = set()
    return Verdict(program, [k for k in tensors if k in taken], [k for k in tensors if k not in taken], why)


def _take(tensors: Mapping[str, Tensor], layers: set[str], factors: Iterable[str]) -> set[str]:
    factors = set(factors)
    return {key for key in tensors if layer_of(key) in layers and key.removeprefix(layer_of(key) + ".") in factors}


def _comfyui(t: Mapping[str, Tensor], names: _Names) -> set[str]:
    every = names.lycoris | names.transformer | names.onetrainer | names.original | names.kohya
    return _take(t, every, {*_LYCORIS, *PEFT})


def _lycoris(t: Mapping[str, Tensor], names: _Names) -> set[str]:
    return _take(t, names.lycoris, _LYCORIS)


def _simpletuner(t: Mapping[str, Tensor], names: _Names) -> set[str]:
    return _take(t, names.lycoris, _LYCORIS) or _take(t, names.transformer, PEFT)


def _load_lora_weights(t: Mapping[str, Tensor], names: _Names) -> set[str] | str:
    if any(key.endswith(".lora_down.weight") for key in t):
        if taken := _take(t, names.transformer, {*PEFT, *LORA}):
            return taken  # its alphas are dropped
        if any(key.startswith("lora_transformer_") for key in t):
            return "OneTrainer's names, which it converts by rules that are not in this table"
        if left := {key for key in t if key.startswith("lora_unet_")} - _take(t, names.kohya, _KOHYA):
            return f"raises an error at '{min(left)}'"
        # outside the blocks its converter leaves out the prefix by which the result is then filtered
        return _take(t, names.kohya_blocks, _KOHYA)
    return _take(t, names.transformer, {*PEFT, "alpha"}) if _take(t, names.transformer, PEFT) else "has no LoRA in PEFT's names"


def _load_lora_adapter(t: Mapping[str, Tensor], names: _Names) -> set[str] | str:
    lokr = _take(t, names.transformer, LOKR)
    if not lokr:
        return _take(t, names.transformer, PEFT) or "nothing under 'transformer.'"
    sizes = [factor_shapes(f) for f in by_layer({k: t[k] for k in lokr}, names.shapes, "file", folder=names.folder).values()]
    for factor in {*(w1[0] for w1, _ in sizes), -1}:
        if all(factorization(a * b, factor) == (a, b) for w1, w2 in sizes for a, b in zip(w1, w2)):
            return lokr
    return "no single decompose_factor gives all its layers; use dedistill.load_lokr"


def _load_lokr(t: Mapping[str, Tensor], names: _Names) -> set[str] | str:
    try:
        layers = by_layer(t, names.shapes, "file", folder=names.folder)
    except UserError as e:
        return str(e).removeprefix("'file': ")
    return "a LoRA; use load_lora_weights" if is_lora(layers) else set(t)


def _sd_scripts(t: Mapping[str, Tensor], names: _Names) -> set[str]:
    return _take(t, names.kohya_blocks, _KOHYA)


def _ai_toolkit(t: Mapping[str, Tensor], names: _Names) -> set[str]:
    return _take(t, names.transformer, {*PEFT, *LOKR, "alpha"}) | _take(t, names.lycoris, {*LOKR, "alpha"})


_RULES: dict[str, Callable[[Mapping[str, Tensor], _Names], set[str] | str]] = {
    "ComfyUI": _comfyui,
    "LyCORIS": _lycoris,
    "SimpleTuner": _simpletuner,
    "diffusers, load_lora_weights": _load_lora_weights,
    "diffusers, transformer.load_lora_adapter": _load_lora_adapter,
    "diffusers, dedistill.load_lokr": _load_lokr,
    "kohya sd-scripts": _sd_scripts,
    "ai-toolkit": _ai_toolkit,
}
_OWN_NAMES = ("LyCORIS", "diffusers, dedistill.load_lokr")
"""Programs that take any network by the names of its layers; the others know the networks that they were written for."""
