"""Kinds of faults, each injected as often as asked for; every function gives one row of docs/reliability.md."""

import contextlib
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_samples import CAPTIONS, GOOD, IMAGES, ROWS, write_folder, write_table
from bad_shards import DAMAGES, silently_short
from flows import FLOWS, MAY_BE_MADE_AGAIN
from harness import Recorder, count_operations, full_disk_from, killed_before, lay_out
from recipe_mutations import hostile_recipe
from runs import Killing, arguments, differences, quietly, train
from test_not_finite import PLACES, in_optimizer, poison

from dedistill.data.images.index import build_index
from dedistill.data.images.types import ImageSet
from dedistill.errors import UserError
from dedistill.io.atomic import step_of
from dedistill.recipe import load_recipe
from dedistill.recipe.load import RecipeError
from dedistill.runs.checkpoint import list_checkpoints, newest_valid, read_checkpoint
from dedistill.train import main as dedistill_train
from dedistill.training.keeping import AsyncCheckpointWriter

SETTINGS = ("checkpoint.every=1", "snapshot.every=2", "validate.every=100")
Row = tuple[str, str, str, bool]
"""(fault, how often, what came of it, whether that is what is promised)"""


def kills(recipe: Path, folder: Path, count: int, size: int) -> Row:
    settings = (*SETTINGS, "train.steps=16", f"train.exact={'true' if size > 1 else 'false'}")
    reference = train(recipe, folder / "reference", *settings)
    start = time.monotonic()
    train(recipe, folder / "timed", *settings)
    killing = Killing(recipe, folder, reference, settings, size=size)
    killing.run(count, longest=(time.monotonic() - start) * size)
    good = killing.corrupt == killing.different == killing.hung == 0 and killing.most_lost <= 2
    who = "a process" if size == 1 else f"one or all of {size} processes"
    return (
        f"kill -9 of {who} at a random time",
        f"{killing.kills} kills, {killing.after_first_save} after a first save; {killing.finished} runs carried to their end",
        f"damaged loads {killing.corrupt}; most steps lost {killing.most_lost}, with a save at every step beside training; "
        f"runs that differ in any bit from an uninterrupted one {killing.different}"
        + (
            f"; others that hung then {killing.hung}; that waited at the start, for a launcher to end them, {killing.waiting}"
            if size > 1
            else ""
        ),
        good,
    )


def crash_points(recipe: Path, folder: Path) -> Row:
    points = bad = 0
    for name, flow in FLOWS.items():
        disk = _prepared(folder, name)
        for point in range(1, len(count_operations(lambda f=flow, d=disk: f.save(d))) + 1):
            disk = _prepared(folder, name)
            killed_before(point, lambda f=flow, d=disk: f.save(d))
            found = flow.read(disk)
            bad += found not in (flow.old, flow.new) and not (found is None and name in MAY_BE_MADE_AGAIN)
            points += 1
    reference = train(recipe, folder / "reference", *SETTINGS)
    whole = count_operations(lambda: train(recipe, folder / "counted", *SETTINGS))
    for point in range(1, len(whole) + 1):
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        killed_before(point, quietly(lambda out=out: train(recipe, out, *SETTINGS)))
        train(recipe, out, *SETTINGS)
        bad += bool(differences(reference, out))
    return (
        "kill -9 before every operation on files (open, fsync, rename, remove, mkdir, rmdir)",
        f"{points} points of {len(FLOWS)} kinds of save, {len(whole)} points of a whole run of 6 steps",
        f"neither old nor new, or another run afterwards: {bad}",
        bad == 0,
    )


def power_loss(recipe: Path, folder: Path) -> Row:
    states = bad = unsafe = 0
    for name, flow in FLOWS.items():
        disk = _prepared(folder, name)
        with Recorder(disk) as power:
            flow.save(disk)
        states += len(power.states)
        for _, state in power.states:
            found = flow.read(lay_out(state, folder / "after"))
            bad += found not in (flow.old, flow.new) and not (found is None and name in MAY_BE_MADE_AGAIN)
        unsafe += sum(flow.read(lay_out(state, folder / "after")) != flow.new for state in power.done)
    return (
        "loss of power: every state that un-synced writes and renames may leave",
        f"{states} states of {len(FLOWS)} kinds of save",
        f"neither old nor new: {bad}; lost although said to be saved: {unsafe}",
        bad == unsafe == 0,
    )


