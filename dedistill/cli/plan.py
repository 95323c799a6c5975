"""Every number of a run that is known before it starts, what it needs, and what a start would refuse; needs no GPU.

dedistill plan my_recipe.toml
dedistill plan my_recipe.toml --card 24      # what lets it train on a card of 24 GB
dedistill plan my_recipe.toml --gpus 8       # what each of 8 GPUs needs, by the engine that spreads the work
dedistill plan my_chain --scale 0.01         # pairs, visits and days of a chain's stages, on each card
"""

import json
import math
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dedistill.cli.command import finite, guarded, positive_number, recipe_parser, run_recipe
from dedistill.errors import UserError, amount
from dedistill.models.registry import get_spec
from dedistill.recipe import Recipe
from dedistill.recipe.chain import chain_file
from dedistill.recipe.resolve import filled, make_plan, settled, shifts
from dedistill.runs.missing import missing_inputs

if TYPE_CHECKING:
    from dedistill.forecast.forecast import Outlook
    from dedistill.forecast.paper import Case
    from dedistill.models.family import Components, Family

T = TypeVar("T")
Facts = dict[str, Any]
"""What is printed, or with --json given as data."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for what a start would refuse."""
    parser = recipe_parser("plan", __doc__)
    parser.add_argument("--card", type=finite, metavar="GB", help="show which settings fit a card of so much memory")
    parser.add_argument("--gpus", type=_several, metavar="N", help="show what each of N processes needs, one on each GPU")
    parser.add_argument("--no-forecast", action="store_true", help="leave out memory, work and cards, which take a minute")
    parser.add_argument("--json", action="store_true", help="the same as data, on stdout")
    chain = "of a chain: "
    parser.add_argument("--scale", type=positive_number, help=f"{chain}times the numbers that it lets scale; default its own")
    parser.add_argument(
        "--rate", type=positive_number, metavar="N", help=f"{chain}days at so many samples trained on per second"
    )
    args = parser.parse_args(argv)
    if chain_file(args.recipe).is_file():
        from dedistill.cli.plan_chain import plan_chain

        return guarded(lambda: plan_chain(args), debug=args.debug)
    how = {"card": args.card, "gpus": args.gpus, "data": args.json, "forecast": not args.no_forecast}
    return run_recipe(args, lambda recipe: plan(recipe, **how))


def _several(value: str) -> int:
    if not value.isdecimal() or int(value) < 2:
        raise ArgumentTypeError(f"'{value}' is no number of GPUs from 2 on")
    return int(value)


def plan(
    recipe: Recipe, *, card: float | None = None, gpus: int | None = None, data: bool = False, forecast: bool = True
) -> int:
    """Say, or with ``data`` print as JSON, what ``recipe`` comes to. Returns the exit code."""
    facts: Facts = {}
    refused = missing_inputs(recipe)
    say: Callable[[str], None] = (lambda text: None) if data else (lambda text: print(text, flush=True))
    for part in (_numbers, _inputs):
        part(recipe, facts, refused, say)
    before = len(refused)
    _network(recipe, facts, refused, say)
    if forecast and "network" in facts and len(refused) == before:
        _forecast(recipe, facts, say, card, gpus)
    facts["refused"] = refused
    if data:
        facts.pop("network", None)
        print(json.dumps(facts, indent=1))
    for message in refused:
        print(f"a start would refuse: {message}", file=sys.stderr)
    return 2 if refused else 0


def _tried(recipe: Recipe, refused: list[str], check: Callable[[], T]) -> T | None:
    """What ``check`` gives; None, with a word on it in ``refused``, where it is refused."""
    try:
        return check()
    except UserError as e:
        if (message := recipe.placed(str(e))) not in refused:
            refused.append(message)
        return None


# --- without a network -----------------------------------------------------------------------------------------------


def _numbers(recipe: Recipe, facts: Facts, refused: list[str], say: Callable[[str], None]) -> None:
    numbers = make_plan(recipe).as_dict()
    facts |= numbers
    say("\n".join(f"{key:12} {value:,}" for key, value in numbers.items()))
    spec = get_spec(recipe.model.family, recipe.where("model.family"))
    lpips = "train.lpips: its network, and decoding with gradients, are not in the memory and time below"
    if notes := [*filter(None, [shifts(recipe, lambda: spec.shift(recipe.model)), lpips if recipe.train.lpips else ""])]:
        facts["notes"] = notes
        say("\n".join(f"{'note':12} {note}" for note in notes))


