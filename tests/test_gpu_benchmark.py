"""The GPU benchmark cannot be timed here; its counts can be checked, and a small run of it must work."""

import json
import math
from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_recipes import adapter_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dedistill.adapters.attach import Adapter
from dedistill.adapters.targets import adaptable, count_parameters, resolve_targets
from dedistill.models.conditioning import Conditioning
from dedistill.models.pixel_flux.family import PixelFlux
from dedistill.models.quantize import QuantizedLinear, linear_names, prepare_base

IMAGE, TEXT, BATCH = 32, 5, 2


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath)


def network():
    """Two double and three single blocks with 32 image tokens."""
    sizes = {"layers": 2, "single_layers": 3, "heads": 2, "head_dim": 16, "rope_axes": [4, 6, 6]}
    new = SimpleNamespace(channels=1, height=16, width=32, patch=4, text_dim=16, pooled_dim=16, **sizes)
    return PixelFlux().build(new)


def counted(components, call, *, backward: bool) -> int:
    """Operations of one call, as torch counts the matmuls that run; every input wants a gradient."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()  # noqa: E731
    text = Conditioning.of(draw(BATCH, TEXT, 16), torch.ones(BATCH, TEXT, dtype=torch.bool), pooled=draw(BATCH, 16))
    noisy = draw(BATCH, 1, 16, 32)
    # the plain kernel spells attention out as matmuls, which are counted one by one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = PixelFlux().velocity(components, call, noisy, torch.full((BATCH,), 0.5), text)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def test_forward_is_exactly_what_torch_counts():
    """Linears and attention of every kind of block."""
    from benchmarks.flops import Tokens, forward_flops

    components = network()
    assert counted(components, components.denoiser, backward=False) == BATCH * sum(
        forward_flops(components.denoiser, Tokens(IMAGE, TEXT))
    )


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_training_step_on_a_frozen_base_is_2_l_and_3_a(quant):
    """Exact, but for the linears of sigma, whose inputs want no gradient."""
    from benchmarks.flops import Tokens, model_flops

    components = network()
    prepare_base(components.denoiser, quant, [], "cpu")
    embedder = components.denoiser.time_text_embed.timestep_embedder
    sigma = 2 * (embedder.linear_1.weight.numel() + embedder.linear_2.weight.numel())
    assert counted(components, components.denoiser, backward=True) == BATCH * (
        model_flops(components.denoiser, Tokens(IMAGE, TEXT)) - sigma
    )


FORMS = [
    ("lokr", {"preset": "blocks", "factor": 4}),
    ("lokr", {"preset": "libreflux", "factor": 2}),
    ("lokr", {"preset": "blocks", "factor": -1, "rank": 1}),
    ("lora", {"preset": "blocks", "rank": 4}),
]


@pytest.mark.parametrize(("kind", "target"), FORMS)
def test_an_adapter_adds_its_factors_three_times(kind, target):
    """Forward, gradient of the input, gradient of its own."""
    from benchmarks.flops import Tokens, adapter_flops

    components = network()
    prepare_base(components.denoiser, "int8", [], "cpu")
    before = counted(components, components.denoiser, backward=True)
    table = adapter_table(kind, target)
    presets = PixelFlux().presets(components.denoiser)
    targets = resolve_targets(table, adaptable(components.denoiser), presets)
    Adapter(components.denoiser, kind, targets)
    added = counted(components, components.denoiser, backward=True) - before
    assert added == BATCH * adapter_flops(targets, kind, Tokens(IMAGE, TEXT))


@pytest.mark.parametrize(("pixels", "linears", "attention", "model"), [(512, 14.3, 0.85, 31.1), (1024, 53.9, 12.2, 144.5)])
def test_full_size_is_the_known_table(pixels, linears, attention, model):
    """TFLOP of FLUX.1 at 512 and 1024 px with 80 text tokens."""
    from benchmarks.flops import Tokens, forward_flops, model_flops
    from benchmarks.gpu import FULL, blank

    denoiser, tokens = blank(FULL).denoiser, Tokens((pixels // 16) ** 2, 80)
    found = [*forward_flops(denoiser, tokens), model_flops(denoiser, tokens)]
    assert [f / 1e12 for f in found] == pytest.approx([linears, attention, model], rel=5e-3)


KEYS = {"step_ms", "sample_ms", "useful_tflops", "useful_utilization", "mfu", "loss"}


def test_the_whole_benchmark_runs_small(tmp_path, capsys):
    """Every cell of the table, the JSON and the preview, on the code that a GPU runs at full size."""
    from benchmarks.gpu import main

    out = tmp_path / "tiny.json"
    assert main(["--tiny", "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    cells = [(r["adapter"], r["pixels"], r["batch"], r["checkpointing"]) for r in found["rows"]]
    assert cells == list(product(("lokr", "lora"), (32, 64), (1, 4), (False, True)))
    for row in found["rows"]:
        assert row["status"] == "ok" and row["steps_timed"] == 1 and row["peak_gb"] is None
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in KEYS)
        assert row["useful_utilization"] > row["mfu"]
    assert capsys.readouterr().out.count(" ms/step") == 16
    pixels = np.asarray(Image.open(out.with_suffix(".png")))
    assert pixels.shape == (4, 4, 3) and len(np.unique(pixels)) > 10


def test_weights_are_random_and_on_the_device():
    """Never zeros: int8 codes, scales, biases and norms, and the adapter too."""
    from benchmarks.gpu import TINY, blank, fill, set_up

    components = blank(TINY)
    fill(components.denoiser, "cpu")
    assert not any(t.is_meta for t in (*components.denoiser.parameters(), *components.denoiser.buffers()))
    assert len(linear_names(components.denoiser)) == sum(isinstance(m, QuantizedLinear) for m in components.denoiser.modules())
    for name, parameter in components.denoiser.named_parameters():
        assert (parameter.float() != 0).float().mean() > 0.95, name
        assert not parameter.requires_grad
    setup = set_up(components, TINY, "lokr", "cpu")
    assert all((p != 0).all() and p.dtype == torch.bfloat16 for p in setup.model.trainable().values())
    assert count_parameters(setup.model.targets, "lokr") == sum(p.numel() for p in setup.model.trainable().values())


def test_a_cell_without_room_or_time_says_so(tmp_path, monkeypatch):
    """One cell that does not fit must not cost the others; nor may the whole run last longer than it may."""
    from benchmarks import gpu

    step = gpu.Setup.step

    def hungry(self, pixels, batch, generator):
        if (pixels, batch) == (64, 4):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, pixels, batch, generator)

    monkeypatch.setattr(gpu.Setup, "step", hungry)
    monkeypatch.setattr(gpu, "ADAPTERS", {"lokr": gpu.ADAPTERS["lokr"]})
    for seconds, wanted in ((1000, {"ok": 6, "out of memory": 2}), (0, {"skipped": 8})):
        out = tmp_path / f"{seconds}.json"
        assert gpu.main(["--tiny", "--device", "cpu", "--out", str(out), "--seconds", str(seconds)]) == 0
        assert Counter(row["status"] for row in json.loads(out.read_text())["rows"]) == wanted


def test_without_a_gpu_it_says_how_to_run_it(capsys, monkeypatch):
    from benchmarks.gpu import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    assert "--tiny --device cpu" in capsys.readouterr().err
