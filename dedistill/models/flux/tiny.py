"""A complete FLUX pipeline folder with very small random weights: the real classes and file layout, built offline."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

TEXT_DIM = 32
"""Width of T5's embeddings and of CLIP's pooled vector."""
_WORDS = "an and at black blue cat dog green hat house in moon of on one photo red river sky small sun the tree two with"


def write_tiny_flux(folder: Path, *, seed: int = 0, guidance: bool = False, layers: int = 1, single_layers: int = 2) -> None:
    """Write a pipeline folder that ``FluxPipeline.from_pretrained`` loads without a network; all weights follow ``seed``.

    guidance: shaped like FLUX.1-dev (guidance embedding, resolution-dependent shift) instead of schnell. layers,
    single_layers: blocks with two streams and with one. The VAE has the real 16 channels and 8 pixels per latent,
    the tokenizers the real special tokens and lengths (T5 512, CLIP 77). The global generator is left as it was.
    """
    t5_tokenizer, clip_tokenizer = _t5_tokenizer(), _clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            transformer=_transformer(guidance, layers, single_layers),
            text_encoder=_clip(clip_tokenizer),
            text_encoder_2=_t5(t5_tokenizer),
            vae=_vae(),
            tokenizer=clip_tokenizer,
            tokenizer_2=t5_tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        )
    pipe.save_pretrained(folder)


def _transformer(guidance: bool, layers: int, single_layers: int) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=guidance,
    )


def _t5_tokenizer() -> T5TokenizerFast:
    """Whole words where known, else letters: pad 0, ``</s>`` 1 at the end of every caption."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(chr(c), -10.0) for c in range(33, 127)]
    words = [("▁" + word, -3.0) for word in _WORDS.split()]
    return T5TokenizerFast(vocab=[*special, ("▁", -5.0), *letters, *words], extra_ids=0, model_max_length=512)


def _clip_tokenizer() -> CLIPTokenizer:
    """One token per byte; the end token has the highest id, which is where CLIP looks for its pooled vector."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    sizes = {"d_model": TEXT_DIM, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)).eval()


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    sizes = {"hidden_size": TEXT_DIM, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=TEXT_DIM, **sizes, **ids)).eval()


def _vae() -> AutoencoderKL:
    levels = 4
    return AutoencoderKL(
        latent_channels=16,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
