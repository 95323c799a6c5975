"""What other programs look for in adapter files: names, factors, and what they cannot do, as rules.

Read in the programs' sources: ComfyUI (comfy/lora.py, 2025-10), LyCORIS 4.1, SimpleTuner and ai-toolkit (2026-08),
sd-scripts (networks/, 2026-02), diffusers 0.42 (loaders/lora_pipeline.py, loaders/peft.py).
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from dedistill.adapters.formats import by_layer, factor_shapes, is_lora
from dedistill.adapters.naming import LOKR, LORA, PEFT, LayerNames, file_name, split_key
from dedistill.adapters.targets import Shape, factor_sides
from dedistill.errors import UserError, amount

Tensors = Mapping[str, Tensor]


@dataclass
class Found:
    """What a program makes of a file."""

    keys: set[str] = field(default_factory=set)
    """The tensors that it loads."""
    why: str = ""
    """The reason, where it refuses the file as a whole."""
    note: str = ""
    """What it has to be told to load that."""


class Names:
    """All names of a network's linears: each a set of names that stand before the factor's."""

    def __init__(self, shapes: Mapping[str, Shape], naming: LayerNames | None, folder: str):
        self.shapes, self.folder = shapes, folder
        original = {naming.original_parts(name)[0] for name in shapes} if naming else set()
        other = {other for name in original for other in naming.other_names(name)} if naming else set()
        self.lycoris = {file_name(n) for n in shapes}
        self.transformer = {f"{folder}.{n}" for n in shapes}
        self.onetrainer = {f"lora_{folder}_" + n.replace(".", "_") for n in shapes}
        self.original = {f"diffusion_model.{name}" for name in original}
        self.kohya = {naming.kohya_name(name) for name in original} if naming else set()
        left_out = re.compile(naming.KOHYA_LEAVES_OUT or "$^") if naming else re.compile("")
        self.sd_scripts = {naming.kohya_name(n) for n in original if not left_out.search(n)} if naming else set()
        self.converted = bool(naming and naming.DIFFUSERS_CONVERTS)
        self.kohya_blocks = {naming.kohya_name(name) for name in original if "_blocks." in name} if naming else set()
        self.qkv = {f"diffusion_model.{name}" for name in other if name.endswith("_qkv")}
        self.processors = {name for name in other if ".processor." in name}


@dataclass(frozen=True)
class Program:
    name: str
    rule: Callable[[Tensors, Names], Found]
    reads_header: bool = False
    """Whether it knows ``lora_adapter_metadata``."""
    drops_alpha: bool = False
    """Whether the alphas that it loads have no effect."""
    lokr_only: bool = False
    """Whether it, or that setting of it, is for LoKr alone."""
    transformers_only: bool = False
    """Whether its rule is known for transformers alone."""


_KOHYA = {*LORA, "alpha"}
_LYCORIS = {*_KOHYA, *LOKR, "lokr_t2", "dora_scale"}
_OTHERS = {"lora.up.weight", "lora.down.weight", "lora_A.default.weight", "lora_B.default.weight"}
_XLABS = {"up.weight", "down.weight"}
_LAST = {"double_blocks.18.processor.qkv_lora2.up.weight", "single_blocks.37.processor.qkv_lora.up.weight"}
"""By which ComfyUI knows a file for one of XLabs' code."""


def _take(tensors: Tensors, layers: set[str], factors: Iterable[str]) -> set[str]:
    ends = tuple(f".{factor}" for factor in factors)
    return {k for k in tensors if any(k.endswith(end) and k[: -len(end)] in layers for end in ends if k.endswith(ends))}


def _comfyui(t: Tensors, names: Names) -> Found:
    every = names.lycoris | names.transformer | names.onetrainer | names.original | names.kohya | names.qkv
    found = _take(t, every, {*_LYCORIS, *PEFT, *_OTHERS})
    return Found(found | _take(t, names.processors, _XLABS) if t.keys() >= _LAST else found)


def _lycoris(t: Tensors, names: Names) -> Found:
    return Found(_take(t, names.lycoris, _LYCORIS))


def _simpletuner(t: Tensors, names: Names) -> Found:
    if taken := _take(t, names.lycoris, _LYCORIS):
        return Found(taken)
    return Found(_take(t, names.transformer, {*PEFT, "alpha"}) if _take(t, names.transformer, PEFT) else set())


def _sd_scripts(t: Tensors, names: Names) -> Found:
    return Found(_take(t, names.sd_scripts, _KOHYA))


_NOT_PEFT = "has no LoRA in PEFT's names"