def _inputs(recipe: Recipe, facts: Facts, refused: list[str], say: Callable[[str], None]) -> None:
    """The data, and the folder of the run."""
    from dedistill.runs.directory import RunDirectory

    _tried(recipe, refused, RunDirectory(recipe).check)
    if recipe.data.source != "pictures" or any("data.sets" in line for line in refused):
        return
    from dedistill.data.split import check_trained
    from dedistill.data.usable import look

    usable = _tried(recipe, refused, lambda: look(recipe, lambda line: print(line, file=sys.stderr)))
    if usable is None:
        return
    _tried(recipe, refused, lambda: check_trained(usable.split, len(recipe.data.sets)))
    if not usable.split.train:
        return
    crops = [crop for image in usable.images for crop in image.crops]
    captions = {caption for image in usable.images for caption in image.sample.captions}
    trained = len(usable.split.train)
    facts |= {
        "images": len(usable.images),
        "held_out": len(usable.split.held),
        "left_out": len(usable.index.quarantined),
        "crops": len(crops),
        "buckets": len({(crop.height, crop.width) for crop in crops}),
        "captions": len(captions),
        "epochs": round((1 - (recipe.data.pairs_share or 0)) * recipe.train.steps * recipe.train.batch / trained, 2),
    }
    out = f", {facts['left_out']:,} left out" if facts["left_out"] else ""
    say(f"{'images':12} {facts['images']:,}, {facts['held_out']:,} of them held out{out}")
    say(f"{'crops':12} {facts['crops']:,} of {amount(facts['buckets'], 'shape')}, {amount(facts['captions'], 'caption')}")
    say(f"{'epochs':12} {facts['epochs']:,}")


# --- the network, without its numbers --------------------------------------------------------------------------------


def _network(recipe: Recipe, facts: Facts, refused: list[str], say: Callable[[str], None]) -> None:
    """Layers and sizes of the network at full size, and its files as far as they are there."""
    from dedistill.forecast.sizes import check_room, sizes_of
    from dedistill.models.registry import get_family, looks_local, published, text_length

    family = get_family(recipe.model.family, recipe.where("model.family"))
    length, path = filled(recipe.model.text_length, "model.text_length"), recipe.model.path
    _tried(recipe, refused, lambda: text_length(family, length, recipe.where("model.text_length")))
    if missing := bool(path and looks_local(path) and not Path(path).exists()):
        if (named := published(family.spec, str(path), {})) is None:
            return say(f"{'memory':12} is forecast once the model is there")
        say(f"{'network':12} {named.id}, by the name of model.path")
    components = _tried(recipe, refused, lambda: family.full_size(recipe.model))
    if components is None:
        return None
    if path and not missing and (looks_local(path) or not recipe.model.revision):  # what is on the hub is fetched by a start
        _tried(recipe, refused, lambda: _check_parts(recipe, family))
    _tried(recipe, refused, lambda: _check_samples(recipe, family, components))
    sizes = _tried(recipe, refused, lambda: sizes_of(recipe, family, components.denoiser))
    if sizes is None:
        return None
    _tried(recipe, refused, lambda: check_room(recipe, sizes))
    facts |= {
        "network": (family, components),
        "network_parameters": sizes.network,
        "trained_parameters": sizes.trained,
        "adapted_layers": sizes.layers,
        "disk_gb": {
            "snapshots": _gb(sizes.snapshot * sizes.snapshots),
            "checkpoints": _gb(sizes.checkpoint * sizes.checkpoints),
            "merged_model": _gb(sizes.merged),
        },
    }
    say(f"{'trained':12} {sizes}")
    merged = f"; {_on_disk(sizes.merged)} more to merge the adapter" if sizes.merged else ""
    snapshots = f"{amount(sizes.snapshots, 'snapshot')} of {_on_disk(sizes.snapshot)}, " if sizes.snapshots else ""
    checkpoints = f"{amount(sizes.checkpoints, 'checkpoint')} of {_on_disk(sizes.checkpoint)}"
    say(f"{'disk':12} {_on_disk(sizes.kept)}: {snapshots}{checkpoints}{merged}")
    return _cache(recipe, facts, family, components, say)


