"""What a run on a GPU is held against while it goes on: the memory that was forecast, and the operations that a step needs."""

from dataclasses import dataclass, replace

from dedistill.data.images.buckets import buckets_for
from dedistill.forecast.cards import GIB
from dedistill.forecast.depth import estimate
from dedistill.forecast.forecast import case_of, changed, setting_of
from dedistill.forecast.paper import BACKWARD, FORWARD, STEP, Case
from dedistill.forecast.spread import held
from dedistill.models.family import Components, Family
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import filled
from dedistill.runs.pace import Useful
from dedistill.training.engine import Engine

SHORT = 8
"""A short caption is so much shorter than the longest; between them operations grow as good as evenly."""


@dataclass(frozen=True)
class Expected:
    peak_gib: float
    """At most in use during a step of the largest samples, without validation."""
    useful: Useful


def expected(recipe: Recipe, family: Family, engine: type[Engine] = Engine, processes: int = 1) -> Expected:
    """Of ``recipe`` on one of so many GPUs; takes seconds, and no GPU. engine: one whose memory is known (spread.PARTS)."""
    components = family.full_size(recipe.model)
    case = case_of(recipe, family, components)
    found = held(engine, case, processes).estimate
    assert found, "what an engine refuses is refused before anything is loaded"
    peak = max(peak.bytes for (phase, _), peak in found.peaks.items() if phase in STEP)
    return Expected(round(peak / GIB, 3), useful_work(case, components))


def useful_work(case: Case, components: Components) -> Useful:
    """Measured once for each resolution, for a short and for the longest caption; shapes between are in proportion."""
    family, recipe = case.family, case.recipe
    micro = setting_of(recipe).micro_batch
    setting = replace(setting_of(recipe), checkpointing=False, swap=0)
    unvalidated = recipe.validate_.model_copy(update={"every": 0})
    plain = changed(recipe, setting).model_copy(update={"validate_": unvalidated})
    images = {case.image}
    if recipe.data.source == "pictures":
        sides = (buckets_for([side])[0] for side in filled(recipe.data.resolutions, "data.resolutions"))
        images = {family.latent_shape(components, *pair) for pair in sides}
    lengths = sorted({max(1, case.length // SHORT), case.length})
    points = {
        image: [
            estimate(replace(case, recipe=plain, image=image, length=n)).total(FORWARD, BACKWARD).operations / micro
            for n in lengths
        ]
        for image in images
    }

    def useful(shape: tuple[int, ...], length: int) -> float:
        tokens = family.tokens(components, shape)
        near = min(points, key=lambda image: abs(family.tokens(components, image) - tokens))
        low, high = points[near][0], points[near][-1]
        share = (length - lengths[0]) / max(1, lengths[-1] - lengths[0])
        return (low + share * (high - low)) * tokens / family.tokens(components, near)

    return useful
