"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598)."""

from torch import Tensor


def classifier_free(conditional: Tensor, unconditional: Tensor, cfg: float) -> Tensor:
    """v = v_uncond + cfg (v_cond - v_uncond). cfg = 1 is the conditional velocity."""
    return unconditional + cfg * (conditional - unconditional)


def needs_unconditional(cfg: float, index: int, skip: int) -> bool:
    """Whether solver step ``index`` (from 0) evaluates the unconditional branch.

    cfg = 1 never does; the first ``skip`` steps run without guidance, counted in steps, not in sigma.
    """
    return cfg != 1.0 and index >= skip
