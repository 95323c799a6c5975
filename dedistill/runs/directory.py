"""The run directory: one run, one recipe, one process at a time, and the bytes that it was made from."""

import json
import os
from pathlib import Path
from typing import Any, TextIO

from dedistill.distributed.outside import FILES, is_request
from dedistill.errors import UserError, amount
from dedistill.io import ownership
from dedistill.io.atomic import checksummed, read_checksummed, replace_file
from dedistill.io.json_files import read_object
from dedistill.recipe import RESOLVED, Recipe, load_recipe, to_toml
from dedistill.recipe.resolve import as_it_was_meant
from dedistill.runs.checkpoint import sweep_temporaries
from dedistill.runs.inputs import Files, Fingerprint, changed_files, fingerprint, input_files
from dedistill.runs.model import MARK

FREE_TO_CHANGE = (
    *("run.name", "run.out", "run.resume", "run.stuck_after", "checkpoint.", "snapshot.every", "validate.", "meters.", "log."),
    *("sample.", "preview.", "data.cache", "train.micro_batch", "train.gradient_checkpointing", "train.offload_activations"),
    *("train.compile", "train.attention", "base.swap"),
)
"""Keys and tables that alter what is written, or how much memory a step takes, but not what is trained (to rounding);
a continued run may change them."""
_WRITTEN = ("recipe.json", "plan.json", "inputs.json", "metrics.jsonl", "timings.jsonl")

SAMPLE = "base.sample"
OTHER_NUMBERS = (
    "the base's numbers, as loaded, are not those that the run was started with, though its files (of a hub id: its commit) "
    "are: another device or version of torch rounds them otherwise, or what the hub's cache holds has changed"
)


class RunDirectory:
    """Opened, locked and checked: ``out`` belongs to this recipe or is new. Use as a context manager."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.notes: list[str] = []
        """Defaults that the run goes on with, of keys free to change, which are not those that it was started with."""
        self.path = Path(recipe.run.out)
        self.metrics = self.path / "metrics.jsonl"
        self.timings = self.path / "timings.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.snapshots = self.path / "snapshots"
        self.previews = self.path / "previews"
        self.model = self.path / "model"
        self._lock: TextIO | None = None

    def check(self) -> None:
        """Raises UserError for a directory that ``__enter__`` would refuse for what is in it. Writes nothing."""
        self._refuse_foreign()
        if self.used:
            self._compare(self.path / "recipe.json")

    def __enter__(self) -> "RunDirectory":
        self._refuse_foreign()
        try:
            ownership.make(self.path)
            self._lock = ownership.hold(self.path, "run.out")
        except OSError as e:
            raise UserError(f"{self.recipe.where('run.out')}: '{self.path}' cannot be written: {e.strerror}") from e
        try:
            self._claim()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock:
            self._lock.close()

    def require(self) -> None:
        """Raises UserError once the folder that was opened is no longer here: what is written next would be torn from it."""
        try:
            here = self._lock is None or os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / ".lock"))
        except (FileNotFoundError, NotADirectoryError):
            here = False
        if not here:
            raise UserError(f"'{self.path}' was moved or removed while the run went on; put it back, and start again")

    @property
    def used(self) -> bool:
        """Whether a run has left results here. A start that failed before its first step leaves none, and binds nothing."""
        written = self.metrics.is_file() and self.metrics.stat().st_size > 0
        kept = [p for folder in (self.checkpoints, self.snapshots) for p in folder.glob("step-*")]
        return written or bool(kept) or self.model.exists()

    def _claim(self) -> None:
        """Refuse the directory of another run; otherwise mark it as this one's."""
        if self.used:
            self._compare(self.path / "recipe.json")
        sweep_temporaries(self.path)
        ownership.mark(self.path, "run")

    def _write_recipe(self, whole: bytes) -> None:
        """The recipe with all that it extends goes to recipe.toml, or beside it where that is the user's own."""
        file, beside = self.path / "recipe.toml", self.path / RESOLVED
        own = ownership.same_file(file, self.recipe.files) and file.read_bytes() != whole
        replace_file(beside if own or beside.exists() else file, whole)

    def _refuse_foreign(self) -> None:
        """Before the first byte is written. What looks like a run is compared with the recipe later on."""
        taken = [name for name in (*_WRITTEN, ownership.MARK) if ownership.same_file(self.path / name, self.recipe.files)]
        beside = self.path / RESOLVED
        if ownership.same_file(beside, self.recipe.files) and to_toml(load_recipe(beside)).encode() != beside.read_bytes():
            taken.append(RESOLVED)  # else it is what an earlier start wrote there
        if taken:
            raise UserError(
                f"'{self.path / taken[0]}' would be replaced and is the recipe that is read: give it another name", 2
            )
        if not self.used:
            kept = [*self.recipe.files, *(self.path / name for name in FILES if is_request(self.path / name))]
            ownership.refuse_foreign(self.path, "run", self.recipe.where("run.out"), kept=kept)
        elif not (self.path / "recipe.json").exists():
            raise UserError(f"'{self.path}' holds results but no recipe.json; choose another run.out")
        if self.model.exists() and not any((self.model / name).exists() for name in (MARK, "dedistill.json")):
            raise UserError(f"'{self.model}' is not an export of a run and would be replaced: move it, or set another run.out")

    def _compare(self, known: Path) -> None:
        if self.recipe.run.resume == "never":
            raise UserError(f"'{self.path}' already holds a run and run.resume = 'never'; choose another run.out")
        before = read_object(known, otherwise=f"restore it, or move '{self.path}' away to start over")
        before, now = as_it_was_meant(before, self.recipe.model), self.recipe.resolved()
        self.notes += [
            f"{key}: what was at '{there}' is at '{here}' now"
            for key, there, here in _moved(before, now, {*self._inputs()} & {*input_files(self.recipe), "data.sets"})
            if not key.endswith(".name")
        ]
        differing, free = _differences(before, now)
        if differing:
            raise UserError(
                f"'{self.path}' holds a run of another recipe. It differs in:\n"
                + "\n".join(f"  {key}: {old!r} there, {new!r} here{self._by_default(key)}" for key, old, new in differing)
                + "\nChange it back, or set another run.out. A key that is None there may be newer than that run: then go on "
                "with the version of dedistill that it was started with."
            )
        self.notes += [
            f"{key} = {new!r} here by default; until now the run had {old!r}: set it to go on with that"
            for key, old, new in free
            if old is not None and new is not None and self._by_default(key)
        ]

    def _by_default(self, key: str) -> str:
        """What to say of a key that the recipe leaves out: nobody changed it, but the default may have changed."""
        return "" if self.recipe.says(key) else " by default"

    def bind(self, inputs: dict[str, Files], images: str | None = None, sample: str | None = None) -> list[str]:
        """Record the recipe, and in inputs.json which bytes the run is made from; refuse other ones, naming them.

        Where files lie does not matter. inputs: recipe key -> files. images: a hash of the images and captions that are drawn
        from. sample: a hash of a few numbers of the base as it was loaded; where it is another one than before, stamps are
        not believed and every file is read. Returns what a user should know. A run of an earlier version, without
        inputs.json, is bound to what is there now.
        """
        before = self._inputs()
        other_base = self.used and SAMPLE in before and before[SAMPLE]["sha256"] != sample
        now = {key: fingerprint(files, None if other_base else before.get(key)) for key, files in inputs.items()}
        if sample:
            now[SAMPLE] = {"sha256": sample, "files": {}}
        if images:
            now["data.sets"] = {"sha256": images, "files": {}}
            if self.used and before.get("data.sets", now["data.sets"])["sha256"] != images:
                raise UserError(
                    f"data.sets: images, captions or crops differ from those that the run in '{self.path}' was started with; "
                    "steps would no longer be what they were. Put them back, or set another run.out."
                )
        for key in before.keys() & now.keys() if self.used else ():
            if changed := changed_files(before[key], now[key]):
                place = inputs[key].get(changed[0], changed[0])
                raise UserError(
                    f"{key}: {amount(len(changed), 'file differs', 'files differ')} from those that the run in "
                    f"'{self.path}' was started with, e.g. '{place}'. Put them back, or set another run.out."
                )
        replace_file(self.path / "recipe.json", json.dumps(self.recipe.resolved(), indent=1).encode())
        self._write_recipe(to_toml(self.recipe).encode())
        replace_file(self.path / "inputs.json", checksummed(now))
        return [OTHER_NUMBERS] if other_base else []

    def _inputs(self) -> dict[str, Fingerprint]:
        """What is recorded; empty where nothing is."""
        file = self.path / "inputs.json"
        try:
            return read_checksummed(file) if file.exists() else {}
        except ValueError as e:
            way_out = "restore it, or delete it to bind the run to the files that are there now"
            raise UserError(f"'{file}' {e}; {way_out}") from e


