"""Tiny runs to interrupt, and the oracle that tells whether an interruption changed anything."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ranks import start_ranks
from safetensors.torch import load_file

from dedistill.io.atomic import step_of
from dedistill.runs.checkpoint import list_checkpoints, newest_valid, read_checkpoint, save_checkpoint
from dedistill.train import main


def arguments(recipe: Path, out: Path, *settings: str) -> list[str]:
    return [str(recipe), *(a for s in (f"run.out={out}", *settings) for a in ("--set", s))]


def train(recipe: Path, out: Path, *settings: str) -> Path:
    assert main(arguments(recipe, out, *settings)) == 0
    return out


def quietly(action: Callable[[], object]) -> Callable[[], None]:
    """``action`` for a child process: what it prints goes nowhere."""

    def run() -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        action()

    return run


def differences(a: Path, b: Path) -> list[str]:
    """In what the results of two runs differ, bit for bit: journal, snapshots, weights, optimizer, facts of the last save."""
    found = []
    if (a / "metrics.jsonl").read_bytes() != (b / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl")
    snapshots = [sorted((folder / "snapshots").glob("*.safetensors")) for folder in (a, b)]
    if [p.name for p in snapshots[0]] != [p.name for p in snapshots[1]]:
        found.append("which snapshots there are")
    found += [f"snapshot {x.name}" for x, y in zip(*snapshots) if not _same(load_file(x), load_file(y))]
    last = [list_checkpoints(folder / "checkpoints")[-1] for folder in (a, b)]
    (groups, facts), (others, other_facts) = map(read_checkpoint, last)
    found += [key for key in ("step", "skipped", "guard") if facts[key] != other_facts[key]]
    names = sorted(groups.keys() | others.keys())
    return found + [name for name in names if not _same(groups.get(name, {}), others.get(name, {}))]


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    bits = lambda t: t.contiguous().reshape(-1).view(torch.uint8)  # noqa: E731 - NaN equals itself, -0 is not 0
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(bits(a[k]), bits(b[k])) for k in a)


def rewrite(run: Path, change: Callable[[dict, dict], None]) -> None:
    """Put a changed, well-formed checkpoint in place of the newest; ``change`` gets (tensors by group, facts)."""
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    groups, manifest = read_checkpoint(checkpoint)
    facts = {key: manifest[key] for key in ("skipped", "guard", "unfinished")} | {"step": manifest["step"]}
    change(groups, facts)
    shutil.rmtree(checkpoint.parent)
    step = facts.pop("step")
    save_checkpoint(checkpoint.parent, step, {name: group for name, group in groups.items() if group}, facts, keep=2)


def last_row(run: Path) -> int:
    """Step of the last whole row of the journal; 0 without one."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


class Killing:
    """Kill runs at random times, as often as wanted, each time going on with the same directory until a run is done.

    Of several processes one is killed, or all at once; the others must end by themselves.
    """

    def __init__(self, recipe: Path, folder: Path, reference: Path, settings: tuple[str, ...], *, size: int = 1, seed: int = 0):
        self.recipe, self.folder, self.reference, self.settings, self.size = recipe, folder, reference, settings, size
        self.random = random.Random(seed)
        self.kills = self.after_first_save = self.corrupt = self.finished = self.different = 0
        self.most_lost = self.hung = self.waiting = 0

    def run(self, kills: int, longest: float) -> None:
        """``kills`` kills, each after at most ``longest`` seconds; then one run to its end without any."""
        number = 0
        out = self.folder / "run0"
        while self.kills < kills:
            if self._killed(out, longest):
                self._look(out)
            else:
                self._compare(out)
                number += 1
                out = self.folder / f"run{number}"
        train(self.recipe, out, *self.settings)
        self._compare(out)

    def _killed(self, out: Path, longest: float) -> bool:
        ranks = start_ranks(self.size, main, arguments(self.recipe, out, *self.settings), said=self.folder / "said")
        time.sleep(self.random.uniform(0, longest))
        chosen = ranks if self.random.random() < 0.5 else [self.random.choice(ranks)]
        for process in chosen:
            process.kill()
        for process in ranks:
            process.join(timeout=30)
            if process.is_alive():  # before they have met nobody but a launcher can know that one is missing
                met = "adapter" in (self.folder / "said" / "0").read_text()
                self.hung, self.waiting = self.hung + met, self.waiting + (not met)
            process.kill()
            process.join()
        codes = [process.exitcode for process in ranks]
        killed = -signal.SIGKILL in codes
        assert killed or codes == [0] * self.size, f"the run failed by itself: {codes}"
        self.kills += killed
        return killed

    def _look(self, out: Path) -> None:
        newest, notes = newest_valid(out / "checkpoints")
        self.corrupt += len(notes)
        self.after_first_save += newest is not None
        saved = step_of(newest) if newest else 0
        self.most_lost = max(self.most_lost, last_row(out) - saved)

    def _compare(self, out: Path) -> None:
        self.finished += 1
        self.different += bool(differences(self.reference, out))
        shutil.rmtree(out)
