"""What ``dedistill plan`` says of a chain: pairs, visits of samples, and days on each card."""

import json
from argparse import Namespace
from dataclasses import dataclass, field
from itertools import pairwise

from dedistill.cli.pairs import arguments
from dedistill.errors import UserError
from dedistill.flow.guidance import guider_of
from dedistill.forecast.cards import CARDS, NO, fit, room_on
from dedistill.forecast.choose import Choices
from dedistill.forecast.forecast import case_of
from dedistill.forecast.paper import BACKWARD, FORWARD, NORM, UPDATE
from dedistill.models.registry import get_family
from dedistill.recipe import Recipe, load_recipe
from dedistill.recipe.chain import load_chain
from dedistill.recipe.resolve import make_plan
from dedistill.sampling.sampler import Sampling
from dedistill.training.online import planned

DAY, WEEK = 86_400, 7


@dataclass
class StageCost:
    """What a stage comes to."""

    name: str
    pairs: int = 0
    nfe: int = 0
    """Calls of the network for each pair."""
    visits: int = 0
    """Samples that are trained on, each as often as it is."""
    share: float = 0.0
    """Operations of a call, of those of training on one sample."""
    seconds: dict[str, float] = field(default_factory=dict)
    """At least, on one card by name, of those that have its arithmetic; empty where nothing is known of the network."""
    fits: dict[str, str] = field(default_factory=dict)

    def days_at(self, rate: float) -> float:
        """On a card that trains on ``rate`` samples a second, and calls the network at as many operations a second."""
        return (self.visits + self.pairs * self.nfe * self.share) / rate / DAY


def plan_chain(args: Namespace) -> int:
    """Print what the chain ``args.recipe`` comes to at ``args.scale`` and ``args.rate``."""
    chain = load_chain(args.recipe)
    scale = args.scale or chain.scale
    known: dict[str, Choices] = {}
    words = [(stage.name, chain.words(stage, scale)) for stage in chain.stages]
    costs = [_cost(name, command, known) for name, command in words if command[0] in ("train", "pairs")]
    if args.json:
        print(json.dumps({"scale": scale, "stages": [vars(cost) for cost in costs]}, indent=1))
        return 0
    print(f"{'scale':16} {scale:g}")
    print("\n".join(_stage_lines(costs)))
    if all(cost.seconds for cost in costs):
        print("\n".join(_card_lines(costs, scale)))
    else:
        unknown = ", ".join(cost.name for cost in costs if not cost.seconds)
        print(f"{'cards':16} are forecast once the models of these stages are there: {unknown}")
    if args.rate:
        days = {cost.name: cost.days_at(args.rate) for cost in costs}
        listed = ", ".join(f"{name} {_days(n)}" for name, n in days.items())
        print(f"{'days of one':16} {_days(sum(days.values()))} at {args.rate:g} samples trained on per second: {listed}")
    return 0


def _cost(name: str, words: list[str], known: dict[str, Choices]) -> StageCost:
    """words: of the stage's command. known: networks that were looked at, by all that decides what a step of them takes."""
    place, rest = words[1], words[2:]
    recipe = load_recipe(place, [value for key, value in pairwise(rest) if key == "--set"])
    plan, cost = make_plan(recipe), StageCost(name)
    if words[0] == "train":
        cost.visits = plan.steps * recipe.train.batch
        cost.pairs, how = planned(recipe)
        cost.nfe = how.nfe() if cost.pairs else 0
    else:
        asked = arguments().parse_args(words[1:])
        guider = guider_of(asked.guider or recipe.sample.guider, asked.cfg)
        sampling = Sampling(solver=asked.solver or recipe.sample.solver, steps=asked.steps, guidance=guider)
        cost.pairs, cost.nfe = asked.count, sampling.nfe()
    try:
        choices = _choices(recipe, known)
    except UserError:  # of a network that an earlier stage is to make
        return cost
    for card in CARDS:
        found = choices(room_on(card.gb), tries=0)
        passes, update = found.estimate.total(FORWARD, BACKWARD), found.estimate.total(NORM, UPDATE)
        call = found.estimate.total(FORWARD)
        if not card.does(passes):
            continue
        cost.fits[card.name] = fit(found.peak, room_on(card.gb))
        cost.share = call.operations / passes.operations
        made = cost.pairs * cost.nfe * card.seconds(call) / plan.micro_batch
        trained = plan.steps * card.seconds(passes * plan.micro_steps + update) if cost.visits else 0
        cost.seconds[card.name] = made + trained
    return cost


def _choices(recipe: Recipe, known: dict[str, Choices]) -> Choices:
    """Of the network of ``recipe``, at its micro-batch. Raises UserError where its sizes are not known."""
    said = recipe.resolved()
    model = said["model"] | {"path": None, "revision": None}
    train = said["train"] | dict.fromkeys(("steps", "batch", "lr", "warmup", "schedule"))
    size = said["sample"]["height"], said["sample"]["width"], said["data"]["resolutions"]
    key = json.dumps([model, said["base"], said["adapter"], train, size, make_plan(recipe).micro_batch])
    if key not in known:
        family = get_family(recipe.model.family, recipe.where("model.family"))
        known[key] = Choices(case_of(recipe, family, family.full_size(recipe.model)))
    return known[key]


def _stage_lines(costs: list[StageCost]) -> list[str]:
    head = f"{'stage':16} {'pairs':>11} {'calls each':>11} {'visits':>12}"
    blank = lambda n: f"{n:,}" if n else ""  # noqa: E731
    rows = [f"{cost.name:16} {blank(cost.pairs):>11} {blank(cost.nfe):>11} {blank(cost.visits):>12}" for cost in costs]
    pairs, visits = sum(cost.pairs for cost in costs), sum(cost.visits for cost in costs)
    return [head, *rows, f"{'together':16} {pairs:>11,} {'':>11} {visits:>12,}"]


def _card_lines(costs: list[StageCost], scale: float) -> list[str]:
    """Days by published rates, which nothing undercuts, and the scale that a week would do at them."""
    head = f"{'cards':16} {'memory':>7}  {'':5} {'days of one, at least':>22}  {'scale in a week: of one':>24} {'of eight':>9}"
    rows = []
    for card in (c for c in CARDS if all(c.name in cost.seconds for cost in costs)):
        days = sum(cost.seconds[card.name] for cost in costs) / DAY
        fits = {cost.fits[card.name] for cost in costs if cost.visits}
        worst = NO if NO in fits else max(fits, default="")
        week = [f"{scale * WEEK * count / days:.2g}" for count in (1, 8)]
        rows.append(f"{card.name:16} {card.gb:4} GB  {worst:5} {_days(days):>22}  {week[0]:>24} {week[1]:>9}")
    return [head, *rows]


def _days(days: float) -> str:
    return f"{days:.1f}" if days >= 1 else f"{days:.2g}"
