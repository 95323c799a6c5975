"""Real training steps on a card that has no numbers (device.py); prints what was found as JSON. Run by test_fake_cuda.py.

steps.py RECIPE '{"name of a run": ["table.key=value", ...], ...}'
"""

import device  # noqa: F401, I001 - before torch

import gc
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import dedistill.models.model as models
from benchmarks import gpu
from dedistill.data.encode import open_data
from dedistill.distributed.world import World
from dedistill.evaluation.validation import Meters, Validator
from dedistill.models import offload
from dedistill.models.vae import Vae
from dedistill.models.registry import get_family
from dedistill.objectives.base import Objective
from dedistill.recipe import Recipe, load_recipe
from dedistill.recipe.resolve import make_plan
from dedistill.runs.directory import RunDirectory
from dedistill.distributed.outside import StopRequests
from dedistill.training.engine import Engine
from dedistill.training.guards import ParameterChangeCheck
from dedistill.training.keeping import Keeper
from dedistill.training.optim import optimizer_tensors
from dedistill.training.preview import Preview
from dedistill.training.trainer import Trainer

aten = torch.ops.aten
ROOT = str(Path(models.__file__).parents[1])


def place() -> str:
    """The innermost line of ours: file and function."""
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(ROOT):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.removeprefix(ROOT + '/')}: {frame.f_code.co_name}" if frame else "elsewhere"


class Watch(TorchDispatchMode):
    """Notes whatever has the host wait for the card: numbers that are read, and copies to the CPU. Makes numbers up."""

    def __init__(self):
        super().__init__()
        self.waits: defaultdict[str, Counter] = defaultdict(Counter)
        self.copies: defaultdict[str, Counter] = defaultdict(Counter)
        self.phase = "start"
        self.numbers = count(1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is aten._local_scalar_dense.default and isinstance(first, FakeTensor):
            if first.device.type == "cuda":
                self.waits[self.phase][place()] += 1
            return first.dtype == torch.bool or (0.5 if first.is_floating_point() else next(self.numbers))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if given and not any(isinstance(t, FakeTensor) for t in given) and "cuda" not in str(kwargs.get("device")):
            with _disable_current_modes():  # the CPU's own work, as with masks of texts
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else first
            way = source.device.type, out.device.type
            waits = not kwargs.get("non_blocking", len(args) > 2 and args[2])
            if way == ("cuda", "cpu"):
                self.waits[self.phase][place()] += waits
            elif way == ("cpu", "cuda") and source.dim():
                self.copies[self.phase][place() if waits else "not waited for"] += 1
        return out


def listed(self):
    """``tolist`` of a tensor without numbers, as a card does it: one read."""
    made = [self.flatten()[0].item()] * self.numel()
    for size in reversed(self.shape[1:]):
        made = [made[i : i + size] for i in range(0, len(made), size)]
    return made


def in_numpy(self):
    assert self.device.type == "cpu"
    return np.ones(self.shape)


asked = Counter()
"""How often attention was asked for, with a mask and without."""


@contextmanager
def card():
    """What a CPU build of torch cannot choose or do by itself on a card."""

    def attention(query, key, value, attn_mask=None, **_):
        asked["plain" if attn_mask is None else "masked"] += 1
        if attn_mask is None:
            return aten._scaled_dot_product_flash_attention(query, key, value)[0]
        assert attn_mask.device == query.device
        bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]

    with ExitStack() as stack:
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        # shards are read where there are numbers, as in the thread that training has for them
        read = in_numbers(Objective._validation_batch)
        stack.enter_context(patch.object(Objective, "_validation_batch", read))
        stack.enter_context(patch.object(nn.Module, "_apply", changed))
        for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
            stack.enter_context(patch.object(torch.cuda, name, lambda place: 0))
        facts = SimpleNamespace(total_memory=2**30, major=9, minor=0)
        stack.enter_context(patch.object(torch.cuda, "get_device_properties", lambda place: facts))
        stack.enter_context(patch.object(FakeTensor, "tolist", listed))
        stack.enter_context(patch.object(FakeTensor, "numpy", in_numpy, create=True))
        stack.enter_context(patch.object(models, "check_started", lambda *_, **__: {}))  # there are no numbers to check
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


class FakeStream:
    """Of a card: notes what was asked of it, and of others, in order."""

    log: ClassVar[list[str]] = []

    def __init__(self, name: object):
        self.name = name if isinstance(name, str) else "copies"

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def streams() -> Iterator[object]:
    """Instead of torch's, which a CPU build does not have."""

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        FakeStream.log.append(f"on {stream.name}")
        yield

    computing = FakeStream("computing")
    yield patch.object(torch.cuda, "Stream", FakeStream)
    yield patch.object(torch.cuda, "stream", on)
    yield patch.object(torch.cuda, "current_stream", lambda place: computing)
    yield patch.object(FakeTensor, "record_stream", lambda tensor, stream: FakeStream.log.append(f"kept for {stream.name}"))
    yield patch.object(offload, "LEAST", 1)  # of a small network, too


def in_numbers(work: Callable) -> Callable:
    """``work`` as a thread of its own does it, to which the card is nothing."""

    def outside(*args):
        with _disable_current_modes():
            return work(*args)

    return outside


