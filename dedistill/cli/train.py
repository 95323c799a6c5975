"""Train as a recipe says; run again to continue.

dedistill train my_recipe.toml
dedistill train dedistill:digits/teacher --set train.steps=200
dedistill launch --config_file launch/ddp.yaml --num_processes 8 my_recipe.toml      # on several GPUs
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from dedistill.cli import plan, prepare
from dedistill.cli.command import recipe_parser, run_recipe
from dedistill.errors import RUN_AGAIN, amount, printable, say
from dedistill.io.ownership import refuse_busy
from dedistill.recipe import Recipe, to_toml
from dedistill.recipe.objectives import OBJECTIVES
from dedistill.recipe.resolve import Plan, make_plan, shifts
from dedistill.runs.missing import missing_inputs, require_inputs

if TYPE_CHECKING:
    import torch

    from dedistill.data.source import Source
    from dedistill.distributed.outside import StopRequests
    from dedistill.distributed.world import World
    from dedistill.models.model import Model
    from dedistill.runs.directory import RunDirectory
    from dedistill.runs.metrics import Trackers, Tracking
    from dedistill.training.engine import Engine
    from dedistill.training.online import OnlinePairs
    from dedistill.training.trainer import Trainer

REHEARSE = """Run every stage of a recipe on a tiny random model, from caches to export: about a minute, no weights, no GPU.

