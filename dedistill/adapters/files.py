"""Adapter files: safetensors with a header that says what they belong to."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dedistill.errors import UserError


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its header. Raises UserError naming the file when it is unreadable."""
    try:
        with safe_open(path, framework="pt") as f:
            # clone: mapped tensors are unaligned, which crashes some int8 kernels
            return {name: f.get_tensor(name).clone() for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise UserError(f"'{path}' cannot be read as safetensors: {e}") from e
