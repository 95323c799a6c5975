"""What "auto" becomes in a recipe: as few blocks computed again, and then as few waiting in the memory of the CPU, as fit."""

import math
from typing import cast

from dedistill.distributed.world import World
from dedistill.forecast.cards import FITS, GIB, SPLIT, fit
from dedistill.forecast.forecast import Outlook, Outlooks, Setting, case_of, setting_of, swapped, swapped_to_fit
from dedistill.models.registry import get_family
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import settled

LATER = 0.2 * GIB
"""Of the memory that is free at the start: what CUDA takes for itself once kernels run."""
TRIES = 3
"""Numbers of blocks that are looked at between none and all."""


def left_to_choose(recipe: Recipe) -> list[str]:
    """The keys that ``recipe`` leaves to the forecast."""
    said = {"train.gradient_checkpointing": recipe.train.gradient_checkpointing, "base.swap": recipe.base.swap}
    return [key for key, value in said.items() if value == "auto"]


def became(recipe: Recipe, setting: Setting) -> dict[str, int]:
    """What each key that ``recipe`` leaves to the forecast is in ``setting``."""
    values = {"train.gradient_checkpointing": setting.checkpointing, "base.swap": setting.swap}
    return {key: values[key] for key in left_to_choose(recipe)}


class Choices(Outlooks):
    """What comes of the case's recipe on one card or another."""

    def __call__(self, room: float, tries: int = TRIES) -> Outlook:
        """With the least work that fits where torch may take ``room`` bytes; with the least memory where nothing does.

        tries: fewer take less time, and may have more blocks computed again than must be.
        """
        recipe = self.case.recipe
        # nothing is known of what compiled blocks keep for their gradients
        if recipe.train.gradient_checkpointing == "auto" and recipe.base.swap in (0, "auto") and recipe.train.compile == "none":
            if fit((none := self._at(False)).peak, room) == FITS:
                return none
            if fit((every := self._at(True)).peak, room) == FITS:
                return self._between(none, every, room, tries)
        found = self._at(True)
        if recipe.base.swap != "auto":
            return found
        return swapped_to_fit(found, room) or swapped(found, len(found.estimate.blocks))

    def _between(self, none: Outlook, every: Outlook, room: float, tries: int) -> Outlook:
        """As few blocks computed again as fit: ``none`` does not, ``every`` does. Looks where a straight line would end."""
        low, high = (0, none), (len(none.estimate.blocks), every)
        for _ in range(tries):
            if high[0] - low[0] <= 1:
                break
            share = (low[1].peak - room / SPLIT) / (low[1].peak - high[1].peak)
            count = min(low[0] + max(1, math.ceil(share * (high[0] - low[0]))), high[0] - 1)
            found = self._at(count)
            low, high = (low, (count, found)) if fit(found.peak, room) == FITS else ((count, found), high)
        return high[1]

    def _at(self, checkpointing: bool | int) -> Outlook:
        """With no more blocks waiting on the CPU than the recipe says itself."""
        return self.of(settled(self.case.recipe, checkpointing=checkpointing))


def settle(recipe: Recipe, free: int | None, world: World, *, in_parts: bool = False) -> tuple[Recipe, dict[str, float]]:
    """``recipe`` as it is trained where a device has ``free`` bytes (None: a CPU), and what "auto" became, for plan.json.

    The same on all processes of ``world``: the one with the least memory decides. Takes up to half a minute where the recipe
    says "auto". in_parts: each process holds a part of every block, of which none waits.
    """
    if not left_to_choose(recipe):
        return recipe, {}
    least = min((there for there in world.gather(free) if there is not None), default=None)
    swap, again = 0, cast(bool | int, False)
    memory: dict[str, float] = {}
    if least is not None and world.main:
        family = get_family(recipe.model.family, recipe.where("model.family"))
        without = recipe.model_copy(update={"base": recipe.base.model_copy(update={"swap": 0})}) if in_parts else recipe
        best = Choices(case_of(without, family, family.full_size(recipe.model)))(least - LATER)
        swap, again = best.setting.swap, best.setting.checkpointing
        memory = {"free_gib": round(least / GIB, 2), "forecast_gib": round(best.peak / GIB, 2)}
    swap, again = world.broadcast_object((swap, again))
    memory = world.broadcast_object(memory)
    done = settled(recipe, swap=swap, checkpointing=again)
    return done, {**became(recipe, setting_of(done)), **memory}
