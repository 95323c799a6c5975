"""What started this process: alone or as one of several, by which command, and whether that is what came of it."""

import json
import os
import shlex
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedistill.distributed.outside import launched
from dedistill.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dedistill.distributed.world import World

# --- the DeepSpeed file that a launcher names ------------------------------------------------------------------------


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


def zero_settings() -> dict[str, int]:
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


def _problem(table: object) -> str:
    """What keeps the file from being used; empty when nothing does."""
    if not isinstance(table, dict) or not isinstance(zero := table.get("zero_optimization"), dict):
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


# --- what started this process ---------------------------------------------------------------------------------------


REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""What accelerate says in the environment -> engines that are asked for by it and not supported."""
UNHEEDED = {
    ("FSDP_OFFLOAD_PARAMS", "true"): "parts stay on the GPU; leave fsdp_offload_params out",
    ("FSDP_RESHARD_AFTER_FORWARD", "false"): "a base that is kept whole saves nothing; leave fsdp_reshard_after_forward out",
    ("FSDP_ACTIVATION_CHECKPOINTING", "true"): "the recipe's train.gradient_checkpointing decides",
}
"""Settings of FSDP2 that nothing would come of -> what to do about them."""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


def ranks() -> int:
    """How many processes the environment says the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


MEMORY = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
"""How a user settles how torch keeps a GPU's memory; either will do."""


def choose_kernels(*, exact: bool) -> None:
    """Settle, before a GPU is first used, which of torch's kernels a run may take there, and how torch keeps its memory.

    exact: the same bits on every run, at the price of slower attention backward.
    """
    # torch's memory in pieces of any size, not in ones that the next shape of images does not fit
    if not any(name in os.environ for name in MEMORY):
        os.environ[MEMORY[0]] = "expandable_segments:True"
    import torch

    # cuDNN's attention backward (torch 2.11, H100 and H200) reads a gradient as if it lay in memory as the output does: where
    # it does not, wrong gradients, NaN or an illegal memory access, after a loss that is right.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if exact and torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


LARGEST_ON_CPU = 1_000_000_000
"""Parameters; a step of more takes minutes there."""


def hide_gpus() -> None:
    """Choose the CPU, whatever there is. Call before torch is imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def require_gpu(parameters: Callable[[], int]) -> None:
    """Raises UserError where what is meant for GPUs would go to the CPU because torch sees none, unless that was chosen: by
    ``--cpu`` (of dedistill or of accelerate), or a CUDA_VISIBLE_DEVICES without a device.

    parameters: counts those of the network.
    """
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")[0] in ("", "-1")
    if hidden or _set("ACCELERATE_USE_CPU", "true") or torch.cuda.is_available():
        return
    if ranks() > 1:
        what, instead = f"the launcher starts {ranks()} processes for GPUs", "add --cpu, or launch with launch/cpu_2.yaml"
    elif (count := parameters()) > LARGEST_ON_CPU:
        what, instead = f"the network has {count / 1e9:.1f} billion parameters", "add --cpu; a step may take minutes"
    else:
        return
    raise UserError(
        f"{what}, but torch {torch.__version__} finds no GPU: install a torch made for CUDA, or mend the driver until "
        f"nvidia-smi shows one. To use the CPU all the same, {instead}",
        exit_code=2,
    )


def start(*, cpu: bool, **options: Any) -> "tuple[Accelerator, World]":
    """Join the other processes of the run. options: of accelerate.Accelerator.

    Raises UserError when an engine is asked for that is not supported, or when the processes that were asked for are not
    there: several ways of launching start one process, or many that know nothing of each other, without saying so.
    """
    from accelerate import Accelerator

    from dedistill.distributed.world import World

    engine = engine_asked()
    _hide_engine()
    with World().translate_dist_errors():
        accelerator = Accelerator(cpu=cpu, **options)
        world = World.joined()
    wanted = max(ranks(), promised(os.getppid()))
    if not wanted == world.size == accelerator.num_processes:
        raise UserError(
            f"the launcher was to start {wanted} processes, but this one is of {world.size}. On a CPU, use launch/cpu_2.yaml "
            "(accelerate starts one process for distributed_type MULTI_CPU and for --cpu).",
            exit_code=2,
        )
    if engine != "ddp" and world.size == 1:
        raise UserError(f"one process alone has nobody to share the work of {engine} with: use launch/gpu_1.yaml", exit_code=2)
    world.engine = engine
    return accelerator, world


def engine_asked() -> str:
    """What accelerate's environment asks for: "ddp", "fsdp2", "zero2", "zero3". Raises UserError for what is not supported."""
    for variable, engine in REFUSED.items():
        if _set(variable, "true"):
            raise UserError(
                f"the launcher asks for {engine}, which is refused (docs/engines.md). Use launch/ddp.yaml, "
                "or launch/fsdp2.yaml to spread the base over the GPUs.",
                exit_code=2,
            )
    if _set("ACCELERATE_USE_DEEPSPEED", "true"):
        return f"zero{zero_settings()['stage']}"
    if not _set("ACCELERATE_USE_FSDP", "true"):
        return "ddp"
    if not _set("FSDP_VERSION", "2"):
        raise UserError(
            "the launcher asks for FSDP 1, which is refused: it holds no int8. Set fsdp_version: 2, as launch/fsdp2.yaml does.",
            exit_code=2,
        )
    for (variable, value), advice in UNHEEDED.items():
        if _set(variable, value):
            raise UserError(f"the launcher sets {variable}={value}, which is refused: {advice}", exit_code=2)
    return "fsdp2"


