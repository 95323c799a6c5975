"""From a recipe to a model that can be called: family, frozen base, adapter, in that order."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dedistill.adapters.attach import Adapter, check_started, compare_tensors, detached, initialise
from dedistill.adapters.files import read_tensors
from dedistill.adapters.targets import Resolved, adaptable, resolve_targets
from dedistill.errors import UserError
from dedistill.flow.guidance import Branch
from dedistill.flow.path import seen_anywhere
from dedistill.io.atomic import step_name
from dedistill.io.weights import count_numbers
from dedistill.models.blocks import check_blocks, checkpoint_blocks, may_wait, must_wait, without_blocks
from dedistill.models.conditioning import Conditioning, collate
from dedistill.models.family import Components, Family, Guidance
from dedistill.models.image_prompts import ImagePrompt, parted
from dedistill.models.places import check_origin
from dedistill.models.quantize import (
    cast_float,
    dense_weight,
    excluded,
    linear_names,
    multiply_codes,
    prepare_base,
    storage_bytes,
)
from dedistill.models.registry import check_adapter_family, get_family, text_length
from dedistill.models.swap import Swap
from dedistill.recipe import Recipe
from dedistill.recipe.model_tables import Adapter as AdapterTable
from dedistill.recipe.objectives import OBJECTIVES
from dedistill.recipe.resolve import filled
from dedistill.recipe.schema import shift_in_numbers

CHUNK = 256
ARITHMETIC = 3
"""Raised when the same weights and samples give other numbers than before, by rounding. 2: adapters and what they are put on
compute in the base's dtype, without autocast. 3: gradients of bf16 adapters are summed in float32."""