def _check_parts(recipe: Recipe, family: "Family") -> None:
    """Raises UserError for what is beside the denoiser: text encoders, VAE, and a scheduler where a shift is "auto"."""
    from dedistill.data.encode import check_encoders, check_shifts

    components = family.load(recipe.model, seed=0, denoiser=False)
    check_encoders(components)
    check_shifts(recipe, family, components)


def _check_samples(recipe: Recipe, family: "Family", components: "Components") -> None:
    """Raises UserError where the data's samples, or what is asked of the network, are not what it takes."""
    from dedistill.data.encode import check_images, open_source
    from dedistill.models.model import check_asked, sampled_shape

    check_asked(recipe, family, components)
    shape = sampled_shape(recipe, family, components)
    if recipe.data.source != "pictures" and (not recipe.data.path or Path(recipe.data.path).exists()):
        check_images(recipe, open_source(recipe.data).image, shape)


def _cache(recipe: Recipe, facts: Facts, family: "Family", components: "Components", say: Callable[[str], None]) -> None:
    """Room for encoded images and captions, these at their longest."""
    if "captions" not in facts:
        return
    from dedistill.data.usable import look

    sides = [(crop.height, crop.width) for image in look(recipe, lambda line: None).images for crop in image.crops]
    shapes = {side: family.latent_shape(components, *side) for side in set(sides)}
    latents = sum(2 * shapes[side][0] * shapes[side][1] * shapes[side][2] for side in sides)
    widths, length = components.text.widths, filled(recipe.model.text_length, "model.text_length")
    texts = facts["captions"] * 2 * (length * sum(widths.sequences) + sum(widths.vectors.values()))
    facts["disk_gb"]["cache"] = _gb(latents + texts)
    say(f"{'cache':12} at most {_on_disk(latents + texts)}, with captions of {length} tokens")


def _gb(size: int) -> float:
    return round(size / 1e9, 2)


