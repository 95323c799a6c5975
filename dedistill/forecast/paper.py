"""A recipe's real step on tensors without numbers: torch's "meta" device, which computes shapes alone, on any machine.

Where torch chooses kernels by device, it is told which ones a card, or the CPU, would take.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from dedistill.data.source import Batch, Slot
from dedistill.distributed.outside import StopRequests
from dedistill.distributed.world import World
from dedistill.forecast.autocast import Autocast
from dedistill.forecast.kernels import card_kernels, cpu_kernels
from dedistill.forecast.meter import AVERAGES, BASE, FREE, GRADIENTS, OPTIMIZER, TRAINED, Meter
from dedistill.models.conditioning import Conditioning, Tokens
from dedistill.models.family import Components, Family
from dedistill.models.model import Model, assemble
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import make_plan
from dedistill.runs.directory import RunDirectory
from dedistill.training.engine import Engine
from dedistill.training.trainer import Trainer

aten = torch.ops.aten
T = TypeVar("T")
FORWARD, BACKWARD, NORM, UPDATE = STEP = "forward", "backward", "gradient norm", "optimizer"
VALIDATION, SAMPLING = "validation", "making an image"

# --- what "meta" is told ---------------------------------------------------------------------------------------------


class Answers(TorchDispatchMode):
    """Answers what only numbers could: any number read is 1, any condition True. What an operation makes of tensors like those
    of an earlier one is not worked out again."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[object, tuple[type, list[Any]]] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        read = args and isinstance(args[0], Tensor) and args[0].is_meta
        if read and func is aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if read and func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return self._like_before(func, args, kwargs) if _makes_anew(func) else func(*args, **kwargs)

    def _like_before(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        key = (func, _described(args), _described(tuple(kwargs.items())))
        if key in self._made:
            kind, forms = self._made[key]
            results = [
                form if form is None else torch.empty_strided(form[0], form[1], dtype=form[2], device="meta") for form in forms
            ]
            return results[0] if kind is Tensor else kind(results)
        out = func(*args, **kwargs)
        results = list(out) if isinstance(out, tuple | list) else [out]
        if all(r is None or (isinstance(r, Tensor) and r.is_meta) for r in results):
            self._made[key] = Tensor if isinstance(out, Tensor) else type(out), [_described(r) for r in results]
        return out


def _described(value: object) -> Any:  # noqa: ANN401  (nested as deeply as arguments are)
    """All of it that the shapes of results can depend on."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(_described, value))
    return (type(value), value) if isinstance(value, bool | int | float) else value


@cache
def _makes_anew(func: OpOverload) -> bool:
    """Whether its results are tensors of their own."""
    schema = func._schema
    return func.overloadpacket.__name__ not in FREE and not any(x.alias_info for x in [*schema.arguments, *schema.returns])


@contextmanager
def shapes_alone(*, card: bool) -> Iterator[None]:
    """Work on "meta" as on a card, or on the CPU: numbers are made up, and lists of tensors go at once."""
    foreach = "torch.utils._foreach_utils._get_foreach_kernels_supported_devices"
    fused = [f"torch.optim.{place}._get_fused_kernels_supported_devices" for place in ("adam", "optimizer")]
    autocast = Autocast(card=card)
    with ExitStack() as stack:
        stack.enter_context(patch("torch.autocast", autocast.on))
        stack.enter_context(patch("dedistill.models.blocks.checkpoint", autocast.checkpoint))
        for name in [foreach, *fused]:
            stack.enter_context(patch(name, lambda: ["cuda", "cpu", "meta"], create=True))
        stack.enter_context(patch("torch.distributed.all_reduce", lambda tensor: None))
        stack.enter_context(card_kernels() if card else cpu_kernels())
        stack.enter_context(Answers())
        yield


# --- the step --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is asked about: a recipe on samples of one shape."""

    recipe: Recipe
    family: Family
    image: tuple[int, int, int]
    """Of a sample, as the denoiser sees it."""
    length: int
    """Tokens of a caption."""
    card: bool = True
    """With a GPU's kernels and allocator, else the CPU's."""
    processes: int = 1
    """That share a step; asked about is one of them, which holds everything."""
    preview: tuple[int, int, int] | None = None
    """Shape of a preview's image as the denoiser sees it, where it is larger than samples are."""


class Blank:
    """Samples without content, of one shape, with captions of one length; in a batch of several the last is shorter, so
    that padding has to be hidden where it would be. They have all that stored pairs have as well."""

    name = "blank"

    def __init__(self, image: tuple[int, int, int], caption: Conditioning):
        self.image, self.caption = image, caption

    def slots(self, seed: int, step: int, batch: int, *, held_out: bool = False) -> list[Slot]:
        return [Slot(str(position), ()) for position in range(batch)]

    def draw(self, slots: Sequence[Slot]) -> Batch:
        latents, ends = torch.zeros(len(slots), *self.image), torch.zeros(len(slots), 2, *self.image)
        return Batch(latents, [""] * len(slots), latents, ends, np.array([1.0, 0.0]), text=self.text)

    def text(self, captions: list[str]) -> Conditioning:
        text = self.caption.expand(len(captions)).each(Tensor.contiguous)  # as captions of a batch are
        if len(captions) == 1:
            return text
        return Conditioning(tuple(Tokens(s.embeds, _one_shorter(s.mask)) for s in text.sequences), text.vectors)

    def prompts(self, seed: int, count: int) -> list[str]:
        return [""] * count


def _one_shorter(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[-1, -1] = False
    return mask


def blank_text(components: Components, dtype: torch.dtype, length: int) -> Conditioning:
    """One caption of ``length`` real tokens in every sequence without a length of its own, and an image if it may have one."""
    widths = components.text.widths
    sizes = zip_longest(widths.sequences, (length if own is None else own for own in widths.lengths), fillvalue=length)
    sequences = [Tokens(torch.zeros(1, n, width, dtype=dtype), torch.ones(1, n, dtype=torch.bool)) for width, n in sizes]
    if components.image_prompts:
        images = torch.zeros(1, *components.image_prompts.encoder.shape, dtype=dtype)
        sequences.append(Tokens(images, torch.ones(images.shape[:2], dtype=torch.bool)))
    return Conditioning(tuple(sequences), {name: torch.zeros(1, n, dtype=dtype) for name, n in widths.vectors.items()})


class Others(World):
    """One of ``size`` processes, of which all say what it says."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def gather(self, value: T) -> list[T]:
        return [value] * self.size


def on_paper(recipe: Recipe, processes: int = 1) -> Recipe:
    """``recipe`` with one micro-batch a step for each process, and without what needs files or images."""
    t = recipe.train
    tables = {
        "train": {"steps": 10**9, "warmup": 0, "batch": make_plan(recipe).micro_batch * processes, "lpips": None},
        "timesteps": {"shift": 1.0},
        "sample": {"shift": 1.0, "guider": "cfg"},  # which may name blocks that the shorter networks measured do not have
        "data": {"caption_dropout": 0.0},
        "meters": {"every": 0},
        "preview": {"every": 0},
        # int8-quanto has the same codes; what waits on the CPU is taken off afterwards (depth.swapped)
        "base": {"quant": {"int8-quanto": "int8"}.get(recipe.base.quant, recipe.base.quant), "swap": 0},
        "validate_": {"every": recipe.validate_.every, "samples": min(recipe.validate_.samples or 0, t.micro_batch or 256)},
    }
    return recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=keys) for name, keys in tables.items()})


def prepared(
    case: Case, components: Components, device: str, world: World | None = None, engine: type[Engine] = Engine
) -> Trainer:
    """What one process of ``world`` trains the case's recipe with, on samples of its shape, ready for the first step."""
    world = world or Others(case.processes)
    recipe = on_paper(case.recipe, world.size)
    model = assemble(recipe, case.family, components, device, started=device != "meta")
    text = blank_text(components, torch.bfloat16, case.length)
    model.text_cache[""] = text
    spread = engine(recipe, world)
    spread.place(model, device)
    source = Blank(case.image, text)
    trainer = Trainer(recipe, make_plan(recipe), model=model, source=source, run=RunDirectory(recipe), engine=spread)
    trainer.stop = StopRequests()
    model.root.train()
    return trainer


def run(trainer: Trainer, meter: Meter, *, adds: bool, preview: tuple[int, int, int] | None = None) -> None:
    """A step and, where there are any, a validation of what :func:`prepared` gave; ``meter``, of its device, counts them.

    adds: there are gradients already, as in every micro-batch of a step but its first. preview: as in :class:`Case`.
    """
    model, engine = trainer.model, trainer.engine
    denoiser, trained = model.components.denoiser, model.trainable()
    _name_phases(trainer, meter)
    with meter:
        for tensor in [*model.root.parameters(), *model.root.buffers()] if model.adapter else trained.values():
            meter.follow(tensor, TRAINED)
        for network in filter(None, (denoiser, model.frozen)):
            for tensor in [*network.parameters(), *network.buffers()]:
                meter.follow(tensor, BASE)
        for mean in trainer.keeper.averages.state().get("ema", {}).values():
            meter.follow(mean, AVERAGES)
        for total in engine.exact.sums if engine.exact else ():
            meter.follow(total, GRADIENTS)
        _make_gradients(trained.values())
        engine.apply(0.0)  # makes the optimizer's state
        state = (t for s in engine.optimizer.state.values() for t in s.values() if isinstance(t, Tensor))
        meter.name(state, OPTIMIZER)
        if adds and not engine.exact:
            _make_gradients(trained.values())
        meter.work.clear()
        trainer.train_step(0, trainer.micro_batches(0))
        meter.phase = VALIDATION
        if trainer.validate:
            trainer.validate(model)
        meter.phase = SAMPLING
        if preview:
            _call(model, preview)


@torch.no_grad()
def _call(model: Model, image: tuple[int, int, int]) -> None:
    """As a solver does at each of its steps."""
    with model.evaluating():
        noise, sigma = torch.zeros(1, *image, device=model.device), torch.ones(1, device=model.device)
        model.velocity(noise, sigma, model.encode([""]))


def _make_gradients(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)


def _name_phases(trainer: Trainer, meter: Meter) -> None:
    """Tell ``meter`` what is going on, and which tensors are gradients."""

    def gradients(_: object) -> None:
        parameters = trainer.engine.trainable.values()
        meter.name((p.grad for p in parameters if p.grad is not None), GRADIENTS)

    for place, name, phase in (
        (trainer.objective, "loss", FORWARD),
        (trainer.engine, "backward", BACKWARD),
        (trainer.engine, "finish", NORM),
        (trainer.engine, "apply", UPDATE),
        (trainer.keeper.averages, "update", UPDATE),
    ):
        setattr(place, name, _phase(meter, getattr(place, name), phase, gradients))


def _phase(meter: Meter, call: Callable[..., Any], phase: str, after: Callable[[object], None]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> object:
        if meter.phase != VALIDATION:
            meter.phase = phase
        result = call(*args, **kwargs)
        after(result)
        return result

    return called
