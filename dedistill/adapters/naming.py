"""What adapter files call layers and their factors, in every naming that is read.

A layer's name in a file is a prefix and a path, with dots or with underscores. The path is that of the network, or that of
the model's own repository, where some layers are fused: then a name stands for several linears, each of which has its rows.
A path with underscores cannot be taken apart again, so reading needs the names of the network's linears.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dedistill.adapters.targets import Shape
from dedistill.errors import UserError, amount


class LayerNames(ABC):
    """What a network's layers are called in the files of the model's own repository, where some may be fused."""

    KOHYA_MODULE: ClassVar[str]
    """What sd-scripts calls the code that reads its LoRA files of this network."""
    KOHYA_LEAVES_OUT: ClassVar[str]
    """Pattern of the original names of layers that sd-scripts does not load; empty: it loads all."""
    DIFFUSERS_CONVERTS: ClassVar[bool]
    """Whether ``load_lora_weights`` of diffusers' pipeline takes LoRA in other names than PEFT's."""

    @abstractmethod
    def original_parts(self, module: str) -> tuple[str, tuple[str, ...]]:
        """The original module that holds ``module``, and all modules that it holds, in the order of its rows. Raises UserError
        for a name that the network does not have."""

    def original_tensor(self, name: str) -> tuple[str, tuple[str, ...]]:
        """As ``original_parts``, of a tensor."""
        module, _, kind = name.rpartition(".")
        original, parts = self.original_parts(module)
        return f"{original}.{kind}", tuple(f"{part}.{kind}" for part in parts)

    def original_plan(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Original tensor -> the tensors it is joined from, for all tensors of a network. Raises UserError for an unknown name
        and for a fused tensor of which a part is missing."""
        names = list(names)
        plan = dict(map(self.original_tensor, names))
        if missing := sorted({part for parts in plan.values() for part in parts} - set(names)):
            tensors = amount(len(missing), "tensor is", "tensors are")
            raise UserError(f"{tensors} missing beside those they are fused with, e.g. '{missing[0]}'")
        return plan

    def original_name(self, linear: str, shapes: Mapping[str, Shape]) -> tuple[str, slice]:
        """The original module that holds the weight of ``linear``, and which of its rows; of one whose halves are swapped
        there, all rows."""
        original, parts = self.original_parts(linear)
        start = sum(shapes[part][0] for part in parts[: parts.index(linear)])
        return original, slice(start, start + shapes[linear][0])

    def is_swapped(self, original: str, network: Collection[str]) -> bool:
        """Whether the halves of this original module's rows stand the other way round. network: names of its linears, or of
        its tensors."""
        return False

    def join(self, original: str, parts: list[Tensor], network: Collection[str]) -> Tensor:
        """One original tensor of its parts, as ``original_plan`` lists them. network: names of all its tensors."""
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return swap_halves(tensor) if self.is_swapped(original.rpartition(".")[0], network) else tensor

    def kohya_name(self, original: str) -> str:
        """An original module as kohya's sd-scripts and ComfyUI spell it in LoRA files."""
        return "lora_unet_" + original.replace(".", "_")

    def other_names(self, original: str) -> dict[str, int]:
        """What else files call an original module -> how many of its parts, from the first, they mean by it."""
        return {}


Tables = Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]
"""Stack of numbered blocks, "" for what stands in none -> the stack's original name, and original module of a block -> the
modules that it holds, in the order of its rows."""


class TableNames(LayerNames):
    """Names of a network whose blocks are numbered, by tables."""

    TABLES: ClassVar[Tables]
    UNKNOWN: ClassVar[str]
    """What to say of a module that stands in none."""
    _found: ClassVar[dict[str, dict[str, tuple[str, tuple[str, ...]]]]]

    def __init_subclass__(cls) -> None:
        cls._found = {
            stack: {part: (original, parts) for original, parts in table.items() for part in parts}
            for stack, (_, table) in cls.TABLES.items()
        }

    def original_parts(self, module: str) -> tuple[str, tuple[str, ...]]:
        block = re.fullmatch(rf"({'|'.join(filter(None, self.TABLES))})\.(\d+)\.(.+)", module)
        stack, number, rest = block.groups() if block else ("", "", module)
        if rest not in self._found[stack]:
            raise UserError(f"'{module}' is not a layer of {self.UNKNOWN}")
        original, parts = self._found[stack][rest]
        if not block:
            return original, parts
        return f"{self.TABLES[stack][0]}.{number}.{original}", tuple(f"{stack}.{number}.{part}" for part in parts)


def swap_halves(rows: Tensor) -> Tensor:
    """(scale, shift) <-> (shift, scale) along the first dimension; its own inverse."""
    return torch.cat(rows.chunk(2)[::-1])


FOLDERS = ("transformer", "unet")
"""Where pipelines keep denoisers; tensors' names begin with it in files for them."""

