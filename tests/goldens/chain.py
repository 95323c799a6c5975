"""Every number and every tensor of two small chains, through the commands: what a change of structure must not change.

    python tests/goldens/chain.py FILE        # record what this checkout does

Digits: teacher, pairs, student, de-distil, averages, merge, exports. FLUX: a tiny random model, int8 base and LoKr on own
images, averages, merge, exports. Each is trained on one process and on two. Sums in floating point depend on the
processor, so a record holds for processors with the same vector instructions only.
"""

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TEACHER = """
run = {name = "teacher", out = "teacher"}
data = {source = "digits", caption_noise = 0.2}
train = {steps = 40, batch = 16, lr = 6e-3, schedule = "cosine", warmup = 5, lr_floor = 0.02, max_grad_norm = 1.0}
validate = {every = 20, samples = 32}
checkpoint = {every = 20}
snapshot = {every = 20}
[model]
family = "pixel_flux"
mask = "none"
new = {height = 8, width = 16, patch = 4, layers = 1, single_layers = 1, heads = 2, head_dim = 16, rope_axes = [4, 6, 6]}
"""
STUDENT = """
run = {name = "student", out = "student"}
model = {family = "pixel_flux", path = "teacher/model", mask = "none"}
data = {source = "pairs", path = "pairs"}
train = {objective = "distill", steps = 20, batch = 16, lr = 1e-3, schedule = "linear", warmup = 3}
validate = {every = 10, samples = 16}
sample = {steps = 4}
"""
REFLOW = """
extends = "student.toml"
run = {name = "reflow", out = "reflow"}
train = {objective = "reflow"}
"""
DEDISTILL = """
run = {name = "dedistill", out = "dedistill"}
model = {family = "pixel_flux", path = "student/model", mask = "bool"}
base = {quant = "int8"}
data = {source = "digits", caption_noise = 0.2}
timesteps = {density = "beta"}
train = {steps = 24, batch = 16, lr = 3e-3, schedule = "cosine", warmup = 2, lr_floor = 0.02}
validate = {every = 8, samples = 32}
meters = {every = 12, samples = 8, steps = 4}
checkpoint = {every = 8}
snapshot = {every = 4, ema = [0.05, 0.10]}
[adapter]
kind = "lokr"
init = "perturbed_normal"
targets = [{preset = "blocks", factor = 4}]
"""
FLUX = """
run = {name = "flux", out = "flux"}
model = {family = "flux", path = "base", text_length = 64}
base = {quant = "int8"}
timesteps = {density = "logit_normal", shift = "auto"}
train = {steps = 8, batch = 6, micro_batch = 2, lr = 1e-2, optimizer = "adamw_bf16", precision = "bf16"}
validate = {every = 4, samples = 4}
checkpoint = {every = 4}
snapshot = {every = 2}
sample = {steps = 2, height = 64, width = 64}
[adapter]
kind = "lokr"
targets = [{preset = "modulation", factor = 4, rank = 2}, {preset = "attention", factor = 4}]
[data]
source = "pictures"
cache = "cache"
resolutions = [64, 96]
crops = ["aspect", "square"]
held_out = 0.2
[[data.sets]]
path = "photos"
"""
LORA = """
extends = "flux.toml"
run = {name = "lora", out = "lora"}
base = {quant = "none"}
adapter = {kind = "lora", targets = [{preset = "attention", rank = 2}]}
train = {optimizer = "adamw", precision = "fp32"}
"""
RECIPES = {"teacher": TEACHER, "student": STUDENT, "reflow": REFLOW, "dedistill": DEDISTILL, "flux": FLUX, "lora": LORA}


def record(folder: Path) -> dict:
    """The chains in ``folder``: {place: rows of metrics.jsonl, or digest of a file's tensors}."""
    from image_files import write_images

    for name, text in RECIPES.items():
        (folder / f"{name}.toml").write_text(text)
    _digits(folder)
    write_images(folder / "photos", 10)
    _write_tiny_flux(folder / "base")
    _flux(folder)
    return _read(folder)


