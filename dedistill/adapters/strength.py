"""How strong an adapter is where its file's header says so: PEFT's config, as diffusers and SimpleTuner keep it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
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
    alphas = _setting(config, "lora_alpha" if "lora_alpha" in config else "alpha", "alpha_pattern", source)
    ranks = _setting(config, "r", "rank_pattern", source)
    for name, factors in found.items():
        if "diff" in factors:
            continue
        alpha, inner = alphas.of(name), ranks.of(name)
        if not inner > 0:
            raise UserError(f"'{source}': '{name}' has rank {inner:g} by its header ({PEFT_CONFIG})")
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


@dataclass(frozen=True)
class _Setting:
    """A number of PEFT's config, and those of layers that it names by patterns: the first that ends a name counts."""

    value: float
    special: list[tuple[re.Pattern[str], float]]

    def of(self, name: str) -> float:
        return next((value for pattern, value in self.special if pattern.match(name)), self.value)


def _setting(config: Mapping[str, Any], key: str, patterns: str, source: str) -> _Setting:
    try:
        special = dict(config.get(patterns) or {})
        if len(special) > MOST_PATTERNS or any(_SLOW.search(pattern) for pattern in special):
            raise ValueError(f"more than {MOST_PATTERNS:,} patterns, or one that may take for ever to match")
        found = [(re.compile(rf"(.*\.)?({pattern})$"), float(value)) for pattern, value in special.items()]
        return _Setting(float(config.get(key, 8)), found)
    except (AttributeError, TypeError, ValueError, ArithmeticError, RecursionError, re.error) as e:
        raise UserError(f"'{source}': {key} or {patterns} in its header ({PEFT_CONFIG}) cannot be read: {e}") from e


MOST_PATTERNS = 10_000
_SLOW = re.compile(r"\)[*+{]|([*+{].*){5}|\\\d", re.DOTALL)
"""A group that is repeated, more than four repetitions, or what an earlier group matched once more."""


def _give(factors: dict[str, Tensor], alpha: float, name: str, source: str) -> None:
    if (own := float(factors.get("alpha", alpha))) != alpha:
        raise UserError(
            f"'{source}': the alpha of '{name}' is {own:g} by its tensor and {alpha:g} by its header ({PEFT_CONFIG}): "
            "which strength is meant is not known"
        )
    factors["alpha"] = torch.tensor(alpha)
