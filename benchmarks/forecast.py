"""The forecast of a step's memory against what torch's profiler sees of the same step on the CPU, in several settings.

python -m benchmarks.forecast                # small networks, a minute
python -m benchmarks.forecast --width 512    # larger ones
python -m benchmarks.forecast --recipes      # which shipped recipes fit which cards: results/forecast.json, docs/performance.md
python -m benchmarks.forecast --counts       # kernels and bytes of a step, before and after: results/counts.json, the same page

"Above" is what a step takes beside weights and optimizer, which are there before it. On a CPU the same code is forecast with
the CPU's kernels and allocator; of a card's nothing is seen here.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import counts
from dedistill.distributed.world import World
from dedistill.forecast.cards import CARDS, FITS, GIB, fit, room_on
from dedistill.forecast.choose import Choices
from dedistill.forecast.depth import estimate
from dedistill.forecast.forecast import case_of, swapped_to_fit
from dedistill.forecast.meter import BASE, OPTIMIZER, TRAINED
from dedistill.forecast.paper import STEP, Case, prepared
from dedistill.models.registry import get_family
from dedistill.recipe import Recipe, load_recipe
from dedistill.recipe.resolve import recipe_of
from dedistill.training.engine import Engine
from dedistill.training.trainer import Trainer

RESIDENT = (BASE, TRAINED, OPTIMIZER)
LORA = {"kind": "lora", "targets": [{"preset": "blocks", "rank": 8}]}
LOKR = {"kind": "lokr", "init": "perturbed_normal", "targets": [{"preset": "blocks", "factor": 4}]}
SETTINGS = {
    "LoRA": {"adapter": LORA},
    "LoRA, checkpointing, int8": {"adapter": LORA, "quant": "int8", "checkpointing": True},
    "LoKr, int8": {"adapter": LOKR, "quant": "int8"},
    "LoKr, checkpointing, batch of 4": {"adapter": LOKR, "checkpointing": True, "batch": 4},
    "LoKr, int8, batch of 4, mask": {"adapter": LOKR, "quant": "int8", "batch": 4, "mask": "bool"},
    "LoRA, int8, checkpointing, batch of 4, mask": {
        "adapter": LORA, "quant": "int8", "checkpointing": True, "batch": 4, "mask": "bool",
    },
    "LoRA, checkpointing, batch of 4, offloaded": {"adapter": LORA, "checkpointing": True, "batch": 4, "offload": True},
    "whole network, bf16": {"adapter": None},
    "whole network, bf16, checkpointing, batch of 4": {"adapter": None, "checkpointing": True, "batch": 4},
}  # fmt: skip


def recipe_for(
    width: int, adapter: dict | None, quant: str = "none", checkpointing: bool = False, batch: int = 1, mask: str = "none",
    offload: bool = False,
) -> Recipe:  # fmt: skip
    heads = width // 64
    sizes = {"layers": 2, "single_layers": 3, "heads": heads, "head_dim": 64, "rope_axes": [16, 24, 24]}
    new = {"channels": 16, "height": 32, "width": 32, "patch": 2, "text_dim": width, "pooled_dim": 64, **sizes}
    return recipe_of(
        {
            "run": {"name": "forecast", "out": "unused"},
            "model": {"family": "pixel_flux", "new": new, "mask": mask, "text_length": 48},
            "base": {"quant": quant},
            "adapter": adapter,
            "data": {"source": "digits"},
            "train": {
                "steps": 10, "batch": batch, "lr": 1e-4, "precision": "bf16", "max_grad_norm": 1.0,
                "optimizer": "adamw_bf16" if adapter else "adamw",
                "gradient_checkpointing": checkpointing, "offload_activations": offload,
            },
        }
    )  # fmt: skip


@dataclass
class Row:
    setting: str
    resident: int
    forecast: int
    """Above ``resident``."""
    measured: int

    @property
    def ratio(self) -> float:
        return self.forecast / self.measured


FAMILIES = {
    "SDXL, LoRA": ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", 4, 77, {}),
    "SD 1.5, LoRA": ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5", 4, 77, {}),
    "SD 3.5, LoRA, int8, checkpointing, batch of 4": (
        "sd3", "stabilityai/stable-diffusion-3.5-medium", 16, 48, {"quant": "int8", "checkpointing": True, "batch": 4},
    ),
}  # fmt: skip
"""Tiny networks of other families: what each is like, channels of its latents, tokens of captions, settings."""


def compared(name: str, width: int, *, whole: bool = False) -> Row:
    recipe = recipe_for(width, **SETTINGS[name])
    return _row(name, Case(recipe, get_family(recipe.model.family), (16, 32, 32), 48, card=False), whole=whole)


def compared_family(name: str, folder: Path) -> Row:
    """folder: where the tiny model is written."""
    kind, like, channels, length, settings = FAMILIES[name]
    tables = recipe_for(64, LORA, **settings).resolved()
    at = lambda path: recipe_of(tables | {"model": {"family": kind, "path": str(path), "text_length": length}})  # noqa: E731
    family = get_family(kind)
    family.write_tiny(at(like).model, folder, None, full_depth=False)
    return _row(name, Case(at(folder), family, (channels, 32, 32), length, card=False), whole=True)


def _row(name: str, case: Case, *, whole: bool) -> Row:
    peak = max((p for (phase, _), p in estimate(case, whole=whole).peaks.items() if phase in STEP), key=lambda p: p.bytes)
    resident = sum(peak.by_category.get(c, 0) for c in RESIDENT)
    return Row(name, resident, peak.bytes - resident, measured(case))


def measured(case: Case) -> int:
    """The most that the second step of a real run takes at once beside what is there before it, as torch's profiler sees it."""
    trainer = prepared(case, case.family.load(case.recipe.model, seed=0), "cpu")
    trainer.train_step(0, iter(samples_of(trainer)))  # makes the optimizer's state
    forget_positions(trainer)
    samples = iter(samples_of(trainer))  # made before: on a card they are not in its memory
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train_step(0, samples)
    return highest(profiler)