def flat(table: object, prefix: str = "") -> dict[str, object]:
    if isinstance(table, dict):
        return {k: v for name, value in table.items() for k, v in flat(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): table}


Difference = tuple[str, object, object]
"""A dotted key, its value in the recorded recipe, and its value now."""


def _moved(before: dict[str, Any], now: dict[str, Any], known: set[str]) -> list[Difference]:
    """Places that differ and whose bytes are ``known``: ``bind`` compares these. In ``before`` they become those of now."""
    tables: list[tuple[str, Any, Any, tuple[str, ...]]] = [
        (f"{table}.", before.get(table), now[table], ("path", "components", "pairs")) for table in ("model", "data")
    ]
    old, new = before["data"].get("sets") if isinstance(before.get("data"), dict) else None, now["data"]["sets"]
    if "data.sets" in known and isinstance(old, list) and len(old) == len(new):
        tables += [(f"data.sets.{i}.", *pair, ("path", "name")) for i, pair in enumerate(zip(old, new))]
        # the name is made of the path where it is not given
        known = known | {f"data.sets.{i}.{key}" for i in range(len(new)) for key in ("path", "name")}
    found = []
    for prefix, there, here, keys in tables:
        if not isinstance(there, dict):  # damaged: it differs
            continue
        for key in keys:
            if prefix + key in known and there.get(key) != here[key]:
                found.append((prefix + key, there.get(key), here[key]))
                there[key] = here[key]
    return found


def _differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[Difference], list[Difference]]:
    """(what another recipe is told by, what a continued run may change)."""
    old, new = flat(before), flat(now)
    free: tuple[str, ...] = FREE_TO_CHANGE
    if now["train"]["schedule"] == "constant":
        free += ("train.steps",)  # a longer constant run is the same run; a decay would be another one
    differing = [(k, old.get(k), new.get(k)) for k in dict.fromkeys([*old, *new]) if old.get(k) != new.get(k)]
    return [d for d in differing if not d[0].startswith(free)], [d for d in differing if d[0].startswith(free)]