def _load_lora_weights(t: Tensors, names: Names) -> Found:
    if not names.converted:
        wrong = next((key for key in t if "lora" not in key), "")
        taken = _take(t, names.transformer, PEFT)
        return Found(taken, "" if taken else _NOT_PEFT) if not wrong else Found(why=f"raises an error at '{wrong}'")
    if any(".lora_down.weight" in key for key in t):
        return _diffusers_from_kohya(t, names)
    if any("processor" in key for key in t):
        return Found(_take(t, names.processors | {f"diffusion_model.{name}" for name in names.processors}, _XLABS))
    if any("base_model" in key for key in t):
        return Found(why="takes names under base_model for a file of fal's, of all layers of all blocks")
    if _take(t, names.transformer, PEFT):
        return Found(_take(t, names.transformer, {*PEFT, "alpha"}))
    return Found(why=_NOT_PEFT)


def _diffusers_from_kohya(t: Tensors, names: Names) -> Found:
    if taken := _take(t, names.transformer, {*PEFT, *LORA}):
        return Found(taken)  # its alphas are dropped
    if names.folder == "unet":  # another converter, by the network's own names as well
        return Found(_take(t, names.kohya | names.onetrainer, _KOHYA))
    if any(key.startswith("lora_transformer_") for key in t):
        # of layers in blocks its converter knows those of attention by name; all others of a block become one
        known = {name for name in names.onetrainer if "_blocks_" not in name or re.search("_attn_(to|add)_", name)}
        missing = {split_key(key)[0] for key in t} - {split_key(key)[0] for key in t if key.endswith(".alpha")}
        return Found(why="needs an alpha of every layer") if missing else Found(_take(t, known, _KOHYA))
    known = _take(t, names.kohya, _KOHYA) | _take(t, names.original, _KOHYA)
    if left := {key for key in t if key.startswith(("lora_unet_", "diffusion_model."))} - known:
        return Found(why=f"raises an error at '{min(left)}'")
    # outside the blocks its converter leaves out the prefix by which the result is then filtered
    blocks = names.kohya_blocks | {name for name in names.original if "_blocks." in name}
    return Found(_take(t, blocks, _KOHYA))


def _load_lora_adapter(t: Tensors, names: Names) -> Found:
    lokr = _take(t, names.transformer, LOKR)
    if not lokr:
        taken = _take(t, names.transformer, PEFT)
        return Found(taken) if taken else Found(why=f"nothing under '{names.folder}.'")
    layers, fault = _lokr_layers(t, lokr)
    if any(tensor.ndim > 2 for factors in layers.values() for tensor in factors.values()):
        fault = "is not known to take LoKr of convolutions; use dedistill.load_lokr"
    if fault:
        return Found(why=fault)
    sizes = [factor_shapes(factors) for factors in layers.values()]
    if not any(_made_by(factor, sizes) for factor in _candidates(sizes)):
        return Found(why="no single decompose_factor gives all its layers; use dedistill.load_lokr")
    if random := _of_another_rank(layers, names.folder):
        return Found(
            why=f"would leave {amount(len(random), 'layer')}, e.g. '{random[0]}', with random factors: PEFT takes another "
            "layer's rank for theirs; use dedistill.load_lokr"
        )
    return Found(lokr)


