"""Our GPU kernels without a GPU: run by Triton's interpreter, built for real cards, and refused when wrong."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dedistill.kernels as kernels

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="torch for CPUs comes without it; the extra 'dev' has it")


@needs_triton
def test_interpreted_they_give_what_torch_gives():
    """In a process of its own: what has imported Triton before cannot be interpreted any more."""
    file, env = Path(__file__).with_name("interpreted.py"), os.environ | {"TRITON_INTERPRET": "1"}
    bare = ["--noconftest", "-p", "no:hypothesispytest", "-p", "no:xdist"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *bare, str(file)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 30


BUILD = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dedistill.kernels import codes, kahan, kronecker, products

bf16 = lambda *names: dict.fromkeys(names, "*bf16")
whole = lambda *names: dict.fromkeys(names, "i32")
number = lambda *names: dict.fromkeys(names, "fp32")
sides = {"P": 4, "A": 4}
scales = {"a": "*i8", "b": "*i8", "rows": "*fp32", "columns": "*fp32", **bf16("bias", "out"), **whole("m", "n")}
tile = {"K": 3072, "ROWS": products.ROWS, "COLUMNS": products.COLUMNS, "DEPTH": products.DEPTH}
kernels = [
    (codes._dequantize, {"codes": "*i8", **bf16("scale", "out"), **whole("numel", "columns")}, {"BLOCK": codes.BLOCK}),
    (kronecker._forward, {**bf16("base", "first", "groups", "out"), **whole("q")}, sides | {"COLUMNS": 512}),
    (kronecker._backward, {**bf16("grad", "first", "groups", "of_groups"), "parts": "*fp32", **whole("rows", "q")},
     sides | {"ROWS": kronecker.ROWS, "COLUMNS": kronecker.COLUMNS}),
    (products._quantize, {**bf16("x"), "factor": "*fp32", "codes": "*i8", "scale": "*fp32", **whole("n"), **number("largest")},
     {"FACTOR": True, "WHOLE": True, "BLOCK": 16384}),
    *((products._product, scales | whole("stride"), tile | {"SCALED": kind, "BIASED": kind}) for kind in (True, False)),
    (products._transpose, {"matrix": "*i8", "out": "*i8", **whole("rows", "columns", "stride")}, {"SIDE": products.SIDE}),
    (kahan._step, {"table": "*i64", "which": "*i32", "block": "*i32", "numel": "*i64", **whole("count"),
     **number("lr", "fresh", "keep_square", "fresh_square", "eps", "decay")}, {"BLOCK": kahan.BLOCK}),
]
fp8 = [
    (products._quantize, {**bf16("x"), "factor": "*fp32", "codes": "*fp8e4nv", "scale": "*fp32", **whole("n"),
     **number("largest")}, {"FACTOR": True, "WHOLE": False, "BLOCK": 16384}),
    (codes._dequantize, {"codes": "*fp8e4nv", **bf16("scale", "out"), **whole("numel", "columns")}, {"BLOCK": codes.BLOCK}),
]
for card in (80, 89, 90, 120):
    for kernel, types, constants in kernels + (fp8 if card >= 89 else []):
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        aligned = [n for n, kind in types.items() if kind[0] == "*" or n in ("n", "stride", "columns")]
        attrs = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}  # as at widths of 16 and more
        source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), places, attrs)
        made = compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": 8})
        print(card, kernel.fn.__name__, len(made.asm["cubin"]), made.metadata.shared)
"""


@needs_triton
def test_they_build_for_real_cards():
    """A100, RTX 40, H100 and RTX 50, by the compiler that Triton brings; no GPU is needed for that."""
    done = subprocess.run([sys.executable, "-c", BUILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [row.split() for row in done.stdout.splitlines()]
    assert [int(size) > 1000 for _, _, size, _ in rows] == [True] * (8 + 3 * 10)
    room = {"80": 163, "89": 99, "90": 227, "120": 99}
    assert all(int(shared) <= room[card] * 1024 for card, _, _, shared in rows), "of shared memory"


def test_a_kernel_that_is_wrong_or_cannot_be_made_is_not_used(monkeypatch):
    def broken(device):
        raise RuntimeError("ptxas\n fatal")

    for distance, problem in (
        (lambda device: 0.5, "is 0.5 from torch's result"),
        (broken, "fails with RuntimeError: ptxas fatal"),
    ):
        monkeypatch.setattr(kernels, "import_module", lambda name, d=distance: SimpleNamespace(distance=d))
        assert kernels._problem(torch.device("cpu"), "codes") == problem
    monkeypatch.setattr(kernels, "import_module", lambda name: SimpleNamespace(distance=lambda device: float("nan")))
    assert kernels._problem(torch.device("cpu"), "codes") == "is nan from torch's result"


def test_nothing_is_tried_without_a_gpu(monkeypatch):
    monkeypatch.setattr(kernels, "import_module", None)
    kernels.prove("cpu")
    assert (torch.device("cpu"), "codes") not in kernels.proven