def _on_disk(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


# --- the step, on paper ----------------------------------------------------------------------------------------------


def _forecast(recipe: Recipe, facts: Facts, say: Callable[[str], None], card: float | None, gpus: int | None) -> None:
    from dedistill.forecast import forecast as f
    from dedistill.forecast.cards import room_on
    from dedistill.forecast.choose import Choices, became

    family, components = facts["network"]
    choices = Choices(f.case_of(recipe, family, components))
    setting = choices(room_on(card or math.inf)).setting
    if auto := became(recipe, setting):
        facts["auto"] = auto
        where = "where there is room for all; --card N shows what N GB allow" if card is None else f"on a card of {card:g} GB"
        say(f"{'auto':12} {', '.join(f'{key} = {_toml(value)}' for key, value in auto.items())} {where}")
    case, here = choices.case, settled(recipe, swap=setting.swap, checkpointing=setting.checkpointing)
    own = choices.of(here, whole=True)
    memory = f.memory_facts(own, f.beside(recipe, family), previews=bool(recipe.preview.every))
    facts["memory"], facts["cards"] = memory, f.card_facts(lambda card: choices(room_on(card.gb), tries=0))
    say(_memory_lines(memory))
    if gpus:
        facts["each_of_gpus"] = _each_of_gpus(replace(case, recipe=here), choices.decoding, gpus, say)
    found = list(choices.others(here, all_of_them=card is not None))
    facts["step"] = f.step_facts(own, min(o.step.operations for o in [own, *found]))
    facts["other_settings"] = f.other_facts(found)
    say(_step_line(facts["step"], case.image, case.length))
    if recipe.online.every:
        online = facts["online"] = f.online_facts(recipe, own, case.image)
        say(
            f"{'online':12} {online['pairs']:,} pairs made while training, {online['nfe']} calls of the network each: "
            f"{online['share_of_steps']:.0%} of the work of all steps beside it; {_on_disk(int(1e9 * online['disk_gb']))}"
        )
    if card is None:
        say(_card_lines(facts["cards"], auto))
        return say(_setting_lines(f"{'settings':12} the same step with others:", found))
    facts["fitting"] = f.other_facts(fitting := f.fitting(own, found, card))
    if not fitting:
        return say(f"{'card':12} nothing fits {card:g} GB: take fewer or smaller adapters, or smaller images")
    return say(_setting_lines(f"{'card':12} of {card:g} GB, what fits, and no step takes less:", fitting, card))


def _each_of_gpus(case: "Case", decoded: int, gpus: int, say: Callable[[str], None]) -> list[Facts]:
    """What one of ``gpus`` processes needs under each engine. decoded: bytes for the image of a preview."""
    from dedistill.forecast.forecast import decoding, peak_facts
    from dedistill.forecast.spread import ENGINES, held

    say(f"{'gpus':12} on each of {gpus} (NCCL takes more beside it):")
    found: list[Facts] = []
    for engine in ENGINES:
        one = held(engine, case, gpus)
        if one.estimate is None:
            key, why = ("refused", one.refused) if one.refused else ("unknown", one.unknown)
            found.append({"engine": engine.name, key: why})
            say(f"{'':12} {engine.name:6} {f'refused: {why}' if one.refused else why}")
            continue
        facts = peak_facts(decoding(one.estimate, decoded))
        found.append({"engine": engine.name, **facts})
        parts = ", ".join(f"{name} {_size(size)}" for name, size in facts["by_category_gib"].items())
        fits = next((f"fits {gb} GB" for gb, fit in facts["cards"].items() if fit == "fits"), "fits no card of the table")
        say(f"{'':12} {engine.name:6} {_size(facts['peak_gib'])} at the peak ({facts['where']}), {fits}: {parts}")
    return found


def _toml(value: object) -> str:
    return str(value).lower()


def _memory_lines(memory: Facts) -> str:
    from dedistill.models.family import DECODING

    def waiting(name: str) -> str:
        least, how = memory["at_least_gib"].get(name), "in tiles" if name == DECODING else "blocks wait on the CPU"
        return f", {_size(least)} where the card has no room for more: {how}" if least else ""

    parts = ", ".join(f"{name} {_size(size)}" for name, size in memory["by_category_gib"].items())
    held = f"{_size(memory['reserved_gib'])} with what the allocator holds, {_size(memory['context_gib'])} beside it"
    lines = [
        f"{'memory':12} {_size(memory['peak_gib'])} at the peak ({memory['where']}); {held}",
        f"{'':12} {parts}",
        *(f"{'':12} {_size(size)} while {name}{waiting(name)}" for name, size in memory["other_gib"].items()),
    ]
    return "\n".join(lines)


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB" if gib >= 0.01 else f"{gib * 1024:.2g} MiB"


def _work(tflop: float) -> str:
    return f"{tflop:,.0f} TFLOP" if tflop >= 100 else f"{tflop:.3g} TFLOP" if tflop >= 1 else f"{tflop * 1000:.3g} GFLOP"


def _step_line(step: Facts, image: tuple[int, ...], length: int) -> str:
    size = " x ".join(map(str, image))
    return (
        f"{'step':12} {_work(step['tflop'])}, {_work(step['useful_tflop'])} without recomputation; {step['gigabytes']:,} GB "
        f"moved, {step['kernels']:,} kernels; for the largest samples, {size} and {length} tokens"
    )


def _card_lines(cards: list[Facts], auto: Iterable[str]) -> str:
    """auto: keys of which each card's own value is shown."""
    head = f"{'cards':12} {'':12} {'memory':>7}  {'':5} a step takes at least, by published rates"
    rows = [
        f"{'':12} {c['card']:12} {c['gb']:4} GB  {c['fit']:5} {_seconds(c['seconds']):>12}"
        + "".join(f"  {key} = {_toml(c[key.rpartition('.')[2]])}" for key in auto)
        for c in cards
    ]
    return "\n".join([head, *rows])


def _seconds(number: float | None) -> str:
    return "has no fp8" if number is None else f"{number:.3g} s"


def _setting_lines(head: str, found: "list[Outlook]", gb: float | None = None) -> str:
    """gb: of a card, of whose like at least so many seconds a step are shown."""
    from dedistill.forecast.cards import CARDS, GIB

    width = max(len(str(o.setting)) for o in found)
    cards = [card for card in CARDS if card.gb == gb]
    rows = [
        f"{'':12} {o.setting!s:{width}} {_size(o.peak / GIB):>10} {_work(o.step.operations / 1e12):>14}"
        + "".join(f"  {card.name} {_seconds(card.seconds(o.step) if card.does(o.step) else None)}" for card in cards)
        for o in found
    ]
    return "\n".join([head, *rows])