dedistill rehearse my_recipe.toml
dedistill rehearse dedistill:flux_schnell_24gb      # without images of your own, on sample images
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, or ended by ``touch RUN/stop``; 75 stopped, run the same command
    again; 2 a wrong recipe; 1 anything else."""
    argv = sys.argv[1:] if argv is None else argv
    parser = recipe_parser("train", __doc__)
    parser.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--plan", action="store_true", help="the same as dedistill plan")
    parser.add_argument("--rehearse", action="store_true", help="the same as dedistill rehearse")
    parser.add_argument("--check-cache", action="store_true", help="the same as dedistill prepare --check")
    parser.add_argument("--cache-only", action="store_true", help="the same as dedistill prepare")
    args = parser.parse_args(argv)
    instead = {
        "print_recipe": _print_recipe,
        "plan": plan.plan,
        "rehearse": _rehearse,
        "check_cache": prepare.check,
        "cache_only": prepare.encode,
    }
    actions = [action for flag, action in instead.items() if getattr(args, flag)]
    return run_recipe(args, actions[0] if actions else lambda recipe: train(recipe, argv))


def rehearse(argv: list[str] | None = None) -> int:
    return run_recipe(recipe_parser("rehearse", REHEARSE).parse_args(argv), _rehearse)


def _print_recipe(recipe: Recipe) -> int:
    print(to_toml(recipe), end="")
    return 0


def _rehearse(recipe: Recipe) -> int:
    from dedistill.distributed.launcher import only_first

    if not only_first():
        return 0
    from dedistill.cli.rehearsal import rehearse

    def stage(small: Recipe) -> None:
        if train(small, []):
            raise KeyboardInterrupt

    terminal = sys.stderr  # each stage's own output goes to a file
    say = lambda line: print(printable(line), file=terminal, flush=True)  # noqa: E731
    rehearse(recipe, stage, say)
    for line in missing_inputs(recipe):
        say(f"NOT THERE YET: {line}")
    return 0


def train(recipe: Recipe, argv: list[str]) -> int:
    """Train ``recipe`` to its end or to a stop request; returns the exit code."""
    from dedistill.distributed.launcher import ranks, resume_command
    from dedistill.distributed.outside import StopRequests
    from dedistill.training.watchdog import Watchdog

    if ranks() == 1:  # of several the first refuses once they are connected: the others end with it
        refuse_busy(Path(recipe.run.out), "run.out")
    require_inputs(recipe)
    again = resume_command(argv)  # now: a launcher that is stopped may be gone before this process
    # before libraries are loaded, which takes seconds
    with StopRequests() as stop, Watchdog(recipe.run.stuck_after, Path(recipe.run.out)):
        try:
            return _train(recipe, again, stop)
        except BaseException:  # the imports of libraries may make another error of an interrupt
            if not stop.signalled or stop.deferred:
                raise
            if os.environ.get("RANK", "0") == "0":
                print(f"stopped before the first step; what is encoded is kept; continue with:\n  {again}", file=sys.stderr)
            return RUN_AGAIN


def _train(recipe: Recipe, again: str, stop: "StopRequests") -> int:
    from dedistill.distributed.launcher import choose_kernels, require_gpu, start

    choose_kernels(exact=recipe.train.exact)
    import torch

    from dedistill.data.encode import check_images, open_data
    from dedistill.distributed.outside import BY_FILE
    from dedistill.models.model import expected_parameters
    from dedistill.models.quantize import sample_sha256
    from dedistill.runs.directory import RunDirectory, flat, input_files
    from dedistill.runs.pace import progress
    from dedistill.training.engine import Engine
    from dedistill.training.fsdp import Fsdp2
    from dedistill.training.trainer import Trainer
    from dedistill.training.zero import Zero2, Zero3

    require_gpu(lambda: expected_parameters(recipe))
    accelerator, world = start(cpu=not torch.cuda.is_available(), log_with="wandb" if recipe.log.wandb else None)
    plan, run = make_plan(recipe), RunDirectory(recipe)
    engine = next(kind for kind in (Engine, Fsdp2, Zero2, Zero3) if kind.name == world.engine)(recipe, world)
    engine.check()
    with ExitStack() as held:
        notes = []
        if world.main:
            held.enter_context(run)
            notes = stop.watch(run.path)
        world.assert_equal_on_all_ranks(flat(recipe.resolved()))
        data = open_data(recipe, accelerator.device, say, world)
        settled, model = _built(recipe, engine, accelerator.device)
        model.text_cache |= data.text_cache
        check_images(recipe, data.source.image, model.components.sample_shape)
        base = sample_sha256(model.components.denoiser)
        world.assert_equal_on_all_ranks({"hash of the data": data.digest, "hash of a sample of the base": base})
        engine.place(model, accelerator.device)
        _hasten(recipe, model, accelerator.device)
        if world.main:
            notes += run.bind(input_files(recipe), data.digest, base)
        source, online = _among_pairs(recipe, model, data.source, run.path, world)
        trainer = Trainer(recipe, plan, model=model, source=source, run=run, engine=engine, online=online)
        notes = [*trainer.resume(), *notes, *run.notes, *_shift_notes(recipe, model, source)]
        if world.main:
            notes += [*_chosen(model), *_expect(trainer, settled)]
            _announce(trainer, data.facts, notes)
        trackers = _trackers(accelerator, recipe, run) if world.main else None
        rows = trainer.fit(stop, trackers)
        with world.translate_dist_errors():
            for _ in progress(rows, trainer.state.step, plan, trainer.pace) if world.main else rows:
                if world.main and trainer.pace.done == COMPARED_AT:
                    _compare(trainer)
            trainer.check_applied()
            exported = trainer.keeper.export() if trainer.state.step == plan.steps else None
        if trackers:
            trackers.close()
        if world.main:
            _conclude(trainer, plan, again, exported)
        world.shutdown()
    finished = trainer.state.step == plan.steps and not trainer.state.unfinished
    return 0 if finished or trainer.stopping == BY_FILE else RUN_AGAIN


def _among_pairs(
    recipe: Recipe, model: "Model", images: "Source", run: Path, world: "World"
) -> "tuple[Source, OnlinePairs | None]":
    """``images``, with pairs among them where ``recipe`` says so, and those of them that are made while it trains."""
    from dedistill.data.mixture import beside_pairs
    from dedistill.training.online import OnlinePairs

    online = OnlinePairs(recipe, model, images, run / "pairs", world) if recipe.online.every else None
    return beside_pairs(recipe, images, model.components.sample_shape, online), online


def _trackers(accelerator: "Tracking", recipe: Recipe, run: "RunDirectory") -> "Trackers | None":
    from dedistill.runs.metrics import Trackers

    return Trackers(accelerator, recipe.run.name, recipe.resolved(), run.path) if recipe.log.wandb else None


def _built(recipe: Recipe, engine: "Engine", device: "torch.device") -> "tuple[Recipe, Model]":
    """``recipe`` with what "auto" becomes on ``device``, and its model."""
    from dedistill.forecast.choose import settle
    from dedistill.models.model import build_model
    from dedistill.models.swap import free_memory

    settled, chosen = settle(recipe, free_memory(device), engine.world, in_parts=engine.builds_on_cpu)
    model = build_model(settled, "cpu" if engine.builds_on_cpu else device)
    model.facts |= {"auto": chosen} if chosen else {}
    return settled, model


def _hasten(recipe: Recipe, model: "Model", device: "torch.device") -> None:
    """What makes steps faster and changes numbers by rounding alone."""
    from dedistill.kernels import attention
    from dedistill.models.compiled import compile_blocks

    if recipe.train.compile == "blocks":
        model.facts["compiled_blocks"] = compile_blocks(model.family, model.family.blocks(model.components.denoiser))
    if recipe.train.attention == "cudnn":
        model.facts["attention"] = attention.use(device)


def _shift_notes(recipe: Recipe, model: "Model", source: "Source") -> list[str]:
    """What differs between the sigmas of training and those that images are made on."""
    from dedistill.data.pairs import PairSource

    if isinstance(source, PairSource) and OBJECTIVES[recipe.train.objective].own_sigmas:
        if (stored := source.facts.get("shift", 1.0)) == model.grid_shift:
            return []
        return [
            f"the pairs were made at shift {stored:g}, and images are made at sample.shift = {model.grid_shift:g}: "
            "a student of few steps is made for the sigmas of its pairs"
        ]
    note = shifts(recipe, lambda: model.shift(model.components.sample_shape))
    return [note] if note else []


def _chosen(model: "Model") -> list[str]:
    """What "auto" became on a GPU, with the memory that it was chosen for."""
    chosen = model.facts.get("auto", {})
    if "free_gib" not in chosen:
        return []
    keys = ", ".join(f"{key} = {value}" for key, value in chosen.items() if "." in key)
    return [f"{keys}, for {chosen['free_gib']} GiB that are free: {chosen['forecast_gib']} GiB at the peak, forecast"]


COMPARED_AT = 3
"""Steps after which every tensor that lasts has been made."""


def _expect(trainer: "Trainer", settled: Recipe) -> list[str]:
    """Have a run on GPUs held against its forecast; returns what a user should know. Never keeps it from training."""
    pace, world, engine = trainer.pace, trainer.world, type(trainer.engine)
    if pace.device.type != "cuda":
        return []
    from dedistill.forecast.expected import expected
    from dedistill.forecast.spread import PARTS
    from dedistill.runs.pace import matmul_rate

    if engine not in PARTS:
        return []
    try:
        found = expected(settled, trainer.model.family, engine, world.size)
        pace.expected = found.peak_gib
        if world.size == 1:  # a process does not know what the others do
            pace.useful, pace.rate = found.useful, matmul_rate(pace.device)
    except Exception as e:  # of whatever a family may not know on shapes alone
        return [f"memory and useful work are not forecast: {type(e).__name__}: {e}"]
    return []


def _compare(trainer: "Trainer") -> None:
    """Write the measured peak beside the forecast, and say where they differ; else, why it is not there."""
    from dedistill.io.atomic import replace_json
    from dedistill.io.json_files import read_object

    trainer.run.require()
    file, pace = trainer.run.path / "plan.json", trainer.pace
    found: dict[str, object]
    if not (memory := pace.memory()):
        found = {"not_measured": f"torch counts no memory on a {pace.device.type}"}
    elif not pace.expected:
        found = {"measured_peak_gib": round(memory.peak, 3), "not_forecast": f"of {trainer.engine.name}, or of this family"}
    else:
        found = {"peak_gib": pace.expected, "measured_peak_gib": round(memory.peak, 3)}
    replace_json(file, read_object(file) | {"forecast": found | {"after_steps": COMPARED_AT}})
    if note := pace.surprise():
        say(f"note: {note}")


def _announce(trainer: "Trainer", data: dict[str, object], notes: list[str]) -> None:
    """Say, and write into plan.json, what will happen. data: what the samples came to; notes: for the user alone."""
    from dedistill.io.atomic import replace_json
    from dedistill.report.console import header

    plan, model, world = trainer.plan, trainer.model, trainer.world
    replace_json(trainer.run.path / "plan.json", {"plan": plan.as_dict(), "effects": model.facts | data | trainer.facts()})
    devices = f"{world.size} x {model.device.type}" if world.size > 1 else str(model.device)
    header(trainer.recipe, plan, model, trainer.state.step, devices + trainer.engine.placement, data, notes)


def _conclude(trainer: "Trainer", plan: Plan, again: str, exported: Path | None) -> None:
    """Say how a run ended."""
    state = trainer.state
    if not trainer.trained_now:
        print(f"already finished at step {state.step}; nothing to train", file=sys.stderr)
    if state.step < plan.steps or state.unfinished:
        print(f"stopped and saved at step {state.step}; continue with:\n  {again}", file=sys.stderr)
        return
    where = f"{trainer.run.path}/" + (f", model in {exported}/" if exported else "")
    print(f"done: {amount(plan.steps, 'step')}; results in {where}", file=sys.stderr)