def power_loss_of_a_run(recipe: Path, folder: Path, count: int) -> Row:
    """States of a whole run, ``count`` of them chosen at random and continued."""
    disk = folder / "disk"
    disk.mkdir()
    with pytest.MonkeyPatch.context() as patch, Recorder(disk) as power:
        patch.setattr(
            AsyncCheckpointWriter, "start", lambda self, groups, save, **_: save(groups)
        )  # the recorder needs one operation after the other
        train(recipe, disk / "run", *SETTINGS)
    reference, different, unloadable = train(recipe, folder / "reference", *SETTINGS), 0, 0
    for _, state in power.states:
        checkpoints = {p: c for p, c in state.items() if p.startswith("run/checkpoints") or p == "run"}
        unloadable += bool(newest_valid(lay_out(checkpoints, folder / "after") / "run" / "checkpoints")[1])
    chosen = random.Random(0).sample(power.states, min(count, len(power.states)))
    for _, state in chosen:
        out = lay_out(state, folder / "after") / "run"
        train(recipe, out, *SETTINGS)
        different += bool(differences(reference, out))
    return (
        "loss of power during a whole run",
        f"{len(power.states)} states, {len(chosen)} of them, drawn at random, started again",
        f"states with a damaged checkpoint: {unloadable}; runs that differ in any bit from an uninterrupted one: {different}",
        unloadable == different == 0,
    )


def _prepared(folder: Path, name: str) -> Path:
    disk = folder / "disk"
    shutil.rmtree(disk, ignore_errors=True)
    disk.mkdir()
    FLOWS[name].prepare(disk)
    return disk


def full_disk(recipe: Path, folder: Path) -> Row:
    failed = bad = unnamed = 0
    for name, flow in FLOWS.items():
        disk = _prepared(folder, name)
        for point in range(1, len(count_operations(lambda f=flow, d=disk: f.save(d))) + 1):
            disk = _prepared(folder, name)
            try:
                with full_disk_from(point):
                    flow.save(disk)
            except (UserError, OSError) as e:
                failed += 1
                unnamed += str(disk) not in str(e)
            bad += flow.read(disk) not in (flow.old, flow.new)
    return (
        "no space left, from any operation of a save on",
        f"{failed} saves failed, of {len(FLOWS)} kinds",
        f"neither old nor new: {bad}; errors that do not name the path: {unnamed}",
        bad == unnamed == 0,
    )


def flips(recipe: Path, folder: Path, count: int) -> Row:
    run, rng, missed = train(recipe, folder / "run", *SETTINGS), random.Random(0), 0
    for _ in range(count):
        with _copied(run / "checkpoints", folder) as (newest, older):
            file = rng.choice(sorted(newest.iterdir()))
            raw = bytearray(file.read_bytes())
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            file.write_bytes(raw)
            missed += not _refused(newest, older, file.name)
    return "one bit flipped in a file of the newest checkpoint", f"{count}", _told(count, missed), missed == 0


def damages(recipe: Path, folder: Path, count: int) -> Row:
    run, rng, missed = train(recipe, folder / "run", *SETTINGS), random.Random(0), 0
    for number in range(count):
        with _copied(run / "checkpoints", folder) as (newest, older):
            file = rng.choice(sorted(newest.iterdir()))
            raw = file.read_bytes()
            kind = number % 6
            if kind == 0:
                file.write_bytes(raw[: rng.randrange(len(raw))])
            elif kind == 1:
                at = rng.randrange(len(raw))
                file.write_bytes(raw[:at] + bytes(len(raw[at : at + 4096])) + raw[at + 4096 :])
                if file.read_bytes() == raw:  # there were zeros before
                    file.write_bytes(bytes(len(raw)))
            elif kind == 2:
                file.unlink()
            elif kind == 3:
                shutil.copyfile(older / file.name, file)
            elif kind == 4:
                file.write_bytes(raw + b"\0")
            else:
                file.unlink()
                file.mkdir()
            missed += not _refused(newest, older, file.name)
    how = f"{count}: cut, a page zeroed, missing, of another step, longer, a folder"
    return "a file of the newest checkpoint damaged", how, _told(count, missed), missed == 0


