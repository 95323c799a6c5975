"""cuDNN's attention without a GPU: its fault, imitated, is seen, and mended by gradients that lie as outputs do."""

import json

import pytest
import torch
from torch.nn import functional as F

import dedistill.kernels as kernels
from dedistill.errors import UserError
from dedistill.kernels import attention as ours
from dedistill.kernels.attention import AsItLies, SDPBackend, attention, distance, use
from dedistill.recipe import load_recipe
from dedistill.train import main

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "grad",
    [
        torch.randn(2, 5, 3, 4).transpose(1, 2),
        torch.randn(2, 3, 5, 4),
        torch.randn(2, 5, 30)[..., 6:18].unflatten(2, (3, 4)).transpose(1, 2),
        torch.tensor(1.0).expand(2, 3, 5, 4),
    ],
    ids=["as the output", "the other way", "a slice", "one number"],
)
def test_a_gradient_lies_as_the_output_does(grad):
    seen = []
    x = torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_()
    between = x * 1
    between.register_hook(lambda g: seen.append(g))
    assert torch.equal(torch.autograd.grad(AsItLies.apply(between), x, grad)[0], grad)
    assert seen[0].stride() == x.stride()


class Misreads(torch.autograd.Function):
    """torch's attention with the fault of cuDNN's: the gradient's memory is read as if it lay as the output does."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.inputs, out = inputs, F.scaled_dot_product_attention(*inputs)
        ctx.strides = out.stride()
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs = [t.detach().requires_grad_() for t in ctx.inputs]
        with torch.enable_grad():
            out = F.scaled_dot_product_attention(*inputs)
        memory = torch.cat([grad.as_strided((grad.untyped_storage().nbytes() // grad.element_size(),), (1,), 0)] * 2)
        return torch.autograd.grad(out, inputs, memory.as_strided(grad.shape, ctx.strides))


def test_the_proof_sees_the_fault_and_that_it_is_mended(monkeypatch):
    def faulty(*inputs):  # in half precision, as cuDNN's
        return F.scaled_dot_product_attention(*inputs) if inputs[0].dtype == torch.float32 else Misreads.apply(*inputs)

    torch.manual_seed(0)
    monkeypatch.setattr(ours, "SHAPES", ours.SHAPES[1:])
    monkeypatch.setattr(ours, "_torchs", faulty)
    assert distance(CPU, SDPBackend.FLASH_ATTENTION) < kernels.FAR
    monkeypatch.setattr(AsItLies, "apply", lambda x: x)
    assert distance(CPU, SDPBackend.FLASH_ATTENTION) > 1


def test_where_it_cannot_be_proven_torch_is_left_alone(monkeypatch, capsys):
    before = F.scaled_dot_product_attention
    assert use("cpu") == "torch" and F.scaled_dot_product_attention is before and not capsys.readouterr().err
    problem = kernels._problem(CPU, "attention")  # a machine without cuDNN
    assert problem.startswith("fails with RuntimeError")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_proven_it_gives_what_torch_gives(monkeypatch, dtype):
    """With a mask, in float32, and for keys of another length: whatever cuDNN does not take goes to another kernel."""
    monkeypatch.setattr(kernels, "proven", {(CPU, "attention")})
    asked = []
    monkeypatch.setattr(AsItLies, "apply", lambda x: asked.append(1) or x)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 1, 7) > 0.3
    for how in ({}, {"attn_mask": mask}, {"scale": 0.1}):
        assert torch.equal(attention(q, k, v, **how), F.scaled_dot_product_attention(q, k, v, **how))
    assert len(asked) == (2 if dtype == torch.bfloat16 else 0)


def test_compiled_it_is_one_graph(monkeypatch):
    monkeypatch.setattr(kernels, "proven", {(CPU, "attention")})
    inputs = [torch.randn(1, 2, n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (5, 7, 7)]
    out = torch.compile(attention, fullgraph=True, backend="eager")(*inputs)
    assert torch.equal(out, F.scaled_dot_product_attention(*inputs)) and out.grad_fn


def test_plan_says_whose_attention_it_is(adapter_recipe, tmp_path):
    settings = ["train.attention=cudnn", f"run.out={tmp_path / 'run'}", "train.steps=1", "snapshot.every=0"]
    assert main([str(adapter_recipe), *(word for s in settings for word in ("--set", s))]) == 0
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["effects"]["attention"] == "torch"


def test_exact_runs_refuse_it(adapter_recipe):
    with pytest.raises(UserError, match=r"train\.attention: cannot keep what exact = true promises"):
        load_recipe(adapter_recipe, ["train.attention=cudnn", "train.exact=true"])
