"""What a run says on the terminal: a header of what will happen, a live line, and where the results are."""

import math
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dedistill.adapters.attach import Adapter
from dedistill.adapters.targets import Resolved
from dedistill.errors import amount, printable
from dedistill.models.model import Model
from dedistill.recipe import Recipe
from dedistill.recipe.objectives import OBJECTIVES
from dedistill.recipe.resolve import Plan

LINE_EVERY = 100
"""Steps between plain lines where there is no terminal."""


def header(recipe: Recipe, plan: Plan, model: Model, start: int, device: str, notes: list[str]) -> None:
    """Say what will happen, on stderr."""
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    t, facts = recipe.train, model.facts
    data = recipe.data.source.replace("pictures", "images")
    what = f"{OBJECTIVES[t.objective].called} of {model.family.spec.name} on {data}, in {t.precision} on {device}"
    out.print(f"[bold]{recipe.run.name}[/bold]: {what}")
    source = recipe.model.path or f"random weights, seed {recipe.run.seed}"
    quant = f", {amount(len(facts['quantized']), 'linear')} as {recipe.base.quant}" if facts.get("quantized") else ""
    size = f"{facts['network_parameters']:,} parameters, {facts['storage_bytes'] / 1e6:.1f} MB"
    out.print(f"  network   {size}, from {source}{quant}")
    if model.adapter and recipe.adapter:
        out.print(f"  adapter   {facts['trained_parameters']:,} parameters, init {recipe.adapter.init}")
        out.print(_targets_table(model.adapter, model.targets), markup=False)
    else:
        out.print(f"  trained   all {facts['trained_parameters']:,} parameters")
    strata = "stratified" if recipe.timesteps.stratify else "independent"
    density = "stored points" if OBJECTIVES[t.objective].own_sigmas else recipe.timesteps.density
    out.print(f"  sigma     {density}, {strata}; text mask {recipe.model.mask}")
    micro = f" = {plan.micro_steps} x {plan.micro_batch}" if plan.micro_steps > 1 else ""
    out.print(f"  steps     {start:,} to {plan.steps:,}, batch {plan.batch}{micro}, lr {t.lr:g} {t.schedule}, {t.optimizer}")
    snapshots = f", {amount(plan.snapshots, 'snapshot')}" if plan.snapshots else ""
    out.print(f"  results   {recipe.run.out}/ (metrics.jsonl, checkpoints{snapshots})")
    for note in [*model.components.notes, *notes]:
        out.print(f"  [yellow]note[/yellow]      {escape(printable(note))}", markup=True)
    if start:
        out.print(f"  continued from step {start:,}")


def _targets_table(adapter: Adapter, targets: list[Resolved]) -> str:
    """One line per target and shape: how many layers, the real factor sizes, the parameters, one name."""

    def key(t: Resolved) -> tuple[str, tuple[int, int], int | None, int | None]:
        return (t.pattern, t.shape, t.factor, t.rank)

    lines = [f"            {'target':24} layers      weight  factor (real)  rank   parameters  e.g."]
    for (pattern, shape, factor, rank), group in groupby(sorted(targets, key=lambda t: str(key(t))), key=key):
        names = [t.name for t in group]
        count = sum(math.prod(sizes) for n in names for sizes in adapter.shapes[n].values())
        w1 = adapter.shapes[names[0]].get("lokr_w1")
        side = f"{factor} ({w1[0]}x{w1[1]})" if w1 is not None else "-"
        size = f"{shape[0]}x{shape[1]}"
        lines.append(
            f"            {pattern:24} {len(names):6} {size:>11} {side:>14} {rank or 'full':>5} {count:12,}  {names[0]}"
        )
    return "\n".join(lines)


def progress(rows: Iterable[dict[str, Any]], start: int, plan: Plan) -> Iterator[dict[str, Any]]:
    """Pass rows through, showing a live line on a terminal and a plain line every so often elsewhere."""
    if sys.stderr.isatty():
        yield from _live(rows, start, plan)
        return
    for row in rows:
        if row["step"] % LINE_EVERY == 0 or row["step"] == plan.steps or "val_loss" in row or not row["applied"]:
            print(_line(row, plan), file=sys.stderr, flush=True)
        yield row


def _live(rows: Iterable[dict[str, Any]], start: int, plan: Plan) -> Iterator[dict[str, Any]]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=plan.steps, completed=start, text="")
        held_out = ""
        for row in rows:
            held_out = f" held-out {row['val_loss']:.4f}" if "val_loss" in row else held_out
            bar.update(task, completed=row["step"], text=_numbers(row) + held_out)
            yield row


def _numbers(row: dict[str, Any]) -> str:
    if not row["applied"]:
        what = "NOT FINITE" if "not_finite" in row else f"gradient norm {row['grad_norm']}: A SPIKE"
        return f"loss {row['loss']}: {what}, step not applied"
    return f"loss {row['loss']:.4f} grad {row['grad_norm']:.3f} lr {row['lr']:.2e}"


def _line(row: dict[str, Any], plan: Plan) -> str:
    held_out = f" held-out {row['val_loss']:.4f}" if "val_loss" in row else ""
    if held_out:
        spread = f" +- {row['val_loss_se']:.4f}" if "val_loss_se" in row else ""
        held_out += f"{spread} ({amount(row['val_images'], 'image')})"
    return f"step {row['step']}/{plan.steps} {_numbers(row)}{held_out}"