LOKR = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
UP, DOWN = "lora_up.weight", "lora_down.weight"
LORA = (UP, DOWN)
DENSE = "diff"
PEFT = {"lora_B.weight": UP, "lora_A.weight": DOWN}
ROWS = "rows"
"""Not in files: of the product of a LoKr's factors, the rows [n, 2] (from, to) that are this linear's, one below the other."""

FACTORS = {
    **{name: name for name in (*LORA, *LOKR, "alpha", DENSE)},
    **PEFT,
    **{"lora_B.default.weight": UP, "lora_A.default.weight": DOWN, "lora.up.weight": UP, "lora.down.weight": DOWN},
    **{"up.weight": UP, "down.weight": DOWN},
}
"""A factor as files spell it -> as LyCORIS does, whose names are used throughout."""
_BY_LENGTH = sorted(FACTORS, key=len, reverse=True)

_OTHER_KINDS = {
    ("dora_scale", "lora_magnitude_vector", "magnitude"): "a DoRA",
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"): "a LoHa",
    ("lokr_t2", "lora_mid"): "of Tucker's kind",
    ("oft_blocks", "oft_diag", "oft_R"): "an OFT",
    ("diff_b", "b_norm", "lora_B.bias", "lora_up.bias"): "one that changes biases",
    ("w_norm", "set_weight"): "one that replaces weights",
}
"""Ends of tensors' names -> what an adapter with them is; none of these can be applied."""
_ENCODERS = ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder.", "text_encoder_2.", "text_encoders.")


def split_key(key: str) -> tuple[str, str]:
    """(layer, factor) of a tensor's name, the factor as LyCORIS calls it; as it stands, where no naming is known."""
    for spelt in _BY_LENGTH:
        if key.endswith(f".{spelt}"):
            return key[: -len(spelt) - 1], FACTORS[spelt]
    return layer_of(key), key.removeprefix(layer_of(key) + ".")


def layer_of(key: str) -> str:
    """What stands before the factor's name in a tensor's name (LoRA's factors have a dot themselves)."""
    return key.removesuffix(".weight").rpartition(".")[0]


def other_kind(key: str) -> str:
    """What an adapter with a tensor of this name is, where that is a known kind which cannot be applied; else nothing."""
    end = key.removesuffix(".weight").removesuffix(".default")
    for ends, kind in _OTHER_KINDS.items():
        if end.endswith(tuple(f".{name}" for name in ends)):
            return kind
    return ""


def is_of_encoder(key: str) -> bool:
    """Whether a tensor's name is that of a text encoder's layer."""
    return key.startswith(_ENCODERS)


@dataclass(frozen=True)
class Place:
    """Where a layer of a file belongs."""

    name: str
    """In messages."""
    linears: tuple[str, ...]
    rows: tuple[tuple[tuple[int, int], ...], ...] = ()
    """Of each linear, the rows (from, to) of the file's layer, one below the other; none where it is that linear."""


def places(shapes: Mapping[str, Shape], folder: str, naming: LayerNames | None = None) -> dict[str, Place]:
    """Every name that a file may give a layer -> where it belongs.

    shapes: (out, in) of the network's linears; only their names are looked at without ``naming``. folder: where a pipeline
    keeps this network; names that begin with another one are not its own.
    """
    known: dict[str, Place] = {}
    for linear in shapes:
        flat = linear.replace(".", "_")
        spelt = [prefix + linear for prefix in ("", f"{folder}.", "diffusion_model.", *_wrapped(folder))]
        known |= dict.fromkeys([*spelt, file_name(linear), f"lora_{folder}_{flat}"], Place(linear, (linear,)))
    for original, parts in dict(map(naming.original_parts, shapes)).items() if naming else ():
        assert naming
        names = {original: len(parts)} | naming.other_names(original)
        for name, count in names.items():
            place = _place(original, parts[:count], shapes, naming)
            spelt = [prefix + name for prefix in ("", "diffusion_model.", "model.diffusion_model.", *_wrapped(folder))]
            known |= dict.fromkeys([*spelt, *([naming.kohya_name(name)] if name == original else [])], place)
    return known


def _wrapped(folder: str) -> tuple[str, str]:
    """As PEFT writes a model that it wraps itself."""
    return "base_model.model.", f"base_model.model.{folder}."


def _place(original: str, parts: tuple[str, ...], shapes: Mapping[str, Shape], naming: LayerNames) -> Place:
    if naming.is_swapped(original, shapes):
        rows = shapes[parts[0]][0]
        return Place(original, parts, (((rows // 2, rows), (0, rows // 2)),))
    if len(parts) == 1:
        return Place(parts[0], parts)
    slices = [naming.original_name(part, shapes)[1] for part in parts]
    return Place(original, parts, tuple(((s.start, s.stop),) for s in slices))


def file_name(module_name: str) -> str:
    """``a.b.c`` as LyCORIS, SimpleTuner and ComfyUI spell it in files: ``lycoris_a_b_c``."""
    return "lycoris_" + module_name.replace(".", "_")
