"""Hashes of tensors: what must change them, and what must not."""

import pytest
import torch

from dedistill.io.safetensors import tensors_checksum, tensors_sha256

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.int64)


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a": (torch.randn(3, 7, generator=g) * 50).to(dtype),
        "b": torch.ones(6, dtype=dtype),
        "c": torch.zeros(0, dtype=dtype),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("digest", [tensors_checksum, tensors_sha256])
def test_every_bit_counts(dtype, digest):
    plain = tensors(dtype)
    known = digest(plain)
    for name in ("a", "b"):
        for byte in range(plain[name].numel() * dtype.itemsize):
            changed = plain | {name: plain[name].clone()}
            changed[name].view(-1).view(torch.uint8)[byte] ^= 1 << (byte % 8)
            assert digest(changed) != known


@pytest.mark.parametrize("digest", [tensors_checksum, tensors_sha256])
def test_bytes_and_names_count_and_nothing_else(digest):
    plain = tensors(torch.float32)
    known = digest(plain)
    assert digest({n: plain[n].t().contiguous().t() for n in ("c", "b", "a")}) == known
    assert digest({"a": plain["a"], "b": plain["b"]}) != known
    assert digest({"a": plain["b"], "b": plain["a"], "c": plain["c"]}) != known
    assert digest(plain | {"b": plain["b"] * 0}) != known, "an even number of equal changes"
    assert digest(plain | {"b": -plain["b"]}) != known
    assert digest({}) == digest({})