@contextlib.contextmanager
def _copied(checkpoints: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    copy = shutil.copytree(checkpoints, folder / "copy")
    older, newest = list_checkpoints(copy)
    yield newest, older
    shutil.rmtree(copy)


def _refused(newest: Path, older: Path, file: str) -> bool:
    found, notes = newest_valid(newest.parent)
    return found == older and len(notes) == 1 and file in notes[0] and read_checkpoint(older)[1]["step"] == step_of(older)


def _told(count: int, missed: int) -> str:
    return f"refused by name, and the one before it used: {count - missed} of {count}"


def not_finite(recipe: Path, folder: Path) -> Row:
    trained = unfinished = times = 0
    for step in (1, 2, 4):
        for place in (*PLACES.values(), in_optimizer):
            out = folder / f"run{times}"
            with pytest.MonkeyPatch.context() as patch:
                unchanged = poison(patch, place, steps=(step,))
                code = dedistill_train(arguments(recipe, out, *SETTINGS))
            if place is in_optimizer:  # found where it would be saved: the run stops, and goes on from the last save
                assert code == 1
                code = dedistill_train(arguments(recipe, out, *SETTINGS))
            else:
                trained += unchanged != [True]
            unfinished += code != 0
            groups, _ = read_checkpoint(list_checkpoints(out / "checkpoints")[-1])
            trained += not all(t.isfinite().all() for group in groups.values() for t in group.values())
            times += 1
    return (
        "NaN or infinity in a latent, a caption's embedding, the loss, the gradient, the optimizer's state",
        f"{times}",
        f"steps trained on it, or saved with it: {trained}; runs that did not come to their end: {unfinished}",
        trained == unfinished == 0,
    )


def samples(recipe: Path, folder: Path) -> Row:
    expected = write_folder(folder / "set")
    index = build_index([ImageSet(str(folder / "set"), missing_captions="quarantine")])
    used = {s.name.removeprefix("set/") for s in index.samples}
    named = used | {name.removeprefix("set/") for name, _ in index.quarantined}
    wrong = len(expected.keys() ^ named) + len(used ^ {name for name, outcome in expected.items() if outcome == GOOD})
    write_table(folder / "table")
    rows = build_index([ImageSet(str(folder / "table"), missing_captions="quarantine")])
    wrong += len(rows.samples) != 5 or len(rows.quarantined) != len(ROWS)
    odd = sum(outcome == GOOD for _, _, outcome in (*IMAGES.values(), *CAPTIONS.values()))
    return (
        "bad images, captions and rows of tables among good ones",
        f"{len(expected) - 3 + len(ROWS)} kinds, {odd} of them odd but good",
        f"missing without a word, used although bad, or good but not used: {wrong}",
        wrong == 0,
    )


def shards(recipe: Path, folder: Path, count: int) -> Row:
    wrong = [told for number in range(count) if (told := silently_short(folder / f"{number}", number))]
    for told in wrong:
        print(told, file=sys.stderr)
    return (
        "damaged tar shards beside a good one",
        f"{count}, of {len(DAMAGES)} kinds",
        f"silently short, or harmful to the good one: {len(wrong)}",
        not wrong,
    )


def recipes(recipe: Path, folder: Path, count: int) -> Row:
    rng, file, other, accepted = random.Random(1), folder / "r.toml", 0, 0
    for _ in range(count):
        text, overrides = hostile_recipe(rng)
        file.write_bytes(text)
        try:
            load_recipe(file, overrides)
            accepted += 1
        except RecipeError:
            pass
        except Exception as e:
            other += 1
            print(f"{type(e).__name__}: {e}: {text!r} {overrides}", file=sys.stderr)
    return (
        "broken and hostile recipes",
        f"{count}, of which {accepted} were good recipes after all",
        f"any other error than one that names the key: {other}",
        other == 0,
    )
