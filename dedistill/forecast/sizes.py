"""What is trained, and how much room its files take: known from a recipe and the shapes of its network."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dedistill.adapters.targets import count_parameters
from dedistill.errors import UserError, amount
from dedistill.models.family import Family
from dedistill.models.model import adapted_layers
from dedistill.recipe import Recipe
from dedistill.recipe.resolve import make_plan


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, of layers and of bytes on the disk."""

    network: int
    trained: int
    layers: int
    """Linears with an adapter; 0 where the whole network is trained."""
    snapshot: int
    """Bytes of one, averages included."""
    snapshots: int
    """How many there will be."""
    checkpoint: int
    checkpoints: int
    """How many there are at once: one more than are kept, while one is written."""
    merged: int
    """Bytes of the base with the adapter merged into it, in bf16; 0 where the whole network is trained."""

    @property
    def kept(self) -> int:
        """Bytes of all that a run keeps."""
        return self.snapshot * self.snapshots + self.checkpoint * self.checkpoints

    def __str__(self) -> str:
        whole = f"all {self.trained:,} parameters are trained"
        layers = amount(self.layers, "layer")
        return f"{self.trained:,} trained parameters in {layers} of a network of {self.network:,}" if self.layers else whole


def sizes_of(recipe: Recipe, family: Family, denoiser: nn.Module) -> Sizes:
    """Of ``denoiser``, the recipe's of full size. Raises UserError for names in the recipe that it does not have."""
    network = sum(p.numel() for p in denoiser.parameters())
    targets = adapted_layers(recipe, family, denoiser)
    trained = count_parameters(targets, recipe.adapter.kind) if recipe.adapter else network
    number = 2 if recipe.train.optimizer == "adamw_bf16" else 4
    averages = 4 * len(recipe.snapshot.ema or [])  # float32
    return Sizes(
        network=network,
        trained=trained,
        layers=len(targets),
        snapshot=trained * (number + averages),
        snapshots=make_plan(recipe).snapshots,
        # the weights and two moments, and of bf16 weights what they round away, in float32
        checkpoint=trained * (number * 3 + averages + (4 if number == 2 else 0)),
        checkpoints=recipe.checkpoint.keep + 1,
        merged=2 * network if recipe.adapter else 0,
    )


def check_room(recipe: Recipe, sizes: Sizes) -> str:
    """What the run keeps, and what is free. Raises UserError where that is less."""
    out = Path(recipe.run.out).resolve()
    free = shutil.disk_usage(next(place for place in (out, *out.parents) if place.exists())).free
    files = f"{amount(sizes.snapshots, 'snapshot')} and {amount(recipe.checkpoint.keep, 'checkpoint')}"
    room = f"{sizes.kept / 1e9:.1f} GB for {files}, {free / 1e9:.0f} GB are free"
    if sizes.kept > free:
        raise UserError(f"{recipe.where('run.out')}: this run keeps {room}. Keep fewer (snapshot.every), or use another disk")
    return room
