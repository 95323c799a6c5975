"""Ways of sampling, for tests."""

from dedistill.flow.guidance import ClassifierFree
from dedistill.sampling.sampler import Sampling


def at(steps: int, cfg: float = 1.0, skip: int = 0) -> Sampling:
    """Euler's steps with classifier-free guidance at ``cfg``, from step ``skip`` on."""
    return Sampling(steps=steps, guidance=ClassifierFree(cfg, skip))