SECOND = "the second step"


def measured_in_all(case: Case, world: World, engine: type[Engine]) -> int:
    """The most that one process of ``world`` has in use in the second step, weights and optimizer included."""
    with _given_back_here(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = prepared(case, case.family.load(case.recipe.model, seed=0), "cpu", world, engine)
        trainer.train_step(0, iter(samples_of(trainer)))
        forget_positions(trainer)
        gc.collect()
        samples = iter(samples_of(trainer))
        with record_function(SECOND):
            trainer.train_step(0, samples)
    return highest(profiler, SECOND)


@contextmanager
def _given_back_here() -> Iterator[None]:
    """Wait after a message until gloo's thread has let go of it: the profiler does not see what other threads give back, and
    would count it to the end."""

    def waiting(send: Callable[..., Any]) -> Callable[..., Any]:
        def sent(*args: Any, **kwargs: Any) -> object:
            before = [(t, t._use_count()) for t in [*args, *kwargs.values()] if isinstance(t, Tensor)]
            result = send(*args, **kwargs)
            late = time.monotonic() + 10
            while any(t._use_count() > count for t, count in before) and time.monotonic() < late:
                time.sleep(0.001)
            return result

        return sent

    with ExitStack() as stack:
        for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
            stack.enter_context(patch.object(dist, name, waiting(getattr(dist, name))))
        yield


def forget_positions(trainer: Trainer) -> None:
    """They are kept from step to step, and made anew where a step is forecast."""
    if positions := getattr(trainer.model.components.denoiser, "pos_embed", None):
        vars(positions).get("kept", {}).clear()


def highest(profiler: profile, since: str = "") -> int:
    """Most bytes in use at once, of those taken while ``profiler`` looked. since: from the beginning of this part on."""
    events = profiler.profiler.kineto_results.events()
    begin = min((event.start_ns() for event in events if event.name() == since), default=0)
    live = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live) if event.start_ns() >= begin else most
    return most


def samples_of(trainer: Trainer) -> list:
    """Of one step."""
    found = []
    for item in trainer.micro_batches(0):
        found.append(item)
        if item is None:
            break
    return found


