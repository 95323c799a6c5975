"""The DeepSpeed file that a launcher names: how ZeRO shards, and nothing that the recipe decides."""

import json
import os
from pathlib import Path
from typing import Any

from dedistill.errors import UserError

FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
"""Where accelerate says which file its ``deepspeed_config_file`` names."""
STAGES = (2, 3)
NUMBERS = {
    "reduce_bucket_size",
    "allgather_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
}
"""Settings of memory and speed, in elements, that change no result."""
FIXED = {
    "contiguous_gradients": True,
    "overlap_comm": False,
    "reduce_scatter": True,
    "round_robin_gradients": False,
    "memory_efficient_linear": False,  # would put another function in the place of torch's, which rounds bf16 in another way
}
"""What is given to DeepSpeed whatever its own defaults are, because it is what the tests run."""


def zero_settings() -> dict[str, Any]:
    """The table ``zero_optimization`` of the launcher's DeepSpeed file. Raises UserError, naming file and key, for anything
    that is decided elsewhere or not supported."""
    name = os.environ.get(FILE, "none")
    if name == "none":
        raise UserError(
            "the launcher asks for DeepSpeed without a deepspeed_config_file: use launch/zero2.yaml or zero3.yaml", 2
        )
    try:
        table = json.loads(Path(name).read_text())
    except OSError as e:
        raise UserError(f"deepspeed_config_file '{name}' cannot be read: {e.strerror}", 2) from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"deepspeed_config_file '{name}' is no JSON: {e}", 2) from e
    if problem := _problem(table):
        raise UserError(f"deepspeed_config_file '{name}': {problem}", 2)
    return table["zero_optimization"]


def _problem(table: Any) -> str:
    """What keeps the file from being used; empty when nothing does."""
    zero = table.get("zero_optimization") if isinstance(table, dict) else None
    if not isinstance(zero, dict):
        return "it has no table zero_optimization"
    if others := sorted(table.keys() - {"zero_optimization"}):
        return f"{others[0]} is refused: the recipe decides on batches, precision, optimizer, clipping and schedule"
    if zero.get("stage") not in STAGES or isinstance(zero["stage"], bool):
        return f"zero_optimization.stage is {zero.get('stage')!r}; 2 and 3 are supported (launch/ddp.yaml for none)"
    if unknown := sorted(zero.keys() - NUMBERS - {"stage"}):
        known = ", ".join(sorted(NUMBERS))
        return f"zero_optimization.{unknown[0]} is refused: nothing is offloaded, and only stage, {known} may be set"
    for key in sorted(zero.keys() & NUMBERS):
        if not isinstance(zero[key], int) or isinstance(zero[key], bool) or zero[key] < 0:
            return f"zero_optimization.{key} is {zero[key]!r}, not a whole number of elements"
    return ""
