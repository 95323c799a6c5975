"""Adapter files: safetensors with a header that says what they belong to, and a LoKr put into a diffusers pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dedistill.adapters.delta import scale
from dedistill.adapters.formats import by_layer, check_shapes, is_lora
from dedistill.adapters.naming import FOLDERS
from dedistill.adapters.targets import Shape, adaptable
from dedistill.errors import UserError
from dedistill.io.safetensors import CHECKSUM, is_finite, verify_checksum
from dedistill.io.weights import open_weights

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# --- adapter files ---------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its header, without the checksum of a checksummed one, which is checked.

    Raises UserError naming the file when it is unreadable or empty, when a checksummed one has changed since it was written,
    or when it holds NaN or Inf.
    """
    try:
        with open_weights(path) as f:
            header = dict(sorted((f.metadata() or {}).items()))  # the library's order is another each time
            if header.pop(CHECKSUM, None):
                verify_checksum(path)
            # clone: mapped tensors are unaligned, which crashes some int8 kernels
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise UserError(f"'{path}' cannot be read as safetensors: {e}") from e
    if not tensors:
        raise UserError(f"'{path}' holds no tensors")
    if wrong := next((name for name, t in tensors.items() if not is_finite(t)), None):
        raise UserError(f"'{path}': tensor '{wrong}' holds numbers that are not finite (NaN or Inf): the adapter is of no use")
    return tensors, header


# --- A LoKr in a diffusers pipeline, whatever factors it has ---------------------------------------------------------


def load_lokr(pipe: "DiffusionPipeline | nn.Module", file: str | Path, name: str = "dedistill") -> str:
    """Load a LoKr file into a diffusers pipeline, or into its transformer, as the PEFT adapter ``name``; returns the name.

    diffusers' own loader (0.42) takes a LoKr only if one ``decompose_factor`` gives the factors of every layer, in
    PEFT's order; ours differ from layer to layer. PEFT's layers themselves compute with factors of any shape, so the
    file's are put into them directly. ``pipe.transformer.set_adapters([name], weights=[.5])`` scales it,
    ``delete_adapters([name])`` takes it out again.

    file: safetensors in the ``lycoris_`` format, or with names that begin with the denoiser's folder. Raises UserError
    when any of its tensors has no place in the network, or the name is taken; then nothing has been loaded.
    """
    from peft import LoKrConfig, inject_adapter_in_model

    # set_adapters and the like come from mixins of diffusers, which no stub of a module has
    folder = next((folder for folder in FOLDERS if hasattr(pipe, folder)), None)
    denoiser: Any = getattr(pipe, folder) if folder else pipe
    if name in getattr(denoiser, "peft_config", {}):
        raise UserError(f"the network already has an adapter '{name}': give another name")
    source, (tensors, header) = str(file), read_tensors(Path(file))
    shapes = {n.removesuffix(".base_layer"): shape for n, shape in adaptable(denoiser).items()}
    layers = by_layer(tensors, shapes, source, folder=folder or FOLDERS[0], header=header)
    if is_lora(layers):
        raise UserError(f"'{source}' is a LoRA: use pipe.load_lora_weights, after dedistill export --format peft")
    check_shapes(layers, shapes, source)
    factors = {f"{linear}.{w}": t for linear, f in layers.items() for w, t in _multiplied_out(f, shapes[linear][2:]).items()}
    r = max(max(t.shape) for t in factors.values())  # so large that PEFT makes full factors; alpha = r: scale 1
    # the state dict names the layers exactly; target_modules alone would also take what ends alike
    inject_adapter_in_model(
        LoKrConfig(r=r, alpha=r, target_modules=sorted(layers)), denoiser, name, low_cpu_mem_usage=True, state_dict=factors
    )
    for linear in layers:
        layer = denoiser.get_submodule(linear)
        weight = layer.get_base_layer().weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32
        for w in ("lokr_w1", "lokr_w2"):
            tensor = factors[f"{linear}.{w}"].to(weight.device, dtype)
            getattr(layer, w)[name] = nn.Parameter(tensor, requires_grad=False)
    denoiser._hf_peft_config_loaded = True  # diffusers' own mark, without which set_adapters refuses
    denoiser.set_adapters([name])
    return name


def _multiplied_out(f: Mapping[str, Tensor], window: Shape) -> dict[str, Tensor]:
    """The two factors in full, scale included. window: of a convolution."""
    w1, w2 = (f[w] if w in f else f[f"{w}_a"].float() @ f[f"{w}_b"].float() for w in ("lokr_w1", "lokr_w2"))
    w2 = w2.flatten(1).unflatten(1, (-1, *window)) if window else w2
    return {"lokr_w1": w1, "lokr_w2": w2 if scale(f) == 1 else w2 * scale(f)}
