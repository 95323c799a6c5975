"""What ``dedistill rehearse`` does: a recipe's whole pipeline in about a minute, on a tiny random model of the same classes.

What the user brought is real: the recipe, its layer names at full size, the data. What is made small are the weights,
the images' resolution and the number of steps. Whatever would fail after days should fail here.
"""

import io
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dedistill.adapters.files import read_tensors
from dedistill.cli.tiny import write_samples
from dedistill.data.encode import check_encoders, open_source
from dedistill.data.usable import Usable, by_headers, caption_words, look, without_captions
from dedistill.distributed.launcher import choose_kernels
from dedistill.errors import UserError, amount
from dedistill.evaluation.candidates import candidates_of
from dedistill.evaluation.sweep import Grid, guiders_at, sweep
from dedistill.flow.guidance import Autoguidance, SkipLayers, guider_of
from dedistill.forecast.sizes import check_room, sizes_of
from dedistill.io import ownership
from dedistill.models.family import Family
from dedistill.models.registry import get_family, text_length
from dedistill.posthoc.average import average_run
from dedistill.recipe import Recipe
from dedistill.recipe.model_tables import Target
from dedistill.recipe.resolve import filled, resolve
from dedistill.recipe.shipped import is_shipped
from dedistill.release.export import export_adapter, export_model, formats_of
from dedistill.release.merge import merge_adapter
from dedistill.report.sweep import write_sweep_page
from dedistill.runs.checkpoint import list_checkpoints
from dedistill.runs.model import last_weights

IMAGES = 8
"""Of each set of the user's data."""
STEPS = 4
SMALL = 64
"""Side of the squares that the first resolution becomes; the others grow by 16 each."""
SAMPLE_SIDES = (1600, 1200)
"""Width and height of sample images: enough for any crop at 1024."""
RANK = 4
"""Of adapters, at most: tiny layers are narrower than many a real rank."""
FEW_BLOCKS = 2
"""Of those that wait on the CPU or are computed again."""
PROMPTS = ("", "two words")
MADE = ("rehearsal.log", "cache", "model", "run", "sweep", "merged", "exported")
"""What a rehearsal leaves."""

Say = Callable[[str], None]
Stage = Callable[[str], AbstractContextManager[None]]


def rehearse(recipe: Recipe, train: Callable[[Recipe], None], say: Say) -> None:
    """Run every stage of ``recipe`` small; raises UserError with the stage where one fails.

    Results are left in ``<run.out>-rehearsal`` for a look; an earlier rehearsal there is replaced, any other folder refused.
    """
    choose_kernels(exact=True)  # a continued run is compared with an unbroken one, bit for bit
    out = Path(f"{recipe.run.out}-rehearsal")
    ownership.claim(out, "rehearsal", f"{recipe.where('run.out')}: the rehearsal's folder")
    with ownership.hold(out, "run.out"):
        for name in MADE:
            ownership.remove(out / name)
        _rehearse(recipe, train, out, say)


def _rehearse(recipe: Recipe, train: Callable[[Recipe], None], out: Path, say: Say) -> None:
    stage = _stages(out, say)
    family = get_family(recipe.model.family, recipe.where("model.family"))
    with stage("the plan can be reached"):
        _check_reachable(recipe)
        text_length(family, filled(recipe.model.text_length, "model.text_length"), recipe.where("model.text_length"))
    with stage("layers and sizes at full scale"):
        sizes = sizes_of(recipe, family, family.full_size(recipe.model).denoiser)
        say(f"  {sizes}; {check_room(recipe, sizes)}")
    if recipe.model.path and Path(recipe.model.path).exists():  # else it is to be fetched, or made by an earlier stage
        with stage("the model, by its files"):
            check_encoders(family.load(recipe.model, seed=recipe.run.seed, denoiser=False))
    limit = None
    if recipe.data.source == "pictures":
        recipe, whose = _with_samples(recipe, out, say)
        with stage(f"{whose} images and captions"):
            say(f"  {by_headers(recipe)}")
            limit, usable = _look(recipe, out / "cache")
            said = [f"left out: {name}: {reason}" for name, reason in usable.index.quarantined]
            for line in [*said, *(caption_words(usable.index) if whose == "your" else ())]:
                say(f"  {line}")
            crops = amount(sum(len(p.crops) for p in usable.images), "crop")
            say(f"  the first {amount(len(usable.images), 'image')} of them looked at whole, {crops}")
            shutil.rmtree(out / "cache", ignore_errors=True)
            _check_captions(recipe)
    with stage("a tiny model of the same classes"):
        small = _small(recipe, family, out, limit)
    with stage("caches, training, validation, saving"):
        train(small)
    with stage("a run that is killed and continued ends the same"):
        _check_resume(small, train)
    if recipe.adapter is not None:
        _after_training(recipe, family, small, out, stage)
    say(f"rehearsed: {out}/")


