"""Every number of a run decided before it starts. No torch."""

from dataclasses import asdict, dataclass

from dedistill.recipe.schema import Recipe


@dataclass(frozen=True)
class Plan:
    steps: int
    batch: int
    micro_batch: int
    micro_steps: int
    samples: int
    checkpoints: int
    snapshots: int
    validations: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def make_plan(recipe: Recipe) -> Plan:
    """What ``recipe`` amounts to on one process."""
    t = recipe.train
    micro = 1 if t.exact else t.micro_batch or t.batch

    def times(every: int) -> int:
        return -(-t.steps // every) if every else 0

    return Plan(
        steps=t.steps,
        batch=t.batch,
        micro_batch=micro,
        micro_steps=t.batch // micro,
        samples=t.steps * t.batch,
        checkpoints=max(1, times(recipe.checkpoint.every)),
        snapshots=times(recipe.snapshot.every),
        validations=times(recipe.validate_.every),
    )
