"""What a run says on the terminal before it begins. What it says while it goes on: ``runs.pace``."""

import math
from collections.abc import Mapping
from itertools import groupby

from rich.console import Console
from rich.markup import escape

from dedistill.adapters.attach import Adapter
from dedistill.adapters.targets import Resolved, Shape
from dedistill.errors import amount, printable
from dedistill.models.model import Model
from dedistill.recipe import Recipe
from dedistill.recipe.objectives import OBJECTIVES
from dedistill.recipe.resolve import Plan


def header(
    recipe: Recipe, plan: Plan, model: Model, start: int, device: str, images: Mapping[str, object], notes: list[str]
) -> None:
    """Say what will happen, on stderr. images: what is known of the images that are trained on."""
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    t, facts = recipe.train, model.facts
    share = recipe.data.pairs_share or 0.0
    data = recipe.data.source.replace("pictures", "images") + f", {share:.0%} of samples pairs" * bool(share)
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
    if line := data_line(plan, images, 1 - share):
        out.print(f"  data      {line}")
    strata = "stratified" if recipe.timesteps.stratify else "independent"
    density = OBJECTIVES[t.objective].own_sigmas or recipe.timesteps.density
    out.print(f"  sigma     {density}, {strata}; text mask {recipe.model.mask}")
    micro = f" = {plan.micro_steps} x {plan.micro_batch}" if plan.micro_steps > 1 else ""
    out.print(f"  steps     {start:,} to {plan.steps:,}, batch {plan.batch}{micro}, lr {t.lr:g} {t.schedule}, {t.optimizer}")
    snapshots = f", {amount(plan.snapshots, 'snapshot')}" if plan.snapshots else ""
    out.print(f"  results   {recipe.run.out}/ (metrics.jsonl, checkpoints{snapshots})")
    for note in [*model.components.notes, *notes]:
        out.print(f"  [yellow]note[/yellow]      {escape(printable(note))}", markup=True)
    if start:
        out.print(f"  continued from step {start:,}")


def data_line(plan: Plan, facts: Mapping[str, object], share: float = 1.0) -> str:
    """Images, what is held out, captions, epochs and shapes; empty for sources that know of no images. share: of all samples,
    that are images."""
    images, held_out = facts.get("images"), facts.get("held_out_images", 0)
    if not isinstance(images, int) or not isinstance(held_out, int):
        return ""
    counts = [(facts.get("captions"), "caption"), (facts.get("crops"), "crop"), (facts.get("buckets"), "shape")]
    parts = [amount(images, "image"), f"{held_out:,} held out", *(amount(n, what) for n, what in counts if isinstance(n, int))]
    return ", ".join([*parts, f"{share * plan.samples / max(1, images - held_out):,.3g} epochs"])


def _targets_table(adapter: Adapter, targets: list[Resolved]) -> str:
    """One line per target and shape: how many layers, the real factor sizes, the parameters, one name."""

    def key(t: Resolved) -> tuple[str, Shape, int | None, int | None]:
        return (t.pattern, t.shape, t.factor, t.rank)

    lines = [f"            {'target':24} layers      weight  factor (real)  rank   parameters  e.g."]
    for (pattern, shape, factor, rank), group in groupby(sorted(targets, key=lambda t: str(key(t))), key=key):
        names = [t.name for t in group]
        count = sum(math.prod(sizes) for n in names for sizes in adapter.shapes[n].values())
        w1 = adapter.shapes[names[0]].get("lokr_w1")
        side = f"{factor} ({w1[0]}x{w1[1]})" if w1 is not None else "-"
        size = "x".join(map(str, shape))
        lines.append(
            f"            {pattern:24} {len(names):6} {size:>11} {side:>14} {rank or 'full':>5} {count:12,}  {names[0]}"
        )
    return "\n".join(lines)
