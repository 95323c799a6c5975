"""Safetensors files written tensor by tensor, with one tensor in memory at a time.

The library writes only whole dictionaries. The format: 8 bytes of header length, a JSON header with offsets, then the
data in the header's order (https://huggingface.co/docs/safetensors).
"""

import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dedistill.errors import UserError
from dedistill.io.atomic import WholeFile

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

CHUNK = 1 << 22
"""Bytes of a file looked at in one piece."""
CHECKSUM = "dedistill.sha256"
"""Header entry of a checksummed file: SHA-256 of all its bytes, the digits of this entry taken as zeros."""
_NO_CHECKSUM = "0" * 64

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor name -> (shape, dtype), in the order of writing."""

_Memory = TypeVar("_Memory", bytearray, memoryview)


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest number of ``tensor``, which has some; NaN where any is. Also of dtypes of one byte."""
    low, high = torch.aminmax(tensor.detach() if tensor.itemsize > 1 else tensor.detach().float())
    return float(low), float(high)


def is_finite(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds neither NaN nor Inf."""
    return not tensor.is_floating_point() or not tensor.numel() or all(map(math.isfinite, extremes(tensor)))


class Digest(Protocol):
    """A hash that is fed piece by piece, as hashlib's are."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class TensorFile:
    """A safetensors file of a known layout, complete at ``path`` or not there. Use as a context manager.

    digest: a hash to feed with every byte as it is written. checksum: let the header carry a hash of the file's own bytes.
    Raises UserError naming the path when the disk refuses, and ValueError when what is written is not the layout.
    """

    def __init__(
        self, path: Path, layout: Layout, metadata: dict[str, str], digest: Digest | None = None, *, checksum: bool = False
    ):
        self.path, self._checksum = path, checksum
        self._digest: Digest | None = hashlib.sha256() if checksum else digest
        self._layout, self._names = layout, iter(layout)
        self._name, self._left = "", 0
        header: dict[str, object] = {"__metadata__": metadata | {CHECKSUM: _NO_CHECKSUM} if checksum else metadata}
        offset = 0
        for name, (shape, dtype) in layout.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        self._head = struct.pack("<Q", len(raw)) + raw
        self._checksum_at = self._head.index(f'"{CHECKSUM}": "'.encode()) + len(CHECKSUM) + 5 if checksum else 0
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

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._begin()
                if missing := self._name if self._left else next(self._names, ""):
                    raise ValueError(f"'{missing}' was not written to its end")
                if self._checksum and self._digest:
                    self._file.overwrite(self._checksum_at, self._digest.hexdigest().encode())
        except BaseException as e:
            kind = type(e)
            raise
        finally:
            self._file.__exit__(kind, *rest)


def copy_tensors(source: Path, target: Path) -> None:
    """The file ``source`` at ``target``, its header telling of tensors alone: a hard link where it does and the disk allows it.

    Raises OSError, and SafetensorError for what is no such file.
    """
    with open_safetensors(source) as opened:
        told = opened.metadata()
    if told in (None, _PLAIN):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)
        return
    with open(source, "rb") as file, open(target, "wb") as copy:
        header = json.loads(file.read(*struct.unpack("<Q", file.read(8))))
        raw = json.dumps(header | {"__metadata__": _PLAIN}).encode()
        raw += b" " * (-len(raw) % 8)
        copy.write(struct.pack("<Q", len(raw)) + raw)
        shutil.copyfileobj(file, copy, CHUNK)


_PLAIN = {"format": "pt"}


def open_safetensors(path: Path) -> safe_open:
    """A safetensors file, opened to read single tensors. Raises OSError and SafetensorError alone: torch, which maps the file,
    says what the system refuses, for too many open files or want of memory, as a RuntimeError."""
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as e:
        if found := re.search(r"\((\d+)\)$", str(e)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from e
        raise


class ChecksummedReader:
    """A checksummed file read once, from its first byte to its last, hashed on the way. Use as a context manager.

    layout: in the order of the bytes; metadata: without the entry that is ``checksum``. Raises UserError naming the file for
    one that cannot be read or carries no checksum, and when a whole reading ends at other bytes than were written.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open_safetensors(path) as f:  # checks the header and the length
                self.metadata = dict(sorted((f.metadata() or {}).items()))  # the library's order is another each time
                parts = {name: f.get_slice(name) for name in f.offset_keys()}
                found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        except (OSError, SafetensorError) as e:
            raise UserError(f"'{path}' cannot be read: {e}") from e
        known = {name: dtype for dtype, name in DTYPES.items()}
        if odd := [f"{name} is {dtype}" for name, (_, dtype) in found.items() if dtype not in known]:
            raise UserError(f"'{path}' holds a tensor of a kind that is not supported: {odd[0]}")
        self.layout = {name: (shape, known[dtype]) for name, (shape, dtype) in found.items()}
        self.checksum = self.metadata.pop(CHECKSUM, "")
        if not self.checksum:
            raise UserError(f"'{path}' carries no checksum: another program, or an earlier version, wrote it")

    def __enter__(self) -> "ChecksummedReader":
        try:
            self._file = open(self.path, "rb", buffering=0)
        except OSError as e:
            raise UserError(f"'{self.path}' cannot be read: {e.strerror}") from e
        head = self._take(bytearray(8))
        head += self._take(bytearray(struct.unpack("<Q", head)[0]))
        self._digest = hashlib.sha256(head.replace(self.checksum.encode(), _NO_CHECKSUM.encode(), 1))
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read_into(self, part: Tensor) -> None:
        """Fill ``part``, contiguous and on the CPU, with the numbers that come next."""
        self._digest.update(self._take(part.reshape(-1).view(torch.uint8).numpy().data))

    def finish(self) -> None:
        """To be called when everything has been read."""
        if self._file.read(1) or self._digest.hexdigest() != self.checksum:
            raise UserError(f"'{self.path}' is damaged: its bytes do not match its checksum")

    def _take(self, buffer: _Memory) -> _Memory:
        view, done = memoryview(buffer), 0
        while done < len(view):
            try:
                count = self._file.readinto(view[done:])
            except OSError as e:
                raise UserError(f"'{self.path}' cannot be read: {e.strerror}") from e
            if not count:
                raise UserError(f"'{self.path}' is damaged: it ends too early")
            done += count
        return buffer


def verify_checksum(path: Path) -> None:
    """Read a checksummed file through. Raises UserError naming it unless its bytes are those that were written."""
    with ChecksummedReader(path) as file:
        for shape, dtype in file.layout.values():
            left = math.prod(shape) * dtype.itemsize
            while left:
                part = torch.empty(min(left, CHUNK), dtype=torch.uint8)
                file.read_into(part)
                left -= len(part)
        file.finish()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash over names and bytes of ``tensors``, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0".encode())
        digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
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
