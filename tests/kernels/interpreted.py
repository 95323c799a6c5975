"""Our GPU kernels run by Triton's interpreter, against torch. Run by test_kernels.py, in a process that says so to Triton.

Floats of fewer bits are rounded as cards do; the interpreter itself cuts them.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

import dedistill.kernels as kernels
from dedistill.kernels import products
from dedistill.kernels.codes import dequantize
from dedistill.kernels.kronecker import AddMixed, FusedMixed
from dedistill.models.products import FORMATS, encoded, quantize_tokens, scaled_product
from dedistill.training.optim import KahanAdamW


@pytest.mark.parametrize("mixing", [AddMixed, FusedMixed])
@pytest.mark.parametrize(
    ("p", "a", "q", "tokens"),
    [pytest.param(4, 4, 768, 11, marks=pytest.mark.slow), (2, 4, 300, 9), (3, 5, 513, 8), (16, 16, 8, 3)],
)
def test_the_small_factor_is_the_matrix_product_there_and_back(mixing, p, a, q, tokens):
    generator = torch.Generator().manual_seed(p)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    inputs = [t.requires_grad_() for t in (draw(2, tokens, p, q), draw(p, a), draw(2, tokens, a, q))]
    above = draw(2, tokens, q, p).mT  # as gradients of a transposed view come
    base, first, groups = inputs
    found = mixing.apply(*inputs)
    wanted = base + first @ groups
    for ours, truth in zip(
        (found, *torch.autograd.grad(found, inputs, above)), (wanted, *torch.autograd.grad(wanted, inputs, above))
    ):
        assert float((ours - truth).norm() / truth.norm()) < 1e-6


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_code_is_dequantized_to_the_bit(format):
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(37, 19).view(format.codes)
    codes = codes[:, codes[0].float().isfinite()].contiguous()
    scale = torch.rand(37, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dequantize(codes, scale), codes.float() * scale)


ROUNDED = {tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8)}


@pytest.fixture(autouse=True)
def as_cards_round(monkeypatch):
    cut = interpreter._convert_float

    def rounded(numbers, source, target, mode):
        if source != tl.float32 or target not in ROUNDED:
            return cut(numbers, source, target, mode)
        float_type, bits, whole = ROUNDED[target]
        exact = torch.from_numpy(np.ascontiguousarray(numbers).view(np.float32))
        return exact.to(float_type).view(bits).numpy().view(whole)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def test_a_step_of_all_tensors_is_the_step_of_each():
    """Weights may differ in the last bit where one of both fuses a product and a sum; what is kept beside them makes up."""
    shapes = ((64, 48), (33,), (7, 5, 3), (4, 4))

    def optimizer():
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).bfloat16()) for s in shapes]
        return drawn, KahanAdamW(drawn, lr=1e-3, betas=(0.9, 0.99), decay=0.01)

    (by_tensor, one), (at_once, other) = optimizer(), optimizer()
    generator = torch.Generator().manual_seed(2)
    for step in range(12):
        for a, b in zip(by_tensor, at_once):
            a.grad = (torch.randn(a.shape, generator=generator) * 10.0 ** (step % 3)).bfloat16()
            b.grad = a.grad.clone()
        one.step()
        other._step_at_once()
    assert int(one.param_groups[0]["step"]) == int(other.param_groups[0]["step"]) == 12
    for a, b in zip(by_tensor, at_once):
        whole = [(p.float() + o.state[p]["kahan_comp"]).detach() for p, o in ((a, one), (b, other))]
        assert float((whole[0] - whole[1]).norm() / whole[0].norm()) < 1e-4
        for key in ("exp_avg", "exp_avg_sq"):
            pair = [o.state[p][key] for p, o in ((a, one), (b, other))]
            assert float((pair[0] != pair[1]).float().mean()) < 0.01


@pytest.mark.parametrize(("m", "n", "k"), [(33, 40, 72), (130, 136, 64), (1, 8, 200)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("more", [False, True])
def test_products_of_int8_are_those_of_torch(m, n, k, transposed, more):
    generator = torch.Generator().manual_seed(m)
    whole = lambda *shape: torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)  # noqa: E731
    a, b = whole(m, k), whole(n, k).t() if transposed else whole(k, n)
    rows = torch.rand(m, 1, generator=generator)
    columns, bias = (torch.rand(n, generator=generator), torch.rand(n, generator=generator)) if more else (None, None)
    assert torch.equal(
        products.scaled(a, b, rows, columns, bias, torch.float32),
        scaled_product(a, b, rows, columns, bias, torch.float32),
    )


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("n", [64, 200])
def test_tokens_are_quantized_as_torch_does(n, factor, format):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(9, n, generator=generator)
    x[3], x[4, 0] = 0, 100
    by = torch.rand(n, generator=generator) if factor else None
    found = products.quantized(x, by, format.codes, format.largest)
    for ours, wanted in zip(found, quantize_tokens(x, by, format)):
        assert torch.equal(ours.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_stays_so(bad, format):
    x = torch.randn(3, 40)
    x[1, 7] = bad
    ones = encoded(torch.ones(40, 8), format)
    for codes, scale in (products.quantized(x, None, format.codes, format.largest), quantize_tokens(x, None, format)):
        made = scaled_product(codes, ones, scale, None, None, torch.float32)
        assert made.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_each_is_near_torch_on_its_trial(kernel):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert kernels._problem(torch.device("cpu"), kernel) == ""
    assert torch.equal(torch.get_rng_state(), before)