def fingerprint() -> dict[str, str]:
    """What sums in floating point depend on beside the code."""
    import numpy
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "model": names[0].partition(":")[2].strip() if names else platform.processor(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def _write_tiny_flux(folder: Path) -> None:
    from dedistill.models.flux.tiny import write_tiny_flux

    write_tiny_flux(folder, guidance=True, layers=2, single_layers=2)


def _digits(folder: Path) -> None:
    _train(folder, "teacher")
    _train(folder, "teacher", 2)
    _tool(folder, "make_pairs", "teacher.toml", "--out", "pairs", "--count", "64", "--steps", "8", "--points", "4")
    _train(folder, "student")
    _train(folder, "reflow")
    _train(folder, "dedistill")
    _train(folder, "dedistill", 2)
    _tool(folder, "posthoc_ema", "dedistill")
    _tool(folder, "posthoc_ema", "dedistill", "--sigma-rel", "0.075", "--out", "dedistill/power")
    for space in ("refactored", "delta", "merged"):
        _tool(folder, "posthoc_ema", "dedistill", "--space", space, "--alpha", "0.5", "--out", f"dedistill/{space}")
    weights = ["--weights", "dedistill/posthoc/alpha_linear_0.9.safetensors"]
    _tool(folder, "merge_adapter", "dedistill.toml", *weights, "--out", "merged")
    for format in ("diffusers", "single", "int8"):
        _tool(folder, "export_model", "merged", "--format", format, "--out", f"digits-{format}")


def _flux(folder: Path) -> None:
    _train(folder, "flux")
    _train(folder, "flux", 2)
    _train(folder, "lora")
    _tool(folder, "posthoc_ema", "flux")
    _tool(folder, "merge_adapter", "flux.toml", "--weights", "flux/posthoc/alpha_linear_0.9.safetensors", "--out", "mixed")
    for format in ("diffusers", "single", "bfl", "int8"):
        _tool(folder, "export_model", "mixed", "--format", format, "--out", f"flux-{format}")
    for run, forms in {"flux": ("lycoris", "transformer"), "lora": ("lycoris", "transformer", "peft", "kohya")}.items():
        for format in forms:
            last = f"{run}/snapshots/step-00000008.safetensors"
            # LyCORIS keeps its settings in a file beside the adapter: a folder for each
            _tool(folder, "export_model", last, "--format", format, "--out", f"adapters/{run}-{format}/x.safetensors")


def _train(folder: Path, name: str, ranks: int = 1) -> None:
    command = [sys.executable, "-m", "dedistill.train", f"{name}.toml"]
    if ranks > 1:
        command += ["--set", f"run.out={name}-{ranks}"]
    _wait(folder, command, ranks)


def _tool(folder: Path, name: str, *arguments: str) -> None:
    _wait(folder, [sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments], 1)


def _wait(folder: Path, command: list[str], ranks: int) -> None:
    """``command`` in ``folder`` on so many processes, as a launcher would start them; all must end well."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    started = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        started.append(
            subprocess.Popen(
                command,
                cwd=folder,
                env=env | (own | address if ranks > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in started:
        said, _ = process.communicate(timeout=600)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{said[-3000:]}")


def _read(folder: Path) -> dict:
    found = {str(f.relative_to(folder)): _digest(f) for f in sorted(folder.rglob("*.safetensors")) if _lasting(f, folder)}
    rows = {str(f.relative_to(folder)): f.read_text().splitlines() for f in sorted(folder.rglob("metrics.jsonl"))}
    return found | {place: [json.loads(row) for row in lines] for place, lines in rows.items()}


def _lasting(file: Path, folder: Path) -> bool:
    """Whether a file's name and content depend on the chain alone: the cache's are named by hashes of other files."""
    return file.relative_to(folder).parts[0] != "cache"


def _digest(file: Path) -> str:
    """SHA-256 of names, types, shapes and bytes of the tensors, in the order of names; the header does not count."""
    from safetensors import safe_open
    from torch import uint8

    digest = hashlib.sha256()
    with safe_open(file, "pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    golden = {"fingerprint": fingerprint(), "record": record(folder)}
    shutil.rmtree(folder)
    Path(sys.argv[1]).write_text(json.dumps(golden, indent=0) + "\n")


if __name__ == "__main__":
    main()