def _after_training(recipe: Recipe, family: Family, small: Recipe, out: Path, stage: Stage) -> None:
    with stage("post-hoc averages"):
        widths = [0.075] if recipe.snapshot.ema else None
        average_run(out / "run", alphas=[0.5, 0.9], widths=widths, say=lambda line: None)
    with stage("CFG sweep"):
        how = small.sample
        grid = Grid(guiders_at((1.0, 3.0), names=[how.guider]), PROMPTS, (0,), solvers=(how.solver,))
        sweep(candidates_of(small, None), grid, out / "sweep", title="rehearsal", judge=None, say=lambda line: None)
        write_sweep_page(out / "sweep")
    with stage("merge into the base"):
        merge_adapter(small, last_weights(out / "run"), out / "merged", dtype="fp32")
        merged = small.model.model_copy(update={"path": str(out / "merged")})
        family.load(merged, seed=0)
    with stage("export of the merged model and of the adapter"):
        for format in formats_of(family.spec):
            export_model(out / "merged", out / "exported" / format, format)
        loras = ("lycoris", "peft", *(("kohya",) if family.spec.names else ()))
        adapter_formats = ("lycoris", "transformer") if recipe.adapter and recipe.adapter.kind == "lokr" else loras
        for format in adapter_formats:
            file = out / "exported" / f"adapter-{format}.safetensors"
            export_adapter(last_weights(out / "run"), file, format, out / "merged")


def _stages(out: Path, say: Say) -> Stage:
    """A context for each stage: says how long it took, keeps its chatter in a log, names the stage in errors."""

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start, heard = time.monotonic(), io.StringIO()
        try:
            with redirect_stderr(heard), redirect_stdout(heard):
                yield
        except (UserError, OSError, SafetensorError) as e:
            message = e if isinstance(e, UserError) else f"cannot write in '{out}': {e}"
            place = f"(rehearsal, stage '{name}'; see {out}/rehearsal.log)"
            raise UserError(f"{message}\n{place}", getattr(e, "exit_code", 1)) from e
        finally:
            with open(out / "rehearsal.log", "a") as log:
                log.write(f"== {name}\n{heard.getvalue()}")
        say(f"ok  {time.monotonic() - start:5.1f} s  {name}")

    return stage


def _with_samples(recipe: Recipe, out: Path, say: Say) -> tuple[Recipe, str]:
    """``recipe`` on sample images of the package's own where a shipped recipe names places that are not there.

    A place that the user named is looked at, whatever is there. Also returns whose images they are.
    """
    sets = recipe.data.sets
    named = any(not is_shipped(recipe.place(f"data.sets.{i}.path")) or Path(s.path).exists() for i, s in enumerate(sets))
    if named:
        return recipe, "your"
    count = write_samples(out / "images", *SAMPLE_SIDES)
    say(f"no images in '{sets[0].path}' yet: rehearsing on {count} sample images of the package's own, in {out}/images")
    return _copy(recipe, data={"sets": [sets[0].model_copy(update={"path": str(out / "images")})]}), "sample"


def _look(recipe: Recipe, cache: Path) -> tuple[int | None, Usable]:
    """How many first images of each set are enough to train on, and a look at these."""
    for limit in (IMAGES, 10 * IMAGES):
        with suppress(UserError):
            usable = look(_copy(recipe, data={"cache": str(cache), "limit": limit}), lambda line: None)
            if len({p.sample.source for p in usable.split.train}) == len(recipe.data.sets):
                return limit, usable
    return recipe.data.limit, look(_copy(recipe, data={"cache": str(cache)}), lambda line: None)


def _check_reachable(recipe: Recipe) -> None:
    """Settings that no step of the run would ever come to."""
    intervals = {"validate": recipe.validate_.every, "meters": recipe.meters.every, "snapshot": recipe.snapshot.every}
    intervals |= {"preview": recipe.preview.every, "checkpoint": recipe.checkpoint.every}
    late = {f"{key}.every": every for key, every in intervals.items() if every > recipe.train.steps}
    for first, every in list(late.items())[:1]:
        others = "".join(f", nor is {key} ({n:,})" for key, n in late.items() if key != first)
        raise UserError(
            f"{recipe.place(first, 'train.steps')}: {first}: {every:,} is never reached{others}; "
            f"train.steps is {recipe.train.steps:,}. Set lower ones, or 0 for none",
            2,
        )


