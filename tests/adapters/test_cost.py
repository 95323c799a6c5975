"""Noise-free costs of an adapted linear: floating-point operations and bytes, not seconds."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dedistill.adapters.attach import Adapter
from dedistill.adapters.targets import Resolved
from dedistill.models.quantize import prepare_base, storage_bytes

WIDTH, TOKENS = 256, 512


def operations(factor: int | None) -> float:
    """FLOPs of forward and backward to input and adapter, in units of one base matmul."""
    denoiser = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    prepare_base(denoiser, "int8", [], "cpu")
    if factor:
        Adapter(denoiser, "lokr", [Resolved("0", (WIDTH, WIDTH), factor, None, "0")])
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        denoiser(x).sum().backward()
    return counter.get_total_flops() / (2 * TOKENS * WIDTH * WIDTH)


def test_frozen_base_has_no_weight_gradient():
    assert operations(None) == 2.0


@pytest.mark.parametrize("factor", [4, 8, 16])
def test_lokr_costs_its_factored_form(factor):
    """2 + 3/f for the large factor and 3 f / width for the small one; LyCORIS' default mode costs 5."""
    wanted = 2 + 3 / factor + 3 * factor / WIDTH
    assert operations(factor) == pytest.approx(wanted, rel=0.03)


def test_int8_base_takes_a_byte_per_weight():
    denoiser = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    prepare_base(denoiser, "int8", [], "cpu")
    assert storage_bytes(denoiser) == WIDTH * WIDTH + WIDTH * 4
