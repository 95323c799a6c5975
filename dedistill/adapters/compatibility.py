"""Which programs load how much of an adapter file, at what strength, and the format in which each loads it whole."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from dedistill.adapters.delta import rank, scale
from dedistill.adapters.formats import ADAPTER_FORMATS, KOHYA, Layers, as_kohya, by_layer, check_shapes, is_lora
from dedistill.adapters.naming import FOLDERS, LayerNames, split_key
from dedistill.adapters.programs import OWN_NAMES, PROGRAMS, Found, Names, Program, Tensors
from dedistill.adapters.targets import Shape
from dedistill.errors import UserError, amount

MERGED = "the merged model"
"""What is left where a program loads an adapter whole in no format."""


@dataclass(frozen=True)
class Verdict:
    """What one program makes of a file."""

    program: str
    loaded: list[str]
    ignored: list[str]
    why: str = ""
    """The reason, where it refuses the file as a whole."""
    note: str = ""
    """What it has to be told to load that."""
    strength: str = ""
    """Where it is another one than the file's."""
    use: str = ""
    """What it loads whole, where that is not this file."""

    @property
    def whole(self) -> bool:
        return not (self.ignored or self.why or self.strength)


def check_adapter(
    tensors: Tensors,
    shapes: Mapping[str, Shape],
    naming: LayerNames | None,
    folder: str = "transformer",
    header: Mapping[str, str] | None = None,
) -> list[Verdict]:
    """One verdict per program on a file of these ``tensors`` for a network whose linears have these ``shapes``.

    naming: what the family calls its layers elsewhere; None for a family that other programs do not know, of whose files
    only those read anything that go by the network's own names. folder: the denoiser's in a pipeline. header: the file's,
    which may say how strong it is. What is for LoKr alone is not asked about a LoRA. First come those that load the file
    whole, then by what they load.
    """
    names = Names(shapes, naming, folder)
    programs = [program for program in PROGRAMS if naming or program.name in OWN_NAMES]
    programs = [program for program in programs if folder == FOLDERS[0] or not program.transformers_only]
    try:
        layers = by_layer(tensors, shapes, "file", folder=folder, header=header, naming=naming)
        plain = by_layer(tensors, shapes, "file", folder=folder, naming=naming)
    except UserError:  # what cannot be applied here is not written in another format either; others may load it
        verdicts = [_verdict(program, tensors, names) for program in programs]
        return sorted(verdicts, key=lambda v: -len(v.loaded))
    programs = [program for program in programs if not (program.lokr_only and is_lora(layers))]
    told = [scale(plain[name]) / scale(layers[name]) for name in layers if scale(layers[name])]
    formats = _in_formats(layers, shapes, naming, folder)
    verdicts = []
    for program in programs:
        verdict = _with_strength(_verdict(program, tensors, names), tensors, program, told)
        verdicts.append(verdict if verdict.whole else replace(verdict, use=_advice(program, names, formats)))
    return sorted(verdicts, key=lambda v: (not v.whole, -len(v.loaded)))


def _verdict(program: Program, tensors: Tensors, names: Names) -> Verdict:
    found = program.rule(tensors, names)
    taken = found.keys
    if found.why or all(key.endswith(".alpha") for key in taken):  # a scale of weights that are not loaded is nothing
        found, taken = Found(why=found.why), set()
    loaded, ignored = [k for k in tensors if k in taken], [k for k in tensors if k not in taken]
    return Verdict(program.name, loaded, ignored, found.why, found.note)


def _with_strength(verdict: Verdict, tensors: Tensors, program: Program, told: Iterable[float]) -> Verdict:
    """told: strength of each layer without what the header says, as a share of that with it."""
    if not verdict.loaded:
        return verdict
    ratios = list(_without_alpha(tensors, set() if program.drops_alpha else set(verdict.loaded), verdict.loaded))
    ratios += [] if program.reads_header else told
    wrong = [ratio for ratio in ratios if abs(ratio - 1) > 1e-3]
    if not wrong:
        return verdict
    return replace(verdict, strength=f"{amount(len(wrong), 'layer')} at {wrong[0]:.3g} of the strength: its alpha is dropped")


def _without_alpha(tensors: Tensors, counted: set[str], loaded: Iterable[str]) -> Iterable[float]:
    """Of each layer whose factors are ``loaded`` and whose alpha is not ``counted``: its strength there, as a share."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key in loaded:
        layer, factor = split_key(key)
        layers.setdefault(layer, {})[factor] = tensors[key]
    for layer, factors in layers.items():
        alpha = tensors.get(f"{layer}.alpha")
        dropped = f"{layer}.alpha" not in counted and rank(factors) is not None
        if dropped and alpha is not None and (by := scale(factors | {"alpha": alpha})):
            yield 1 / by


def _in_formats(layers: Layers, shapes: Mapping[str, Shape], naming: LayerNames | None, folder: str) -> dict[str, Tensors]:
    """The same adapter in every format that has it."""
    found: dict[str, Tensors] = {}
    for format in [*ADAPTER_FORMATS, *([KOHYA] if naming else [])]:
        try:
            if format == KOHYA and naming:
                check_shapes(layers, shapes, "file")  # fused layers are put together from parts of the network's sizes
                found[format] = as_kohya(layers, naming, shapes)
            else:
                found[format] = ADAPTER_FORMATS[format](layers, folder)
        except UserError:
            continue
    return found


def _advice(program: Program, names: Names, formats: Mapping[str, Tensors]) -> str:
    """The first format that a program loads whole and as strong as it is."""
    for format, tensors in formats.items():
        if _with_strength(_verdict(program, tensors, names), tensors, program, ()).whole:
            return f"--format {format}"
    return MERGED
