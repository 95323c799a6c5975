"""Online reflow (arXiv 2209.03003): the model makes pairs of itself while it trains, and is trained on the newest."""

from pathlib import Path

import numpy as np

from dedistill.data.pairs import PairSource, open_shard
from dedistill.data.source import Source
from dedistill.distributed.outside import heartbeat
from dedistill.distributed.world import World, ceil_div
from dedistill.errors import UserError
from dedistill.flow.guidance import ClassifierFree
from dedistill.models.model import Model
from dedistill.recipe import Recipe
from dedistill.sampling.pairs import make_pairs, shard_file
from dedistill.sampling.sampler import Sampling

SHARDS = 8
"""Of a round: what so many processes share, and what one that is killed loses at most."""


def planned(recipe: Recipe) -> tuple[int, Sampling]:
    """Pairs that a run of ``recipe`` makes in all, and how."""
    online = recipe.online
    how = Sampling(solver=recipe.sample.solver, steps=online.steps, guidance=ClassifierFree(cfg=online.cfg))
    return (ceil_div(recipe.train.steps, online.every) * online.pairs if online.every else 0), how


class OnlinePairs(PairSource):
    """Pairs of the last rounds, in a folder that grows as dedistill pairs would write it. Those held out are the first round's.

    Round r is made by the weights as they are after r * ``every`` steps, its prompts and noise are keyed, and it is on disk
    before the next step: so what is trained on depends on the step alone, however often a run was stopped. The source of a
    mixture: a place that a step has in it says nothing of the round, which is therefore kept here.
    """

    def __init__(self, recipe: Recipe, model: Model, images: Source, folder: Path, world: World):
        """Makes the first round, by the weights that training starts from. images: whose captions are the prompts."""
        self.online, self.where, self.seed = recipe.online, recipe.where("online"), recipe.run.seed
        self.model, self.world, self.folder, self.run = model, world, folder, recipe.run.name
        self.count, self.how = planned(recipe)
        self._texts = images.prompts(self.seed, self.count)
        self.make(0)

    def prompts(self, seed: int, count: int) -> list[str]:
        return self._texts

    def due(self, step: int) -> bool:
        """Whether a round is to be made before ``step``, which is the next."""
        return step // self.online.every > self.round

    def make(self, step: int) -> None:
        """Make what is not there yet of the round of ``step``, and draw from it. All processes must come here."""
        self.round = step // self.online.every
        with heartbeat.during("making pairs"):
            make_pairs(
                self.model,
                self,
                self.folder,
                teacher=f"{self.run} while it trained",
                count=self.count,
                until=(self.round + 1) * self.online.pairs,
                sampling=self.how,
                points=1,
                seed=self.seed,
                shard_size=self.online.pairs // SHARDS,
                progress=lambda done, total: heartbeat.beat(),
                world=self.world,
            )
        super().__init__(self.folder, "online")
        first = max(0, self.round + 1 - self.online.keep) if self.online.keep else 0
        self.held_out_ids = self.held_out_ids[self.held_out_ids < self.ends[SHARDS - 1]]
        recent = np.arange(self.ends[first * SHARDS - 1] if first else 0, self.ends[-1])
        self.train_ids = np.setdiff1d(recent, self.held_out_ids)

    def rollback(self, step: int) -> None:
        """To what was there at ``step``, whose weights the model has: rounds of later ones are made anew when they come."""
        newest, between = divmod(step, self.online.every)
        if self.world.main:
            for file in self.folder.glob("*.tar"):
                if int(file.stem) >= (newest + 1) * SHARDS:
                    file.unlink()
            for number in range((newest + bool(between)) * SHARDS):
                self._require(number, step)
        self.world.wait()
        self.make(step)

    def _require(self, number: int, step: int) -> None:
        """Raises UserError where a shard is gone that only earlier weights could make."""
        file = shard_file(self.folder, number)
        try:
            open_shard(file)
        except (OSError, ValueError) as e:
            made = number // SHARDS * self.online.every
            raise UserError(
                f"{self.where}: '{file}' cannot be read ({e}): pairs that the model made of itself at step {made}, and left "
                f"behind for step {step}. Restore it, or delete the checkpoints after step {made}"
            ) from e