def _lokr_layers(t: Tensors, keys: set[str]) -> tuple[dict[str, dict[str, Tensor]], str]:
    """(layer -> its factors, what is wrong with them or nothing)."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key in sorted(keys):
        layer, factor = split_key(key)
        layers.setdefault(layer, {})[factor] = t[key]
    for layer, factors in layers.items():
        whole = all(w in factors or {f"{w}_a", f"{w}_b"} <= factors.keys() for w in ("lokr_w1", "lokr_w2"))
        if not whole or any(tensor.ndim not in (2, 4) for name, tensor in factors.items() if name != "alpha"):
            return layers, f"'{layer}' is incomplete"
    return layers, ""


Sizes = list[tuple[tuple[int, int], tuple[int, int]]]


def _candidates(sizes: Sizes) -> list[int]:
    """Factors that may have made layers of these sizes of Kronecker factors."""
    return [*sorted({w1[0] for w1, _ in sizes} | {w1[1] for w1, _ in sizes}), -1]


def peft_sides(size: int, factor: int) -> tuple[int, int]:
    """As ``factor_sides``, but PEFT puts a factor that divides ``size`` first, however large it is."""
    return (factor, size // factor) if factor > 0 and size % factor == 0 else factor_sides(size, factor)


def _made_by(factor: int, sizes: Sizes) -> bool:
    """Whether PEFT, and ai-toolkit by the same rule, make factors of all these sizes of one setting."""
    return all(peft_sides(a * b, factor) == (a, b) for w1, w2 in sizes for a, b in zip(w1, w2))


def _of_another_rank(layers: Mapping[str, Mapping[str, Tensor]], folder: str) -> list[str]:
    """Layers for which PEFT makes other factors than the file's, since the pattern of another layer's rank matches them.

    diffusers gives it the commonest rank, and the others by the layers' names as patterns; a pattern also matches what ends
    in a dot and it. A factor is kept whole where the rank is at least half of its longer side.
    """
    ranks = {}
    for layer, f in layers.items():
        inner = next((f[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in f), None)
        ranks[layer.removeprefix(f"{folder}.")] = inner or max(f["lokr_w2"].shape)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    special = {layer: inner for layer, inner in ranks.items() if inner != usual}
    both, wrong = any("lokr_w1_a" in f for f in layers.values()), []
    for layer, f in zip(ranks, layers.values()):
        given = next((r for pattern, r in special.items() if re.match(rf"(.*\.)?({pattern})$", layer)), usual)
        first, second = factor_shapes(f)
        whole = {"lokr_w1": not both or given >= max(first) / 2, "lokr_w2": given >= max(second) / 2}
        if any(whole[w] != (w in f) or (not whole[w] and f[f"{w}_b"].shape[0] != given) for w in whole):
            wrong.append(layer)
    return wrong


def _load_lokr(t: Tensors, names: Names) -> Found:
    try:
        layers = by_layer(t, names.shapes, "file", folder=names.folder)
    except UserError as e:
        return Found(why=str(e).removeprefix("'file': "))
    return Found(why="a LoRA; use load_lora_weights") if is_lora(layers) else Found(set(t))


def _ai_toolkit(t: Tensors, names: Names, *, old: bool) -> Found:
    lokr = _take(t, names.lycoris if old else names.transformer, {*LOKR, "alpha"})
    if not any(".lokr_" in key for key in lokr):
        taken = set() if old else _take(t, names.transformer, {*PEFT, *LORA})
        most = max((t[key].shape[0] for key in taken if split_key(key)[1] == LORA[1] and t[key].ndim), default=0)
        return Found(taken, note=_settings(taken, {"linear": most}))
    layers, fault = _lokr_layers(t, lokr)
    if fault:
        return Found(why=fault)
    if any("lokr_w1_a" in factors for factors in layers.values()):
        return Found(why="always makes the first factor of a LoKr whole")
    sizes = [factor_shapes(factors) for factors in layers.values()]
    factor = next((factor for factor in _candidates(sizes) if _made_by(factor, sizes)), None)
    if factor is None:
        return Found(why="has one network.lokr_factor, and none gives all its layers: it ends in a size mismatch")
    inner, fault = _one_rank(layers)
    if fault:
        return Found(why=fault)
    rank = {"lokr_full_rank": "false", "linear": inner} if inner else {}
    if inner and old:
        alphas = {float(t[f"{n}.alpha"]) for n, f in layers.items() if f"{n}.alpha" in t and "lokr_w2_b" in f}
        if len(alphas) > 1:
            return Found(why="has one network.linear_alpha for all layers")
        rank |= {"linear_alpha": f"{next(iter(alphas), inner):g}"}
    return Found(lokr, note=_settings(lokr, {"lokr_factor": factor} | rank))


def _one_rank(layers: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, str]:
    """(the rank of all second factors that have one, else 0; why ai-toolkit, which has one for all, cannot make these)."""
    ranks = {f["lokr_w2_b"].shape[0] for f in layers.values() if "lokr_w2_b" in f}
    inner = next(iter(ranks), 0)
    whole = [max(f["lokr_w2"].shape) for f in layers.values() if "lokr_w2" in f]
    if len(ranks) > 1 or any(inner and inner < side / 2 for side in whole):
        return inner, "has one network.linear, the rank, for all layers: it ends in a size mismatch"
    return inner, ""


def _settings(taken: set[str], settings: Mapping[str, object]) -> str:
    """What ai-toolkit's configuration has to say of the network."""
    outside = {"transformer_only": "false"} if any("transformer_blocks" not in key for key in taken) else {}
    return "with network." + ", ".join(f"{key}: {value}" for key, value in (dict(settings) | outside).items())


PROGRAMS = (
    Program("ComfyUI", _comfyui),
    Program("LyCORIS", _lycoris),
    Program("SimpleTuner", _simpletuner),
    Program("diffusers, load_lora_weights", _load_lora_weights, reads_header=True),
    Program("diffusers, transformer.load_lora_adapter", _load_lora_adapter, reads_header=True),
    Program("diffusers, dedistill.load_lokr", _load_lokr, reads_header=True, lokr_only=True),
    Program("kohya sd-scripts", _sd_scripts),
    Program("ai-toolkit", partial(_ai_toolkit, old=False), drops_alpha=True, transformers_only=True),
    Program("ai-toolkit, old_lokr_format: true", partial(_ai_toolkit, old=True), lokr_only=True, transformers_only=True),
)
OWN_NAMES = ("LyCORIS", "diffusers, dedistill.load_lokr")
"""Programs that take any network by the names of its layers; the others know the networks that they were written for."""
