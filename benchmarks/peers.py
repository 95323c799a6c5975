"""Steps of FLUX.1 as other programs take them, on the same layers as one of ours."""

from collections.abc import Callable

import torch
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from benchmarks.gpu import CHANNELS, PATCH, VAE, Setup

Step = Callable[[], float]


def their_step(
    denoiser: nn.Module,
    trained: list[nn.Parameter],
    setup: Setup,
    pixels: int,
    tokens: int | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Step:
    """One step as scripts around diffusers do it: packed latents, no mask, one mean over all numbers, AdamW.

    tokens: length captions are padded to; None: not at all. dtype: of what goes into the network; float32 under autocast.
    """
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    device, side = setup.model.device, pixels // VAE // PATCH
    ids = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in (1, side, side)), indexing="ij"), -1)
    ids = ids.reshape(-1, 3).to(device)
    generator = torch.Generator(device).manual_seed(1)

    def packed(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(1, CHANNELS, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(1, side * side, -1)

    def step() -> float:
        data, noise, sigma, text, pooled = setup.samples(pixels, 1, generator)
        text = nn.functional.pad(text, (0, 0, 0, (tokens or text.shape[1]) - text.shape[1]))
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.float32):
            out = denoiser(
                hidden_states=packed(sigma * noise + (1 - sigma) * data).to(dtype),
                timestep=sigma.flatten().to(dtype),
                encoder_hidden_states=text.to(dtype),
                pooled_projections=pooled.to(dtype),
                txt_ids=torch.zeros(text.shape[1], 3, device=device),
                img_ids=ids,
                return_dict=False,
            )[0]
        loss = (out.float() - packed(noise - data)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def with_peft(denoiser: nn.Module, setup: Setup) -> list[nn.Parameter]:
    """LoRA of PEFT, rank 16, on the layers that ``setup`` trains; float32 under autocast, as the script has it."""
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=16, target_modules=[t.name for t in setup.model.targets]), denoiser)
    trained = [p for n, p in denoiser.named_parameters() if "lora_" in n]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return same_size(trained, setup)


def with_lycoris(denoiser: nn.Module, setup: Setup) -> list[nn.Parameter]:
    """LyCORIS' LoKr as it comes (W + dW built in each pass), in bf16, on the layers that ``setup`` trains."""
    modules = nn.ModuleList()
    for t in setup.model.targets:
        linear = denoiser.get_submodule(t.name)
        modules.append(LokrModule(t.name.replace(".", "_"), linear, 1.0, 10000, 1, factor=t.factor, full_matrix=True))
        modules[-1].apply_to()
    return same_size(list(modules.to(setup.model.device, torch.bfloat16).parameters()), setup)


def same_size(trained: list[nn.Parameter], setup: Setup) -> list[nn.Parameter]:
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in setup.model.trainable().values())
    return trained
