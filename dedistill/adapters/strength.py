"""How strong an adapter is where its file's header says so: PEFT's config, as diffusers and SimpleTuner keep it."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dedistill.adapters.delta import rank
from dedistill.errors import UserError
from dedistill.io.json_files import parse_object

PEFT_CONFIG = "lora_adapter_metadata"
"""The header's entry. Its keys begin with the denoiser's folder, or are PEFT's own where a network saved itself."""


def with_alphas(
    layers: Mapping[str, Mapping[str, Tensor]], header: Mapping[str, str], source: str, folder: str
) -> dict[str, dict[str, Tensor]]:
    """``layers`` with the alpha that the header gives them, so that alpha / rank is their scale as PEFT applies it.

    Raises UserError, naming file and layer, for an unreadable config, one of a kind that cannot be applied, and where
    header and tensors contradict each other.
    """
    found = {name: dict(factors) for name, factors in layers.items()}
    if not (config := _config(header, source, folder)):
        return found
    if config.get("use_dora"):
        raise UserError(f"'{source}' is a DoRA, says its header; that is not supported: known are LoKr and LoRA")
    for name, factors in found.items():
        if "diff" in factors:
            continue
        alpha, inner = _alpha_and_rank(config, name, source)
        if "lora_up.weight" in factors:
            if inner != (own := rank(factors)):
                raise UserError(f"'{source}': '{name}' has rank {own}, and rank {inner:g} by its header ({PEFT_CONFIG})")
            _give(factors, alpha * inner**0.5 if config.get("use_rslora") else alpha, name, source)
        elif alpha != inner:
            raise UserError(
                f"'{source}': its header ({PEFT_CONFIG}) scales the LoKr of '{name}' by {alpha:g} / {inner:g}, which is not "
                "supported: save it with alpha = r"
            )
    return found


def _config(header: Mapping[str, str], source: str, folder: str) -> dict[str, Any]:
    if PEFT_CONFIG not in header:
        return {}
    whole = parse_object(header[PEFT_CONFIG], f"'{source}': {PEFT_CONFIG} in its header")
    own = {key.removeprefix(f"{folder}."): value for key, value in whole.items() if key.startswith(f"{folder}.")}
    return own or {key: value for key, value in whole.items() if "." not in key}


def _alpha_and_rank(config: Mapping[str, Any], name: str, source: str) -> tuple[float, float]:
    """PEFT's alpha and rank of layer ``name``: those of the first pattern that ends its name, else those of all."""
    both = (("lora_alpha" if "lora_alpha" in config else "alpha", "alpha_pattern", 8), ("r", "rank_pattern", 8))
    values = []
    for key, patterns, default in both:
        value = config.get(key, default)
        special = config.get(patterns) or {}
        try:
            value = next((v for pattern, v in special.items() if _ends(pattern, name)), value)
            values.append(float(value))
        except (AttributeError, TypeError, ValueError, ArithmeticError, re.error) as e:
            raise UserError(f"'{source}': {key} or {patterns} in its header ({PEFT_CONFIG}) cannot be read: {e}") from e
    if values[1] <= 0:
        raise UserError(f"'{source}': '{name}' has rank {values[1]:g} by its header ({PEFT_CONFIG})")
    return values[0], values[1]


def _ends(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _give(factors: dict[str, Tensor], alpha: float, name: str, source: str) -> None:
    if (own := float(factors.get("alpha", alpha))) != alpha:
        raise UserError(
            f"'{source}': the alpha of '{name}' is {own:g} by its tensor and {alpha:g} by its header ({PEFT_CONFIG}): "
            "which strength is meant is not known"
        )
    factors["alpha"] = torch.tensor(alpha)
