"""Post-hoc averages of a run as files or model folders, in the space that was asked for, and what they amount to in words."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from dedistill.errors import UserError, amount
from dedistill.io.atomic import temporary_folder
from dedistill.io.safetensors import open_safetensors
from dedistill.posthoc.profiles import ALPHAS, TRUSTED, chain_averages, describe, find_profiles, reconstruct
from dedistill.posthoc.snapshots import Average, Snapshot, find_snapshots, write_averages
from dedistill.recipe import RESOLVED, load_recipe

if TYPE_CHECKING:
    from dedistill.posthoc.deltas import ApproximationError

Say = Callable[[str], None]
SPACES = {
    "factors": "each factor by itself, as LibreFLUX did: quick, but not the average of the weights",
    "refactored": "the average of the deltas, brought back to the nearest adapter of the same sizes",
    "delta": "the average of the deltas, dense and exact; a file that dedistill merge takes",
    "merged": "the average of the weights themselves: model folders, base included",
}


@dataclass(frozen=True)
class Written:
    paths: list[Path]
    lost: "list[ApproximationError]"
    """Of refactored averages, in the same order; else empty."""


def write_in_space(snapshots: Sequence[Snapshot], averages: Sequence[Average], space: str, run: Path) -> Written:
    """Write ``averages`` of the snapshots of ``run`` in one of SPACES, each at its own path (a folder when merged).

    merged: onto the base that the run's own recipe names. Raises UserError as the writers do.
    """
    paths = [a.path for a in averages]
    _refuse_other_files(paths)
    if space == "factors":
        return Written(write_averages(snapshots, averages), [])
    from dedistill.posthoc.deltas import write_dense, write_refactored  # with the libraries of adapters: seconds

    if space == "refactored":
        return Written(paths, write_refactored(snapshots, averages))
    if space == "delta":
        write_dense(snapshots, averages)
        return Written(paths, [])
    from dedistill.release.merge import is_merge_of, merge_adapter

    folders = [path.with_suffix("") for path in paths]
    recipe = load_recipe(run / RESOLVED if (run / RESOLVED).exists() else run / "recipe.toml")
    with temporary_folder(paths[0].parent / "deltas") as temporary:
        deltas = [replace(a, path=temporary / a.path.name) for a in averages]
        write_dense(snapshots, deltas)
        for delta, folder in zip(deltas, folders):
            if not is_merge_of(folder, delta.path):  # made before an interruption
                merge_adapter(recipe, delta.path, folder)
    return Written(folders, [])


def _refuse_other_files(paths: Sequence[Path]) -> None:
    """Raises UserError for a file that would be replaced and is no average of ours."""
    for path in paths:
        try:
            with open_safetensors(path) as f:
                average = "dedistill.ema" in (f.metadata() or {})
        except FileNotFoundError:
            if not path.is_symlink():
                continue
            average = False
        except (OSError, SafetensorError):
            average = False
        if not average:
            raise UserError(f"'{path}' exists and is not an average made by dedistill: choose another --out, or remove it")


def average_run(
    run: Path,
    *,
    alphas: Sequence[float] | None,
    widths: Sequence[float] | None,
    step: int | None = None,
    skip: Collection[int] = (),
    space: str = "factors",
    out: Path | None = None,
    say: Say,
) -> list[Path]:
    """Average the snapshots in ``run``: a LERP chain per alpha, and a power-law average per width (sigma_rel).

    Without either, the ten alphas of LibreFLUX. step: without the snapshots after it; skip: steps to leave out. out: default
    ``posthoc`` in the run, where the sweep looks for adapters, or ``posthoc_<space>`` for what is none. Returns what was
    written; raises UserError as the readers and writers do.
    """
    folder = out or run / ("posthoc" if space in ("factors", "refactored") else f"posthoc_{space}")
    written = []
    if alphas or not widths:
        written += _chains(run, dict.fromkeys(alphas or ALPHAS), step, skip, space, folder, say)
    if widths:
        written += _power(run, dict.fromkeys(widths), step, skip, space, folder, say)
    say(f"{amount(len(written), 'average')} in {folder}/")
    return written


def _chains(
    run: Path, alphas: Collection[float], step: int | None, skip: Collection[int], space: str, out: Path, say: Say
) -> list[Path]:
    snapshots = [s for s in find_snapshots(run / "snapshots", skip) if step is None or s.step <= step]
    if len(snapshots) < 2:
        raise UserError(f"--step {step} leaves {amount(len(snapshots), 'snapshot')}; an average needs at least two", 2)
    steps = [s.step for s in snapshots]
    averages = _named(chain_averages(list(alphas), len(steps), out), space)
    written = write_in_space(snapshots, averages, space, run)
    say(f"{amount(len(snapshots), 'snapshot')}, steps {steps[0]} to {steps[-1]}")
    say(f"{'alpha':>6} {'effective':>10} {'mean age':>9} {'sigma_rel':>9}{_lost_title(written)}  weights, newest first")
    for i, (alpha, average) in enumerate(zip(alphas, averages)):
        spread = describe(average.weights, steps)
        shown = "  ".join(f"{s}:{w:.3f}" for s, w in zip(steps[::-1], average.weights[::-1]) if w >= 0.0005)
        row = f"{alpha:6g} {spread.effective:10.2f} {spread.age:9.1f} {spread.sigma_rel:9.4f}"
        say(f"{row}{_lost(written, i)}  {shown}")
    return written.paths


def _power(
    run: Path, widths: Collection[float], step: int | None, skip: Collection[int], space: str, out: Path, say: Say
) -> list[Path]:
    profiles = find_profiles(run / "snapshots", skip)
    found = reconstruct(profiles, list(widths), out, step)
    written = write_in_space(found.snapshots, _named(found.averages, space), space, run)
    tracked = " and ".join(f"{sigma:g}" for sigma in profiles)
    count, last = amount(len(found.snapshots), "snapshot"), found.snapshots[-1].step
    say(f"{count} of the averages of sigma_rel {tracked}, up to step {last}")
    say(f"{'sigma_rel':>9} {'expected error':>15}{_lost_title(written)}  sum of |weights|")
    for i, (sigma, average, error) in enumerate(zip(widths, found.averages, found.errors)):
        say(f"{sigma:9g} {error:15.2%}{_lost(written, i)}  {abs(average.weights).sum():.2f}")
        if error > TRUSTED:
            say(
                f"warning: sigma_rel {sigma:g} is more than these snapshots can tell: were the weights a random walk, it would "
                f"be off by {error:.1%} of its distance to the last weights, and real weights miss by several times that. Take "
                f"a width nearer to {tracked}, or keep more snapshots (snapshot.every)"
            )
    return written.paths


def _named(averages: list[Average], space: str) -> list[Average]:
    """With the space in header and, where adapters of several lie in one folder, file name."""
    end = "_refactored" if space == "refactored" else ""
    return [
        replace(a, path=a.path.with_name(f"{a.path.stem}{end}{a.path.suffix}"), made_by=f"{a.made_by} space={space}")
        for a in averages
    ]


def _lost_title(written: Written) -> str:
    return f" {'refactoring lost':>16}" if written.lost else ""


def _lost(written: Written, i: int) -> str:
    return f" {written.lost[i].error:16.1e}" if written.lost else ""
