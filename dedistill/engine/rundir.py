"""The run directory: one run, one recipe, one process at a time."""

import fcntl
import json
from pathlib import Path
from typing import Any

from dedistill.engine.checkpoint import list_checkpoints, sweep_temporaries
from dedistill.errors import UserError
from dedistill.files import replace_file
from dedistill.recipe import Recipe, to_toml

FREE_TO_CHANGE = ("run.name", "run.out", "run.resume", "checkpoint.", "snapshot.", "validate.", "log.", "sample.")
"""Keys and tables that alter what is written but not what is trained; a continued run may change them."""


class RunDirectory:
    """Opened, locked and checked: ``out`` belongs to this recipe or is new. Use as a context manager."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.path = Path(recipe.run.out)
        self.metrics = self.path / "metrics.jsonl"
        self.timings = self.path / "timings.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / "snapshots"
        self.model = self.path / "model"

    def __enter__(self) -> "RunDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")
        except OSError as e:
            raise UserError(f"{self.recipe.where('run.out')}: '{self.path}' cannot be written: {e.strerror}") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self._lock.close()
            raise UserError(f"another process is running in '{self.path}'; wait for it, or choose another run.out") from e
        try:
            self._claim()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.close()

    def _claim(self) -> None:
        """Refuse the directory of another recipe; otherwise write this one's resolved recipe into it."""
        known = self.path / "recipe.json"
        if known.exists():
            sweep_temporaries(self.path)
            try:
                before = json.loads(known.read_text())
            except ValueError as e:
                raise UserError(f"'{known}' is damaged; restore it, or move '{self.path}' away to start over") from e
            if self.recipe.run.resume == "never":
                raise UserError(f"'{self.path}' already holds a run and run.resume = 'never'; choose another run.out")
            if differing := _differences(before, self.recipe.resolved()):
                raise UserError(
                    f"'{self.path}' holds a run of another recipe. It differs in:\n"
                    + "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, old, new in differing)
                    + "\nChange it back, or set another run.out."
                )
        elif list_checkpoints(self.checkpoints):
            raise UserError(f"'{self.path}' holds checkpoints but no recipe.json; choose another run.out")
        replace_file(known, json.dumps(self.recipe.resolved(), indent=1).encode())
        replace_file(self.path / "recipe.toml", to_toml(self.recipe).encode())


def _flat(table: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(table, dict):
        return {k: v for name, value in table.items() for k, v in _flat(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): table}


def _differences(before: dict, now: dict) -> list[tuple[str, Any, Any]]:
    old, new = _flat(before), _flat(now)
    free = FREE_TO_CHANGE
    if now["train"]["schedule"] == "constant":
        free += ("train.steps",)  # a longer constant run is the same run; a decay would be another one
    keys = [k for k in dict.fromkeys([*old, *new]) if not k.startswith(free)]
    return [(k, old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)]
