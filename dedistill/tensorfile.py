"""Safetensors files written tensor by tensor, with one tensor in memory at a time.

The library writes only whole dictionaries. The format: 8 bytes of header length, a JSON header with offsets, then the
data in the header's order (https://huggingface.co/docs/safetensors).
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dedistill.files import WholeFile

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
}
"""dtype -> its name in the header."""

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor name -> (shape, dtype), in the order of writing."""


class TensorFile:
    """A safetensors file of a known layout, complete at ``path`` or not there. Use as a context manager.

    digest: a hash to feed with every byte as it is written. Raises UserError naming the path when the disk refuses, and
    ValueError when what is written is not the layout.
    """

    def __init__(self, path: Path, layout: Layout, metadata: dict[str, str], digest: Any = None):
        self.path, self._digest = path, digest
        self._layout, self._names = layout, iter(layout)
        self._name, self._left = "", 0
        header: dict = {"__metadata__": metadata}
        offset = 0
        for name, (shape, dtype) in layout.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        self._head = struct.pack("<Q", len(raw)) + raw
        self._file = WholeFile(path)

    def __enter__(self) -> "TensorFile":
        self._file.__enter__()
        return self

    def write(self, name: str, part: Tensor) -> None:
        """All or the next part of the tensor that the layout has next, in row-major order, on any device."""
        if not self._left:
            self._name = next(self._names, "")
            self._left = math.prod(self._layout[self._name][0]) if self._name else 0
        if name != self._name or part.dtype != self._layout[name][1] or part.numel() > self._left:
            raise ValueError(f"'{name}' {tuple(part.shape)} {part.dtype} is not what the layout has next: '{self._name}'")
        self._left -= part.numel()
        self._begin()
        self._put(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _begin(self) -> None:
        if self._head:
            self._put(self._head)
            self._head = b""

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        if self._digest:
            self._digest.update(data)

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        try:
            if kind is None:
                self._begin()
                if missing := self._name if self._left else next(self._names, ""):
                    raise ValueError(f"'{missing}' was not written to its end")
        except BaseException as e:
            kind = type(e)
            raise
        finally:
            self._file.__exit__(kind, *rest)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash over names and bytes of ``tensors``, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0".encode())
        digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Like :func:`tensors_sha256`, but computed where the tensors are, at the speed of memory; no defence against intent.

    From exclusive-or and sum of each tensor's words: the former misses a change of an even number of equal words.
    """
    parts = [part for name in sorted(tensors) if tensors[name].numel() for part in _digests(tensors[name].detach())]
    numbers = torch.stack(parts).tolist() if parts else []
    shapes = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)]
    return hashlib.sha256(json.dumps([shapes, numbers]).encode()).hexdigest()


def _digests(tensor: Tensor) -> tuple[Tensor, Tensor]:
    bits = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = (torch.nn.functional.pad(bits, (0, -len(bits) % 8)) if len(bits) % 8 else bits).view(torch.int64)
    return torch.hash_tensor(words).view(torch.int64), words.sum()
