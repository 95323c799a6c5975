"""Adapter files: safetensors with a header that says what they belong to."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dedistill.errors import UserError
from dedistill.tensorfile import SEAL, check_seal


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its header, without the seal of a sealed one, which is checked.

    Raises UserError naming the file when it is unreadable, or when a sealed one has changed since it was written.
    """
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            if header.pop(SEAL, None):
                check_seal(path)
            # clone: mapped tensors are unaligned, which crashes some int8 kernels
            return {name: f.get_tensor(name).clone() for name in f.keys()}, header  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise UserError(f"'{path}' cannot be read as safetensors: {e}") from e
