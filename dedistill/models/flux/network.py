"""What every network of FLUX's shape shares: tokens, positions, masks, and a noise level told exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from dedistill.errors import UserError
from dedistill.models.conditioning import Conditioning
from dedistill.models.family import Output, States, check_sigma, float_dtype
from dedistill.models.flux import naming

MASKS = ("bool", "none", "libreflux")
MASKING_BACKENDS = {
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_MATH,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_CUDNN,
    AttentionBackendName.FLEX,
}
"""Attention backends of diffusers that honour a mask.

The plain flash ones raise or, in older versions, ignore it. ``flash_varlen``, ``_flash_varlen_3`` and ``sage_varlen`` (0.42)
keep the first n keys, n the number of unmasked ones: with padding between text and image, the wrong ones.
"""


def flux_velocity(
    denoiser: nn.Module,
    time_text_embed: nn.Module,
    noisy: Tensor,
    sigma: Tensor,
    text: Conditioning,
    *,
    patch: int,
    mask: str,
    guidance: Tensor | None = None,
) -> Tensor:
    """noise - data as a FluxTransformer2DModel (or a module around one) predicts it.

    noisy [B, C, H, W], sigma [B] float32 in [0, 1], guidance [B] or None. mask: "bool" hides padding, "none" lets it
    take part, "libreflux" adds 1 to the scores of all that is not padding, as that model was trained.
    """
    check_sigma(sigma)
    channels, height, width = noisy.shape[1:]
    tokens, dtype = height * width // patch**2, float_dtype(time_text_embed)
    with exact_timestep(time_text_embed, sigma, guidance):
        out = denoiser(
            hidden_states=patchify(noisy, patch).to(dtype),
            encoder_hidden_states=text.tokens.embeds.to(dtype),  # cached text keeps its encoders' dtype
            pooled_projections=text.vectors["pooled"].to(dtype),
            timestep=sigma.float(),
            guidance=guidance,
            img_ids=image_ids(height // patch, width // patch, noisy.device),
            txt_ids=torch.zeros(text.tokens.embeds.shape[1], 3, device=noisy.device),
            joint_attention_kwargs=attention_mask(text.tokens.mask, tokens, mask, dtype, noisy.device),
            return_dict=False,
        )[0]
    return unpatchify(out, patch, channels, height, width)


@contextmanager
def exact_timestep(embedding: nn.Module, sigma: Tensor, guidance: Tensor | None = None) -> Iterator[None]:
    """Let the time embedding see 1000 sigma (and 1000 guidance) in float32.

    diffusers casts both to the hidden states' dtype before multiplying by 1000: in bf16 the network would be told
    a noise level up to 4 of 1000 away from the one it is shown.
    """
    exact = [1000 * sigma.float()] + ([] if guidance is None else [1000 * guidance.float()])
    hook = embedding.register_forward_pre_hook(lambda _, args: (*exact, *args[len(exact) :]))
    try:
        yield
    finally:
        hook.remove()


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, H/p * W/p, C p p], token order row by row, channel order (c, row, column) as FLUX packs."""
    b, c, h, w = images.shape
    tokens = images.reshape(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(tokens: Tensor, patch: int, channels: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`patchify`."""
    grid = tokens.reshape(-1, height // patch, width // patch, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, height, width)


def attention_mask(
    text_mask: Tensor,
    image_tokens: int,
    kind: str = "bool",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor] | None:
    """Key mask [B, 1, 1, T + I] on ``device``, text first; None when it would change nothing, which keeps the fast kernels.

    "bool" hides padding. A float mask would be added to the scores instead of hiding anything, so it leaves this function
    only where that is asked for: "libreflux" gives 1 to real tokens and 0 to padding, in ``dtype``.
    Raises UserError when the attention backend in use would ignore the mask.
    """
    # one bias on all scores alike cancels in the softmax
    if kind == "none" or bool(text_mask.all()):
        return None
    backend = _AttentionBackendRegistry.get_active_backend()[0]
    if backend not in MASKING_BACKENDS:
        raise UserError(
            f"attention backend '{backend.value}' cannot hide the padding of text of mixed lengths; "
            "use 'native' (DIFFUSERS_ATTN_BACKEND=native), or batches of one length"
        )
    image = torch.ones(len(text_mask), image_tokens, dtype=torch.bool, device=text_mask.device)
    mask = torch.cat([text_mask, image], 1)[:, None, None, :].to(device, non_blocking=True)
    return {"attention_mask": mask if kind == "bool" else mask.to(dtype)}


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions (0, row, column) of image tokens [rows * columns, 3]; text has none (all zeros)."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    return ids.reshape(-1, 3)


class FluxBlocks:
    """What every family with FLUX's network says of its blocks."""

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        flux: FluxTransformer2DModel = denoiser
        return [*flux.transformer_blocks, *flux.single_transformer_blocks]

    def unchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        return kwargs["encoder_hidden_states"], kwargs["hidden_states"]

    def states(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output, text: Conditioning) -> States:
        """Joint-attention blocks are called by name and return (text, image)."""
        encoder_states, hidden_states = output
        mask = text.tokens.mask[:, : encoder_states.shape[1]]
        return {
            "image": (kwargs["hidden_states"], hidden_states, None),
            "text": (kwargs["encoder_hidden_states"], encoder_states, mask),
        }

    def presets(self, denoiser: nn.Module) -> dict[str, list[str]]:
        return naming.presets(denoiser)
