"""What started this process: alone or as one of several, by which command, and whether that is what came of it."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedistill.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dedistill.world import World

ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""What accelerate says in the environment -> engines that are asked for by it, none of which is supported."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


def ranks() -> int:
    """How many processes the environment says the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """True under ``accelerate launch`` and ``torchrun``, which say so to their children in the environment."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def start(*, cpu: bool, **options: Any) -> "tuple[Accelerator, World]":
    """Join the other processes of the run. options: of accelerate.Accelerator.

    Raises UserError when an engine is asked for that is not supported, or when the processes that were asked for are not
    there: several ways of launching start one process, or many that know nothing of each other, without saying so.
    """
    from accelerate import Accelerator

    from dedistill.world import World

    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise UserError(
                f"the launcher asks for {engine}, which is refused: only gradients are shared between processes, "
                "each holds the whole base (docs/engines.md). Use launch/ddp.yaml.",
                exit_code=2,
            )
    accelerator = Accelerator(cpu=cpu, **options)
    world = World.joined()
    asked = max(ranks(), promised(os.getppid()))
    if not asked == world.size == accelerator.num_processes:
        raise UserError(
            f"the launcher was to start {asked} processes, but this one is of {world.size}. On a CPU, use launch/cpu_2.yaml "
            "(accelerate starts one process for distributed_type MULTI_CPU and for --cpu).",
            exit_code=2,
        )
    return accelerator, world


def only_first() -> bool:
    """For work of one process: whether this is the one to do it. That one is then alone, whatever started it."""
    if ranks() == 1:
        return True
    first = os.environ["RANK"] == "0"
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    return first


def promised(launcher: int) -> int:
    """The processes that ``accelerate launch`` was to start, by its options or its config file; 0 where that is not known."""
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.config.config_args import default_config_file

    words = _words(launcher) if launched() else []
    if "launch" not in words:
        return 0
    if said := _option(words, "--num_processes"):
        return int(said)
    file = _option(words, "--config_file") or default_config_file
    return load_config_from_file(file).num_processes if Path(file).is_file() else 0


def _option(words: list[str], name: str) -> str | None:
    """The value of an option, spelled with underscores or hyphens, apart or after an equals sign."""
    for word, after in zip(words, [*words[1:], None]):
        key, equals, value = word.partition("=")
        if key.replace("-", "_") == name.replace("-", "_"):
            return value if equals else after
    return None


def resume_command(argv: list[str]) -> str:
    """What to type to continue, with the launcher and its options if there was one. argv: the arguments of training."""
    if not launched():
        return shlex.join(["python", "-m", "dedistill.train", *argv])
    words = _words(os.getppid()) or ["accelerate", "launch", "-m"]
    return shlex.join([*words, "dedistill.train", *argv])


def _words(process: int) -> list[str]:
    """The launcher's own command up to the program it starts, where the system shows it (Linux); empty elsewhere."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
        words = words[: words.index("dedistill.train")]
    except (OSError, ValueError):
        return []
    for i, word in enumerate(words):
        if Path(word).name in ("accelerate", "torchrun"):
            return [Path(word).name, *words[i + 1 :]]
    return []
