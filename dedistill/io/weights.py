"""Which safetensors files of a folder are its network's weights, and what a file that is none really is."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dedistill.errors import UserError
from dedistill.io.json_files import read_object
from dedistill.io.safetensors import DTYPES, open_safetensors

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".onnx", ".gguf")
_KINDS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS: fetch the file itself (git lfs pull)"),
    (b"GGUF", "it is a GGUF file, weights quantized for other programs: take the model as safetensors"),
    (b"\x80", "it is a pickle, which is not opened: take the model as safetensors"),
    (b"PK\x03\x04", "it is a pickle or a zip file, which is not opened: take the model as safetensors"),
    (b"<", "it is a web page: the download failed, or needs a login"),
)


def open_weights(file: Path, source: str = "") -> safe_open:
    """A safetensors file, opened to read single tensors. source: how the message of an error begins, e.g. a recipe's key.

    Raises UserError that names the file and, where its first bytes tell, what it is.
    """
    start = f"{source}: " if source else ""
    try:
        return open_safetensors(file)
    except (OSError, SafetensorError) as e:
        reason = str(e)
        try:
            with open(file, "rb") as f:
                head = f.read(64)
            reason = next((kind for sign, kind in _KINDS if head.startswith(sign)), "it is empty" if not head else reason)
        except OSError as refused:
            reason = refused.strerror or reason
        raise UserError(f"{start}'{file}' cannot be read as safetensors: {reason}") from e


def refuse_other_kinds(folder: Path, source: str = "") -> None:
    """Raises UserError where weights in ``folder`` are all of another kind, such as pickles, which are not opened."""
    files = sorted(folder.glob("*"))
    for file in () if any(file.suffix == ".safetensors" for file in files) else files:
        if file.suffix in _OTHERS:
            open_weights(file, source)


def empty_tensor(opened: safe_open, name: str) -> Tensor:
    """One of a file's tensors on the meta device, by the header alone."""
    part = opened.get_slice(name)
    known = {code: dtype for dtype, code in DTYPES.items()}
    # of other kinds, such as fp8, only whether they are floating point is looked at
    dtype = known.get(part.get_dtype(), torch.float32 if part.get_dtype().startswith("F") else torch.uint8)
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")


def some_rows(opened: safe_open) -> Iterator[tuple[str, Tensor]]:
    """Names of a file's tensors, each with its first, middle and last row: a look that takes a second whatever the size.

    What was not downloaded to its end, or is NaN throughout, is seen by it; single numbers are not.
    """
    for name in opened.keys():  # noqa: SIM118
        part = opened.get_slice(name)
        shape = part.get_shape()
        if shape and shape[0] > 3:
            yield name, torch.cat([part[i : i + 1] for i in (0, shape[0] // 2, shape[0] - 1)])
        else:
            yield name, opened.get_tensor(name)


def count_numbers(file: Path) -> int:
    """How many numbers a safetensors file holds, by its header; 0 where that cannot be read, which its reader will tell."""
    try:
        with safe_open(file, framework="numpy") as f:
            return sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return 0


def weight_files(folder: Path, source: str = "") -> list[Path]:
    """The weights in ``folder``: what its index names, else its only file, else a whole set of shards; never a mixture.

    Raises UserError when a file is missing, when others lie beside of which nothing says whether they count (variants in
    another precision, averages, shards of an earlier download), and where all are of another kind, such as pickles. None at
    all is an empty list.
    """
    start = f"{source}: " if source else ""
    found = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    refuse_other_kinds(folder, source)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise UserError(f"{start}'{folder}' has {len(indices)} indices ({', '.join(i.name for i in indices)}); leave one")
    if indices:
        where = read_object(indices[0], source).get("weight_map")
        named = set(where.values()) if isinstance(where, dict) and all(isinstance(f, str) for f in where.values()) else set()
        if not named:
            raise UserError(f"{start}'{indices[0]}' names no weights; fetch the folder again")
        if missing := sorted(named - found.keys()):
            raise UserError(f"{start}'{folder}' lacks {missing[0]!r}, which {indices[0].name} names; fetch it again")
        chosen, rule = named, f"{indices[0].name} does not name"
    else:
        shards = [match for name in found if (match := _SHARD.fullmatch(name))]
        sets = {match.group(1, 3) for match in shards}
        if len(sets) == 1 and len(shards) == len(found):
            ((stem, count),) = sets
            for i in range(1, int(count) + 1):
                if (name := f"{stem}-{i:05d}-of-{count}.safetensors") not in found:
                    raise UserError(f"{start}'{folder}' lacks '{name}', one of its {int(count)} shards; fetch it again")
        if len(found) <= 1 or (len(sets) == 1 and len(shards) == len(found)):
            return list(found.values())
        first = min(found, key=lambda name: (len(name), name))
        chosen, rule = {first}, f"lie beside {first}"
    if others := sorted(found.keys() - chosen):
        listed = ", ".join(others[:3]) + (" ..." if len(others) > 3 else "")
        raise UserError(
            f"{start}'{folder}' holds weights that {rule}: {listed}. Which of them count is not known; move away those that "
            "do not"
        )
    return [found[name] for name in sorted(chosen)]