def table(rows: list[Row]) -> str:
    lines = [f"{'setting':44} {'resident':>9} {'forecast':>9} {'measured':>9}  ratio, above  of all"]
    for r in rows:
        whole = (r.resident + r.forecast) / (r.resident + r.measured)
        sizes = " ".join(f"{n / 2**20:9.2f}" for n in (r.resident, r.forecast, r.measured))
        lines.append(f"{r.setting:44} {sizes}  {r.ratio:12.3f}  {whole:6.3f}")
    return "\n".join(lines)


# --- which recipes fit which cards -----------------------------------------------------------------------------------


RESULTS = Path(__file__).parent / "results" / "forecast.json"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MARKS = "<!-- forecast: python -m benchmarks.forecast --recipes -->", "<!-- end of forecast -->"
RECIPES = {
    "flux_schnell_12gb": 12, "flux_schnell_16gb": 16, "flux_schnell_24gb": 24, "flux_schnell": 48, "flux_schnell_80gb": 80,
    "flux_dev": 48, "openflux": 48, "flex1_alpha": 24, "flux_lora": 24, "sd35_medium": 12, "sd35_large": 16,
    "sd35_turbo_dedistill": 16, "sd15_lora": 8, "sdxl_lora": 16, "sdxl_turbo_dedistill": 16,
}  # fmt: skip
"""Shipped ones -> GB of the card that each is made for."""
SHOWN = ("RTX 4070", "RTX 4080", "RTX 4090", "L40S", "H100")


def recipe_row(name: str) -> dict:
    """Of a shipped recipe: its peak on the card that it is made for, and on each whether it fits, with how many blocks on the
    CPU and computed again, and the least time."""
    recipe = load_recipe(f"dedistill:{name}")
    family = get_family(recipe.model.family)
    choices = Choices(case_of(recipe, family, family.full_size(recipe.model)))
    cards = {}
    for card in (c for c in CARDS if c.name in SHOWN):
        found = choices(room_on(card.gb))
        fitted = swapped_to_fit(found, room_on(card.gb)) or (found if fit(found.peak, room_on(card.gb)) == FITS else None)
        cards[card.name] = {
            "gb": card.gb,
            "swap": fitted.setting.swap if fitted else None,
            "checkpointing": found.setting.checkpointing,
            "sample_s": float(f"{card.seconds((fitted or found).step) / recipe.train.batch:.3g}"),
        }
    return {"recipe": name, "peak_gib": round(choices(room_on(RECIPES[name])).peak / GIB, 2), "cards": cards}


def recipe_table(rows: list[dict]) -> str:
    """As docs/performance.md shows it."""
    heads = [f"{name}, {card['gb']} GB" for name, card in rows[0]["cards"].items()]
    lines = [f"| recipe | made for | peak there | {' | '.join(heads)} |", "|---|---|---|" + "---|" * len(heads)]
    for row in rows:
        cells = [_cell(card) for card in row["cards"].values()]
        made_for = f"{RECIPES[row['recipe']]} GB | {row['peak_gib']:.1f} GiB"
        lines.append(f"| `dedistill:{row['recipe']}` | {made_for} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(card: dict) -> str:
    if card["swap"] is None:
        return "no"
    again = card["checkpointing"]
    parts = [f"`base.swap = {card['swap']}`" if card["swap"] else "", "" if again is True else f"{int(again)} recomputed"]
    how = ", ".join(filter(None, parts)) or "as it is"
    return f"{how}, {card['sample_s']:g} s"


def write_recipes() -> None:
    rows = [recipe_row(name) for name in RECIPES]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    before, after = PAGE.read_text().split(MARKS[0])[0], PAGE.read_text().split(MARKS[1])[1]
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{recipe_table(rows)}\n\n{MARKS[1]}{after}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256, help="of the network, a multiple of 64")
    parser.add_argument("--recipes", action="store_true", help="write the table of recipes and cards")
    parser.add_argument("--counts", action="store_true", help="write the table of kernels and bytes, before and after")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.recipes:
        write_recipes()
        return 0
    if args.counts:
        counts.write(PAGE)
        return 0
    rows = [compared(name, args.width) for name in SETTINGS]
    for name in FAMILIES:
        with TemporaryDirectory() as folder:
            rows.append(compared_family(name, Path(folder)))
    print(table(rows) + "\nin MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