def _set(variable: str, value: str) -> bool:
    return os.environ.get(variable, "").lower() == value


def _hide_engine() -> None:
    """Sharding is done here: accelerate is not to wrap anything, nor transformers to shard text encoders or leave them
    empty on all ranks but the first, as both do where they see these variables."""
    ours = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    for name in [n for n in os.environ if n in ours or n.startswith("FSDP_")]:
        del os.environ[name]


def only_first() -> bool:
    """For work of one process: whether this is the one to do it. That one is then alone, whatever started it."""
    if ranks() == 1:
        return True
    first = os.environ["RANK"] == "0"
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    _hide_engine()
    return first


def promised(launcher: int) -> int:
    """The processes that ``accelerate launch`` was to start, by its options or its config file; 0 where that is not known."""
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.config.config_args import default_config_file

    words = _words(launcher) if launched() else []
    if "launch" not in words:
        return 0
    if processes := _option(words, "--num_processes"):
        return int(processes)
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
        known = {"bin/dedistill": ["dedistill", "train"], "dedistill/__main__.py": ["python", "-m", "dedistill", "train"]}
        started = "/".join(Path(sys.argv[0]).parts[-2:])
        return shlex.join([*known.get(started, ["python", "-m", "dedistill.train"]), *argv])
    words = _words(os.getppid()) or ["accelerate", "launch", "-m"]
    return shlex.join(words if "dedistill" in words[:3] else [*words, "dedistill.train", *argv])


def _words(process: int) -> list[str]:
    """The launcher's own command up to the program it starts, where the system shows it (Linux); empty elsewhere.

    Of ``dedistill launch``, which always starts training, the whole command.
    """
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")
    except (OSError, ValueError):
        return []
    for i, pair in enumerate(pairwise(words[:-1])):  # after the last word there is an empty one
        if Path(pair[0]).name == "dedistill" and pair[1] == "launch":
            return [*(["python", "-m"] if words[i - 1] == "-m" else []), "dedistill", *words[i + 1 : -1]]
    ours = (i for i, pair in enumerate(pairwise(words)) if pair[0] == "dedistill.train" or pair == ("dedistill", "train"))
    words = words[: next(ours, 0)]
    for i, word in enumerate(words):
        if Path(word).name in ("accelerate", "torchrun"):
            return [Path(word).name, *words[i + 1 :]]
    return []
