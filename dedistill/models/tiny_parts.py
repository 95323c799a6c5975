"""What small random pipelines are made of: tokenizers with the real special tokens, text encoders, a VAE. Built offline."""

from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

TEXT_DIM = 32
"""Width of the encoders' embeddings and vectors, where none is given."""
_WORDS = "an and at black blue cat dog green hat house in moon of on one photo red river sky small sun the tree two with"


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """Whole words where known, else letters: pad 0, ``</s>`` 1 at the end of every caption."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(chr(c), -10.0) for c in range(33, 127)]
    words = [("▁" + word, -3.0) for word in _WORDS.split()]
    return T5TokenizerFast(vocab=[*special, ("▁", -5.0), *letters, *words], extra_ids=0, model_max_length=512)


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """One token per byte; the end token has the highest id, where CLIP looks for its vector of a caption."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def tiny_t5(tokenizer: T5TokenizerFast, width: int = TEXT_DIM) -> T5EncoderModel:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)).eval()


def tiny_clip(tokenizer: CLIPTokenizer, kind: type[CLIPTextModel] = CLIPTextModel, width: int = TEXT_DIM) -> CLIPTextModel:
    """Of class ``kind``: CLIPTextModel, or CLIPTextModelWithProjection."""
    sizes = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return kind(CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=width, **sizes, **ids)).eval()


def tiny_vae(channels: int = 16, scale: float = 0.3611, shift: float | None = 0.1159, *, quant: bool = False) -> AutoencoderKL:
    """Of the real 8 pixels a latent. quant: with the 1 x 1 convolutions around the latents that VAEs of 4 channels have."""
    levels = 4
    return AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    ).eval()