@dataclass
class Model:
    """``root`` is what is trained: the adapter, or the whole network without one; ``called``, with an adapter inside."""

    family: Family
    components: Components
    root: nn.Module
    text_length: int
    called: nn.Module | None = None
    """What stands around the network in every pass; None: nothing does."""
    device: torch.device = field(init=False)
    """Where passes begin; blocks of a base may be elsewhere. Who moves ``root`` says so here."""
    bf16: bool = False
    negative: str = ""
    """Prompt of the unconditional branch when images are made."""
    guidance: float | None = None
    """Fed to a distilled guidance embedding when images are made; None: as in training."""
    grid_shift: float = 1.0
    """Shift of the solver's sigmas when images are made: the recipe's sample.shift in numbers."""
    chunk: int = CHUNK
    """Samples per forward pass when nothing is trained."""
    adapter: Adapter | None = None
    targets: list[Resolved] = field(default_factory=list)
    text_cache: dict[str, Conditioning] = field(default_factory=dict)
    """Captions that are encoded already, each as long as it is real; they never reach an encoder."""
    snapshots: Path = Path()
    """Where the run's snapshots are."""
    frozen: nn.Module | None = None
    """The network as it was before training, where all of it is trained and the objective asks for it."""
    earlier: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """Those of its weights that a guider has asked for, by step."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was really done: quantized layers, matched layers, sizes of the start. Recorded in the run directory."""

    def __post_init__(self) -> None:
        self.device = next(self.root.parameters()).device

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters under the names that files use."""
        return self.adapter.trainable() if self.adapter else dict(self.components.denoiser.named_parameters())

    def modules(self) -> list[list[str]]:
        """Names of the trained parameters that work only together: those of each adapted layer; all, without an adapter."""
        names = {id(parameter): name for name, parameter in self.trainable().items()}
        if self.adapter is None:
            return [list(names.values())]
        return [[names[id(p)] for p in module.parameters()] for module in self.adapter.by_target.values()]

    def tensors(self, *, copy: bool = True) -> dict[str, Tensor]:
        """What a snapshot holds: private copies on the CPU, or as it stands."""
        return self.adapter.tensors(copy=copy) if self.adapter else detached(self.trainable(), copy=copy)

    def load_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy a snapshot in, all of it or nothing."""
        if self.adapter:
            return self.adapter.load_tensors(tensors, source)
        own = self.trainable()
        if problems := compare_tensors(own, tensors):
            raise UserError(f"'{source}' does not fit this recipe's network: {problems}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def load_file(self, path: Path, recipe: Recipe) -> None:
        """Copy the weights of a snapshot in, trained as ``recipe`` says."""
        tensors, header = read_tensors(path)
        check_adapter_family(header, self.family.spec, str(path))
        check_origin(header, recipe, path)
        self.load_tensors(tensors, str(path))

    def encode(self, captions: list[str], length: int | None = None) -> Conditioning:
        """One batch of encoded prompts on the model's device, with the images that they name; words in ``text_cache`` are
        the very tensors of the cache. Padding that is hidden from the network goes no further than the longest of them.

        Raises UserError for images where the model cannot be told any.
        """
        words, images = zip(*map(parted, captions)) if captions else ((), ())
        if words and all(c in self.text_cache for c in words):
            text = collate([self.text_cache[c] for c in words]).to(self.device)
        else:
            text = self.family.encode_text(self.components, list(words), length or self.text_length).to(self.device)
        text = text.trimmed() if self.components.mask == "bool" else text
        return self._told(text, images).to(self.device) if any(images) else text

    def _told(self, text: Conditioning, images: Sequence[Sequence[ImagePrompt]]) -> Conditioning:
        if (encoder := self.components.image_prompts) is None:
            raise UserError("a prompt names an image: set model.image_prompts, of a family that takes images, or leave it out")
        return encoder.told(text, images, self.components.device)

    def remember(self, captions: list[str]) -> None:
        """Encode captions once and for all, and free the encoders: ``encode`` gives these tensors from now on."""
        if new := [c for c in dict.fromkeys(parted(c)[0] for c in captions) if c not in self.text_cache]:
            text = self.family.encode_text(self.components, new, self.text_length).to("cpu")
            self.text_cache |= {c: text.index_select(slice(i, i + 1)) for i, c in enumerate(new)}
        self.components.text.unload()

    def velocity(self, noisy: Tensor, sigma: Tensor, text: Conditioning, guidance: Guidance = None) -> Tensor:
        """noise - data as the model predicts it, float32; the same arithmetic in training, validation and sampling.

        Raises ValueError for noise levels that no network should be told. A GPU is not waited for to look at the numbers.
        """
        if sigma.dtype not in (torch.float32, torch.float64) or seen_anywhere(~((sigma >= 0) & (sigma <= 1))):
            raise ValueError("sigma must be float32 in [0, 1]; a family multiplies by 1000 itself where its network wants that")
        # a frozen base is stored in the dtype it computes in. autocast would choose per operation, and not the same on a GPU:
        # float32 for every LayerNorm there, and for what follows it
        whole = self.bf16 and self.adapter is None
        with torch.autocast(self.device.type, torch.bfloat16) if whole else nullcontext():
            called = self.called or self.components.denoiser
            return self.family.velocity(self.components, called, noisy, sigma, text, guidance).float()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode for as long as this lasts, and then in the mode that it was in."""
        training = self.root.training
        self.root.eval()
        try:
            yield
        finally:
            self.root.train(training)

    @contextmanager
    def as_asked(self, branch: Branch) -> Iterator[None]:
        """The network of a guider's ``branch``: its adapter weaker, with weights of another step, or without some of its
        blocks. Raises UserError where there is no such adapter, snapshot or block."""
        with ExitStack() as changed:
            if branch.adapter != 1:
                if self.adapter is None:
                    raise UserError(
                        "guider 'auto' leads away from the base without its adapter, and here is none: take another guider, or "
                        "leave this candidate out (--candidates)"
                    )
                changed.enter_context(self.adapter.at_strength(branch.adapter))
            if branch.step:
                changed.enter_context(self._at_step(branch.step))
            if branch.without:
                blocks = self.family.blocks(self.components.denoiser)
                changed.enter_context(without_blocks(blocks, branch.without, self.family.unchanged))
            yield

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """The network as it was before training: the teacher of some objectives."""
        if self.adapter is not None:
            with self.adapter.at_strength(0):
                yield
            return
        assert self.frozen is not None, "``assemble`` keeps it for the objectives that ask for it"
        own = self.root, self.components, self.called
        self.root, self.components, self.called = self.frozen, replace(self.components, denoiser=self.frozen), None
        try:
            yield
        finally:
            self.root, self.components, self.called = own

    @contextmanager
    def _at_step(self, step: int) -> Iterator[None]:
        """With the trained weights of the run's snapshot of ``step``, which stay beside the model's own from then on."""
        own = self.trainable()
        if step not in self.earlier:
            path = self.snapshots / f"{step_name(step)}.safetensors"
            if not path.exists():
                raise UserError(f"guider 'auto': no snapshot of step {step} in '{self.snapshots}'")
            tensors, _ = read_tensors(path)
            if problems := compare_tensors(self.tensors(copy=False), tensors):
                raise UserError(f"'{path}' does not fit this recipe's network: {problems}")
            self.earlier[step] = {name: tensors[name].to(p.device, p.dtype) for name, p in own.items()}
        before = {name: parameter.data for name, parameter in own.items()}
        try:
            for name, parameter in own.items():
                parameter.data = self.earlier[step][name]
            yield
        finally:
            for name, parameter in own.items():
                parameter.data = before[name]

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] on the CPU, about [-1, 1]."""
        return self.family.decode(self.components, latents).float().cpu()

    def shift(self, shape: tuple[int, ...]) -> float:
        """Resolution-dependent shift of sigma for samples of ``shape``."""
        return self.family.shift(self.components, self.family.tokens(self.components, shape))


def expected_parameters(recipe: Recipe) -> int:
    """Parameters of the network that ``build_model`` would load, by headers of its files, or by what is known of it where it is
    new or yet to be fetched."""
    family, place = get_family(recipe.model.family, recipe.where("model.family")), Path(recipe.model.path or "")
    if recipe.model.path is None or not place.exists():
        return sum(p.numel() for p in family.full_size(recipe.model).denoiser.parameters())
    files = [place] if place.is_file() else (place / family.spec.folder).glob("*.safetensors")
    return sum(map(count_numbers, files))


def adapted_layers(recipe: Recipe, family: Family, denoiser: nn.Module) -> list[Resolved]:
    """The layers of ``denoiser`` that ``recipe`` adapts, none without an adapter. Only names and shapes are looked at.

    Raises UserError where the recipe names blocks or layers that the network does not have.
    """
    check_blocks(recipe, len(family.blocks(denoiser)))
    if recipe.adapter is None:
        return []
    excluded(recipe.base.exclude, linear_names(denoiser), recipe.where)
    return resolve_targets(recipe.adapter, adaptable(denoiser), family.presets(denoiser), recipe.where)


def build_model(recipe: Recipe, device: torch.device | str = "cpu") -> Model:
    """Load, freeze, quantize and adapt as ``recipe`` says; every effect is checked and recorded in ``facts``."""
    family = get_family(recipe.model.family, recipe.where("model.family"))
    return assemble(recipe, family, family.load(recipe.model, seed=recipe.run.seed), device)


def check_asked(recipe: Recipe, family: Family, components: Components) -> None:
    """Raises UserError for what a recipe asks of a model that does not have it, before anything is encoded for it."""
    key, message, traits = "", "", OBJECTIVES[recipe.train.objective]
    if traits.fed and not components.takes_guidance:
        key, message = "train.objective", f"'{recipe.train.objective}' feeds the network a scale of guidance"
        message += ", and this one has no embedding for it; U-Nets get one where model.guidance is set"
    elif components.new_guidance and (recipe.adapter is not None or not traits.fed):
        key, message = (
            "model.guidance",
            "this network has no guidance embedding; a new one is trained by objective = 'guidance'",
        )
        message += ", without an adapter, since no other program has that layer to put one on"
    elif traits.diffusion and components.schedule is None:
        what = f"is read as {components.prediction} (model.prediction)" if components.prediction else "is a flow model"
        key, message = "train.objective", f"'{recipe.train.objective}' is for models that were trained by diffusion"
        message += f"; {family.spec.name} {what}"
    elif recipe.model.prediction != "auto" and components.prediction is None:
        key, message = "model.prediction", f"all networks of {family.spec.name} predict velocity; leave it out"
    elif recipe.model.image_prompts and components.image_prompts is None:
        key, message = "model.image_prompts", f"{family.spec.name} cannot be told images; leave it out"
    elif recipe.sample.guidance is not None and not components.takes_guidance:
        key, message = "sample.guidance", "this network has no guidance embedding, or bypasses it; leave the key out"
    elif components.image_prompts is None:
        asked = {"sample.negative": [recipe.sample.negative], "preview.prompts": recipe.preview.prompts}
        key = next((key for key, prompts in asked.items() if any(parted(prompt)[1] for prompt in prompts)), "")
        message = "names an image: set model.image_prompts, of a family that takes images, or leave it out" if key else ""
    if message:
        raise UserError(f"{recipe.where(key)}: {message}", 2)


def sampled_shape(recipe: Recipe, family: Family, components: Components) -> tuple[int, int, int]:
    """Of what the denoiser sees of an image as ``recipe`` samples it. Raises UserError for a size that it cannot have."""
    height, width = recipe.sample.height, recipe.sample.width
    if not (height and width):
        return components.sample_shape
    try:
        return family.latent_shape(components, height, width)
    except UserError as e:
        raise UserError(f"{recipe.where('sample.height')}: {e}", e.exit_code) from e


def assemble(
    recipe: Recipe, family: Family, components: Components, device: torch.device | str, *, started: bool = True
) -> Model:
    """``build_model`` of components that are there already. started: False leaves adapters without their first numbers, for
    components that have none themselves."""
    components.device = device
    check_asked(recipe, family, components)
    blocks = family.blocks(components.denoiser)
    targets = adapted_layers(recipe, family, components.denoiser)
    components.sample_shape = sampled_shape(recipe, family, components)
    length = text_length(family, filled(recipe.model.text_length, "model.text_length"), recipe.where("model.text_length"))
    facts: dict[str, Any] = {
        "network_parameters": sum(p.numel() for p in components.denoiser.parameters()),
        "sample_shape": list(components.sample_shape),
    }
    if recipe.adapter is None:
        cast_float(components.denoiser, torch.float32)
        frozen = deepcopy(components.denoiser).requires_grad_(False) if OBJECTIVES[recipe.train.objective].teacher else None
        model = Model(family, components, components.denoiser.to(device), length, facts=facts)
        model.frozen = frozen and frozen.to(device)
    else:
        model = _adapt(recipe, recipe.adapter, family, components, targets, facts, device, length, started=started)
    model.root.to(device)
    model.device = next(model.root.parameters()).device
    model.snapshots = Path(recipe.run.out) / "snapshots"
    model.negative, model.guidance = recipe.sample.negative, recipe.sample.guidance
    model.bf16 = recipe.train.precision == "bf16"
    components.sample_shift = recipe.sample.shift
    model.grid_shift = shift_in_numbers(recipe.sample.shift, lambda: model.shift(components.sample_shape))
    model.chunk = recipe.train.micro_batch or CHUNK
    facts |= {"text_length": length, "mask": components.mask, "guidance": components.guidance}
    # a training has "auto" settled; without gradients it means nothing
    again, away = recipe.train.gradient_checkpointing, recipe.train.offload_activations
    again = False if again == "auto" else again
    facts["gradient_checkpointing"] = checkpoint_blocks(components.denoiser, blocks, again, away=away)
    facts |= {"offload_activations": True} if away else {}
    facts["trained_parameters"] = sum(p.numel() for p in model.trainable().values())
    facts["storage_bytes"] = storage_bytes(components.denoiser)
    return model


def _adapt(
    recipe: Recipe,
    table: AdapterTable,
    family: Family,
    components: Components,
    targets: list[Resolved],
    facts: dict[str, Any],
    device: torch.device | str,
    length: int,
    *,
    started: bool,
) -> Model:
    denoiser = components.denoiser
    cast_float(denoiser, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    names, blocks = linear_names(denoiser), family.blocks(denoiser)
    stay = may_wait(recipe, blocks)
    quantized = prepare_base(denoiser, recipe.base.quant, recipe.base.exclude, device, recipe.where, stay=stay)
    waiting = must_wait(recipe, blocks, denoiser, device)
    facts |= {"quant": recipe.base.quant, "quantized": quantized, "unquantized": sorted(set(names) - set(quantized))}
    if (codes := recipe.base.matmul) != "float":
        facts[f"{codes}_products"] = multiply_codes(denoiser, blocks, device, recipe.where("base.matmul"), codes)
    with nullcontext() if started else torch.device(device):
        adapter = Adapter(denoiser, table.kind, targets).to(device)
    weight = _weight_reader(denoiser, device)
    for name, module in adapter.by_target.items() if started else ():
        initialise(module, name, partial(weight, name), init=table.init, scale=table.init_scale, seed=recipe.run.seed)
    if recipe.train.optimizer == "adamw_bf16":
        for parameter in adapter.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    facts["lycoris_backend"] = os.environ["LYCORIS_KERNEL_BACKEND"]
    if started:
        facts["init"] = check_started(adapter.by_target, weight, init=table.init, scale=table.init_scale)
    if waiting:
        facts["swap"] = Swap(waiting, device).facts
    return Model(family, components, adapter, length, adapter=adapter, targets=targets, facts=facts)


def _weight_reader(denoiser: nn.Module, device: torch.device | str) -> Callable[[str], Tensor]:
    """On ``device`` wherever they lie: the same sums."""
    return lambda name: dense_weight(denoiser.get_submodule(name)).to(device)
