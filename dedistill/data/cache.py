"""Encoded pictures and captions on disk: tensors of any length under content keys, in shards that are whole or absent.

A store is a folder of safetensors shards, each named by its own hash, and ``inputs.json``, which says what the
entries depend on beside their key. Nothing is ever changed in place, so a killed preparation goes on where it was.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dedistill.errors import UserError
from dedistill.files import file_sha256, replace_file, replace_json

OPEN_SHARDS = 256


class Store:
    """Entries {key: {part: tensor}} in ``folder``. Raises UserError when the folder was made from other ``inputs``."""

    def __init__(self, folder: Path, inputs: dict[str, object]):
        self.folder, self.inputs = folder, inputs
        self._check_inputs()
        self._shard_of: dict[str, Path] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            self._shard_of |= dict.fromkeys(_keys(shard), shard)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(_open_shard)

    def _check_inputs(self) -> None:
        file = self.folder / "inputs.json"
        try:
            before = json.loads(file.read_text()) if file.exists() else self.inputs
        except ValueError as e:
            raise UserError(f"data.cache: '{file}' is damaged; delete '{self.folder}' to encode again") from e
        if differing := [k for k in sorted({*before, *self.inputs}) if before.get(k) != self.inputs.get(k)]:
            listed = "; ".join(f"{k}: {before.get(k)!r} there, {self.inputs.get(k)!r} here" for k in differing)
            raise UserError(
                f"data.cache: '{self.folder}' is stale, it was made with other inputs ({listed}). "
                "Delete it to encode again, or set another data.cache"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of

    def __len__(self) -> int:
        return len(self._shard_of)

    def write(self, entries: dict[str, dict[str, Tensor]]) -> None:
        """Add one shard of new entries; it appears whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_json(self.folder / "inputs.json", self.inputs)
        flat = {f"{key}.{part}": t.contiguous() for key, parts in entries.items() for part, t in parts.items()}
        data = save(flat, metadata={"format": "pt"})
        shard = self.folder / f"{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
        replace_file(shard, data)
        self._shard_of |= dict.fromkeys(entries, shard)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of one entry by part; reads these bytes only. Raises KeyError for a key that is not there."""
        names, shard = self._open(self._shard_of[key])
        return {name.partition(".")[2]: shard.get_tensor(name).clone() for name in names[key]}

    def damaged(self) -> list[Path]:
        """Shards whose bytes are not those that were written. Reads everything."""
        shards = sorted(self.folder.glob("*.safetensors"))
        return [shard for shard in shards if not file_sha256(shard).startswith(shard.stem)]

    def bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.folder.glob("*.safetensors"))


def _open_shard(shard: Path):
    opened = safe_open(shard, framework="pt")
    names: dict[str, list[str]] = {}
    for name in opened.keys():  # noqa: SIM118
        names.setdefault(name.partition(".")[0], []).append(name)
    return names, opened


def _keys(shard: Path) -> set[str]:
    try:
        with safe_open(shard, framework="pt") as f:
            return {name.partition(".")[0] for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise UserError(f"data.cache: shard '{shard}' is damaged ({e}); delete this file, it is encoded again") from e