def _check_captions(recipe: Recipe) -> None:
    """Of all images, not only of those looked at."""
    missing = without_captions(recipe)
    if missing and recipe.data.missing_captions == "error":
        raise UserError(
            f"{recipe.where('data.sets')}: {amount(len(missing), 'image has', 'images have')} no caption, "
            f"e.g. {missing[0]}; write captions, or set data.missing_captions"
        )


def _small(recipe: Recipe, family: Family, out: Path, limit: int | None) -> Recipe:
    """The same recipe on a tiny model, a few steps, small images."""
    model: dict[str, str | None] = {}
    images = recipe.data.source == "pictures"
    if recipe.model.new is None:
        write_small_model(recipe, family, out / "model", None if images else open_source(recipe.data).image)
        model = {"path": str(out / "model"), "revision": None, "components": None}
        model["image_prompts"] = recipe.model.image_prompts and str(out / "model" / "image_prompts")
    data = {"cache": str(out / "cache"), "limit": limit} if images else {}
    return shrink(recipe, run=out / "run", model=model, data=data, small_images=images)


def write_small_model(recipe: Recipe, family: Family, folder: Path, image: tuple[int, int, int] | None) -> None:
    """A tiny random model of the classes of ``recipe``'s. image: the shape of samples where the data give it."""
    # blocks that the recipe names one by one must be there
    numbered = recipe.adapter is not None and any(re.search(r"\d", t.pattern or "") for t in recipe.adapter.targets)
    family.write_tiny(recipe.model, folder, image, full_depth=numbered)


def shrink(recipe: Recipe, *, run: Path, model: dict[str, Any], data: dict[str, Any], small_images: bool) -> Recipe:
    """``recipe`` for a few steps, and small images where their size is free. run: its folder; model, data: keys of these."""
    every = {"every": STEPS // 2}
    some = recipe.train.gradient_checkpointing
    few = some if isinstance(some, bool) else True if some == "auto" else min(some, FEW_BLOCKS)
    train = {"steps": STEPS, "batch": 4, "micro_batch": 2, "warmup": min(recipe.train.warmup, 1), "gradient_checkpointing": few}
    if recipe.data.source == "pictures":
        count = len(filled(recipe.data.resolutions, "data.resolutions"))
        data = data | {"resolutions": [SMALL + 16 * i for i in range(count)]}
    targets = [_small_target(target) for target in recipe.adapter.targets] if recipe.adapter else []
    return _copy(
        recipe,
        run={"out": str(run), "resume": "auto"},
        model=model,
        **({"adapter": {"targets": targets}} if targets else {}),
        base={"swap": FEW_BLOCKS if recipe.base.swap == "auto" else min(recipe.base.swap, FEW_BLOCKS)},
        data=data,
        train=train,
        validate_=every | {"samples": 4} if recipe.validate_.every else {},
        meters=every | {"samples": 2, "steps": 2} if recipe.meters.every else {},
        online=every | {"pairs": 16, "steps": 2} if recipe.online.every else {},
        checkpoint=every,
        snapshot={"every": 1},
        log={"every": 1, "wandb": False},
        sample={
            "steps": 2,
            "guider": _small_guider(recipe.sample.guider),
            **({"height": SMALL, "width": SMALL} if small_images else {}),
        },
        preview=every if recipe.preview.every else {},
    )


def _small_target(target: Target) -> Target:
    return target.model_copy(update={"rank": min(target.rank, RANK)}) if isinstance(target.rank, int) else target


def _small_guider(name: str) -> str:
    """The guider of that name for few blocks and snapshots."""
    guider = guider_of(name)
    if isinstance(guider, Autoguidance) and guider.step:
        return "auto:step=1"
    return "skip_layers:blocks=0" if isinstance(guider, SkipLayers) else name


def _copy(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
    """A recipe with some keys of some tables changed; it still knows its file and lines."""
    changed = {name: getattr(recipe, name).model_copy(update=keys) for name, keys in tables.items()}
    return resolve(recipe.model_copy(update=changed))


def _check_resume(small: Recipe, train: Callable[[Recipe], None]) -> None:
    """Throw the last checkpoint away, as a kill would, and train on: the weights must come out the same to the bit."""
    checkpoints = list_checkpoints(Path(small.run.out) / "checkpoints")
    file = checkpoints[-1] / "trainable.safetensors"
    before = read_tensors(file)[0]
    shutil.rmtree(checkpoints[-1])
    train(small)
    after = read_tensors(file)[0]
    if differing := [name for name in before if not torch.equal(before[name], after[name])]:
        raise UserError(
            f"the continued run differs from the whole one in {amount(len(differing), 'tensor')}, e.g. {differing[0]}"
        )