def changed(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Instead of ``nn.Module._apply``, which cannot put other tensors in the place of those without numbers."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in list(tensors.items()):
                if tensor is not None and (made := change(tensor)) is not tensor:
                    tensors[name] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return module


def phases(watch: Watch) -> Iterator[object]:
    """What belongs to which part of a run."""
    named = (
        (Trainer, "train_step", "step"),
        (Validator, "__call__", "validation"),
        (Meters, "__call__", "meters"),
        (Preview, "__call__", "preview"),
        (Keeper, "checkpoint", "checkpoint"),
        (Keeper, "snapshot", "snapshot"),
        (ParameterChangeCheck, "check", "check of changes"),
    )
    return (patch.object(owner, name, during(getattr(owner, name), watch, phase)) for owner, name, phase in named)


def during(work: Callable, watch: Watch, phase: str) -> Callable:
    def watched(*args, **kwargs):
        before, watch.phase = watch.phase, phase
        try:
            return work(*args, **kwargs)
        finally:
            watch.phase = before

    return watched


def files(kept: dict[str, set[str]]) -> Iterator[object]:
    """Instead of what writes numbers: notes where the tensors are that it is given, and of what an image is made."""

    def checkpoint(folder, step, tensors, facts, *, keep):
        kept["checkpoint"] |= {t.device.type for group in tensors.values() for t in group.values()}

    def snapshot(folder, step, tensors, header):
        kept["snapshot"] |= {t.device.type for t in tensors.values()}

    def image(made, path, facts=None):
        kept["image"] |= {made.device.type}
        Image.new("RGB", tuple(made.shape[:0:-1])).save(path)

    yield patch("dedistill.training.keeping.save_checkpoint", checkpoint)
    yield patch("dedistill.training.keeping.write_snapshot", snapshot)
    yield patch("dedistill.training.preview.save_png", image)


def fake_codec(mode: FakeTensorMode) -> object:
    """The VAE without numbers, loaded when it is asked for."""
    load = Vae.load

    def loaded(self, place):
        with _disable_current_modes():
            load(self, "cpu")
        self._loaded = changed(self._loaded, lambda tensor: mode.from_tensor(tensor.data).to(place))

    return patch.object(Vae, "load", loaded)


def run(recipe: Recipe) -> dict:
    """Train as it says, and note where everything was."""
    family, watch, kept, tensors = get_family(recipe.model.family), Watch(), defaultdict(set), Counter()
    asked.clear()
    FakeStream.log.clear()
    data = open_data(recipe, "cpu", lambda line: None)
    components = None if recipe.model.new else family.load(recipe.model, seed=0)  # files are read in numbers
    with ExitStack() as stack:
        mode = stack.enter_context(card())
        components = components or family.load(recipe.model, seed=0)
        patches = (
            *phases(watch),
            *files(kept),
            *streams(),
            fake_codec(mode),
            patch.object(family, "load", lambda *_, **__: components),
        )
        for change in (*patches, patch.object(models, "get_family", lambda *_: family)):
            stack.enter_context(change)
        folder, stop = stack.enter_context(RunDirectory(recipe)), stack.enter_context(StopRequests())
        stack.enter_context(watch)
        changed(components.denoiser, lambda t: t if isinstance(t.data, FakeTensor) else mode.from_tensor(t.data))
        model = models.build_model(recipe, "cuda")
        model.text_cache |= data.text_cache
        engine = Engine(recipe, World())
        engine.place(model, "cuda")
        training = Trainer(recipe, make_plan(recipe), model=model, source=data.source, run=folder, engine=engine)
        apply = engine.apply

        def applied(lr):
            tensors.update(f"gradient on {p.grad.device.type}" for p in engine.trainable.values())
            apply(lr)

        with patch.object(engine, "apply", applied):
            steps = len(list(training.fit(stop, SimpleNamespace(log=lambda row, step: None))))
        held = (*components.denoiser.parameters(), *components.denoiser.buffers())
        tensors.update(f"base on {t.device.type}" for t in held)
        tensors.update(f"adapter on {t.device.type}" for t in model.trainable().values())
        state = optimizer_tensors(engine.optimizer, engine.trainable)
        tensors.update(f"optimizer on {t.device.type}" for t in state.values() if t.dim())
    where = {kind: sorted(places) for kind, places in kept.items()}
    size = {"parameters": model.facts["network_parameters"], "checkpointed": model.facts["gradient_checkpointing"]}
    return size | {
        "steps": steps,
        "attention": dict(asked),
        "streams": list(FakeStream.log),
        "waits": watch.waits,
        "copies": watch.copies,
        "tensors": tensors,
        "files": where,
    }


def benchmark() -> dict:
    """Where the benchmark's network is, filled and with an adapter on it."""
    generator = torch.Generator()
    with (
        card(),
        Watch(),
        patch.object(torch, "Generator", lambda _: generator),
        patch.object(gpu, "check_started", lambda *_, **__: None),
    ):
        components = gpu.blank(gpu.TINY)
        gpu.fill(components.denoiser, "cuda")
        setup = gpu.set_up(components, gpu.TINY, "lokr", "cuda")
        held = (*components.denoiser.parameters(), *components.denoiser.buffers(), *setup.model.trainable().values())
        return Counter(t.device.type for t in held)


if __name__ == "__main__":
    gc.freeze()  # no search for garbage need look through what was imported
    file, runs = sys.argv[1:]
    results = {name: run(load_recipe(Path(file), settings)) for name, settings in json.loads(runs).items()}
    print(json.dumps(results | {"benchmark": benchmark()}))
