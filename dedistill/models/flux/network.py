"""What every network of FLUX's shape shares: tokens, positions, masks, and a noise level told exactly."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.embeddings import CombinedTimestepGuidanceTextProjEmbeddings
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

from dedistill.errors import UserError
from dedistill.models.blocks import joint_inputs
from dedistill.models.conditioning import Conditioning, Tokens
from dedistill.models.family import Components, Guidance, Output, States
from dedistill.models.flux import naming
from dedistill.models.image_prompts import WEIGHTS
from dedistill.models.quantize import float_dtype

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
    network: FluxTransformer2DModel,
    noisy: Tensor,
    sigma: Tensor,
    text: Conditioning,
    *,
    mask: str,
    guidance: Tensor | None = None,
) -> Tensor:
    """noise - data as ``denoiser``, which is ``network`` or a module around it, predicts it.

    noisy [B, C, H, W], sigma [B] float32 in [0, 1], guidance [B] or None. mask: "bool" hides padding, "none" lets it
    take part, "libreflux" adds 1 to the scores of all that is not padding, as that model was trained.
    """
    channels, height, width = noisy.shape[1:]
    patch = round((network.config.in_channels / channels) ** 0.5)
    dtype = float_dtype(network.time_text_embed)
    embeds = torch.cat([s.embeds for s in text.sequences], 1)
    rows, columns = height // patch, width // patch
    weights = _weights(text.sequences[1:], text.vectors.get(WEIGHTS)) if text.sequences[1:] else None
    with told_exactly(network, sigma, guidance, rows, columns, embeds.shape[1]):
        out = denoiser(
            hidden_states=patchify(noisy, patch).to(dtype),
            encoder_hidden_states=embeds.to(dtype),  # cached text keeps its encoders' dtype
            pooled_projections=text.vectors["pooled"].to(dtype),
            timestep=sigma.float(),
            guidance=guidance,
            img_ids=torch.empty(0, 3, device=noisy.device),  # positions are known
            txt_ids=torch.empty(0, 3, device=noisy.device),
            joint_attention_kwargs=attention_mask(
                text.sequences[0].mask, rows * columns, mask, dtype, noisy.device, weights=weights
            ),
            return_dict=False,
        )[0]
    return unpatchify(out, patch, channels, height, width)


KEPT = 64
"""Sizes of images whose positions are kept, 4 MB each at 1024 x 1024."""


@contextmanager
def told_exactly(
    network: FluxTransformer2DModel, sigma: Tensor, guidance: Tensor | None, rows: int, columns: int, words: int
) -> Iterator[None]:
    """Let ``network`` take as given what diffusers rounds, and what it works out anew, in every pass.

    The time embedding sees 1000 sigma (and 1000 guidance) in float32. diffusers casts both to the hidden states' dtype before
    multiplying by 1000: in bf16 the network would be told a noise level up to 4 of 1000 away from the one it is shown.

    The positions of an image of ``rows`` x ``columns`` tokens are computed once: in float64, in a hundred small kernels. All
    ``words`` of the text have the position (0, 0, 0), kept as the first. No hooks are called: those of ZeRO-3 compare which
    modules each process called, and not all have new sizes in one pass.
    """
    exact = [1000 * sigma.float()] + ([] if guidance is None else [1000 * guidance.float()])
    hook = network.time_text_embed.register_forward_pre_hook(lambda _, args: (*exact, *args[len(exact) :]))
    embedding, device = network.pos_embed, sigma.device
    kept: dict[object, tuple[Tensor, Tensor]] = vars(embedding).setdefault("kept", {})
    try:
        if (key := (rows, columns, device)) not in kept:
            if len(kept) >= KEPT:
                del kept[next(iter(kept))]
            kept[key] = embedding.forward(torch.cat([torch.zeros(1, 3, device=device), image_ids(rows, columns, device)]))
        whole = tuple(torch.cat([part[:1].expand(words, -1), part[1:]]) for part in kept[key])
        embedding.forward = lambda ids: whole
        yield
    finally:
        hook.remove()
        vars(embedding).pop("forward", None)


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
    weights: Tensor | None = None,
) -> dict[str, Tensor] | None:
    """Key mask [B, 1, 1, T + P + I] on ``device``, text first; None when it would change nothing, which keeps the fast kernels.

    "bool" hides padding. A float mask would be added to the scores instead of hiding anything, so it leaves this function
    only where that is asked for: "libreflux" gives 1 to real tokens and 0 to padding, in ``dtype``; and weights [B, P] of the
    tokens of image prompts add their logarithms, where some are neither 1 nor 0, which hides.
    Raises UserError when the attention backend in use would ignore the mask.
    """
    seen, bias = text_mask.float(), float(kind == "libreflux")
    scores = [seen.log() if kind == "bool" else bias * seen, seen.new_full((len(seen), image_tokens), bias)]
    if weights is not None:
        scores.insert(1, weights.log() + bias)
    mask = torch.cat(scores, 1)
    # one bias on all scores alike cancels in the softmax
    if bool((mask == mask[:, -1:]).all()):
        return None
    backend = _AttentionBackendRegistry.get_active_backend()[0]
    if backend not in MASKING_BACKENDS:
        raise UserError(
            f"attention backend '{backend.value}' cannot hide the padding of text of mixed lengths, nor weigh images of "
            "prompts; use 'native' (DIFFUSERS_ATTN_BACKEND=native), or batches of one length"
        )
    hides = bool(((mask == 0) | mask.isinf()).all())
    mask = mask[:, None, None, :]
    return {"attention_mask": ((mask == 0) if hides else mask.to(dtype)).to(device, non_blocking=True)}


def _weights(images: Sequence[Tokens], given: Tensor | None) -> Tensor:
    """Of every token of image prompts [B, P]; 0 where a row has no such image."""
    own = [image.mask.float() for image in images]
    return torch.cat(own if given is None else [m * given[:, i, None].to(m.device) for i, m in enumerate(own)], 1)


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions (0, row, column) of image tokens [rows * columns, 3]; text has none (all zeros)."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None]
    return ids.reshape(-1, 3)


class BypassedGuidance(CombinedTimestepGuidanceTextProjEmbeddings):
    """Time and pooled text only, as Flex.1-alpha is trained; the guidance embedder keeps its weights and is not called."""

    def forward(self, timestep: Tensor, guidance: Tensor, pooled_projection: Tensor) -> Tensor:
        time = self.timestep_embedder(self.time_proj(timestep).to(pooled_projection.dtype))
        return time + self.text_embedder(pooled_projection)


class FluxNetwork:
    """What every family with FLUX's network says of it."""

    def velocity(
        self,
        components: Components,
        denoiser: nn.Module,
        noisy: Tensor,
        sigma: Tensor,
        text: Conditioning,
        guidance: Guidance = None,
    ) -> Tensor:
        """``guidance`` None: the value of training."""
        network: FluxTransformer2DModel = components.denoiser
        if components.image_prompts:
            text = components.image_prompts.tokens(text)
        value = components.guidance if guidance is None else guidance
        if value is not None and type(network.time_text_embed) is not CombinedTimestepGuidanceTextProjEmbeddings:
            raise UserError("this network has no guidance embedding, or bypasses it; leave the distilled guidance out")
        fed = None if value is None else torch.as_tensor(value, dtype=torch.float32, device=noisy.device).expand(len(noisy))
        if type(network.time_text_embed) is BypassedGuidance:
            fed = torch.zeros(len(noisy), device=noisy.device)  # diffusers wants a number; it is not looked at
        return flux_velocity(denoiser, network, noisy, sigma, text, mask=components.mask, guidance=fed)

    def blocks(self, denoiser: nn.Module) -> list[nn.Module]:
        flux: FluxTransformer2DModel = denoiser
        return [*flux.transformer_blocks, *flux.single_transformer_blocks]

    passed_on = "encoder_hidden_states", "hidden_states"

    def joins_text(self, block: nn.Module) -> bool:
        return isinstance(block, FluxSingleTransformerBlock)

    def unchanged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Output:
        image, text = joint_inputs(args, kwargs)
        return text, image

    def states(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output, text: Conditioning) -> States:
        """Joint-attention blocks return (text, image)."""
        encoder_states, hidden_states = output
        image, words = joint_inputs(args, kwargs)
        mask = text.sequences[0].mask[:, : encoder_states.shape[1]]
        return {
            "image": (image, hidden_states, None),
            "text": (words, encoder_states, mask),
        }

    def presets(self, denoiser: nn.Module) -> dict[str, list[str]]:
        return naming.presets(denoiser)
