"""Safetensors files written tensor by tensor: whole or not there, with one tensor in memory at a time.

The library writes only whole dictionaries. The format: 8 bytes of header length, a JSON header with offsets, then the
data in the header's order (https://huggingface.co/docs/safetensors).
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from dedistill.errors import UserError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.int64: "I64",
}
"""dtype -> its name in the header."""

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor name -> (shape, dtype), in the order of writing."""


class TensorFile:
    """A safetensors file of a known layout. A context manager: the file takes its name when the block ends well.

    Raises UserError naming file and size when the disk refuses; then nothing is left behind, and a file that had this
    name before is as it was.
    """

    def __init__(self, path: Path, layout: Layout, metadata: dict[str, str]):
        self.path = path
        self._temporary = path.with_name(f"{path.name}.tmp")
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
        self._head, self.bytes = struct.pack("<Q", len(raw)) + raw, 8 + len(raw) + offset

    def __enter__(self) -> "TensorFile":
        try:
            self._file = open(self._temporary, "wb")
        except OSError as e:
            raise self._refused(e) from e
        try:
            self._put(self._head)
        except BaseException as e:
            self.__exit__(type(e))
            raise
        return self

    def write(self, name: str, part: Tensor) -> None:
        """All or the next part of the tensor that the layout has next, in row-major order, on any device."""
        if not self._left:
            self._name = next(self._names, "")
            self._left = math.prod(self._layout[self._name][0]) if self._name else 0
        if name != self._name or part.dtype != self._layout[name][1] or part.numel() > self._left:
            raise ValueError(f"'{name}' {tuple(part.shape)} {part.dtype} is not what the layout has next: '{self._name}'")
        self._left -= part.numel()
        self._put(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                if missing := self._name if self._left else next(self._names, None):
                    raise ValueError(f"'{missing}' was not written to its end")
                try:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    os.replace(self._temporary, self.path)
                except OSError as e:
                    raise self._refused(e) from e
        finally:
            self._close()

    def _close(self) -> None:
        with suppress(OSError):  # a full disk refuses the buffered rest once more; it has been reported
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _put(self, data) -> None:
        try:
            self._file.write(data)
        except OSError as e:
            raise self._refused(e) from e

    def _refused(self, e: OSError) -> UserError:
        return UserError(f"cannot write '{self.path}' ({self.bytes:,} bytes): {e.strerror or e}. Nothing was left behind.")
