"""A complete FLUX pipeline folder with very small random weights: the real classes and file layout, built offline."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import SiglipVisionConfig, SiglipVisionModel

from dedistill.models.tiny_parts import TEXT_DIM, tiny_clip, tiny_clip_tokenizer, tiny_t5, tiny_t5_tokenizer, tiny_vae


def write_tiny_flux(folder: Path, *, seed: int = 0, guidance: bool = False, layers: int = 1, single_layers: int = 2) -> None:
    """Write a pipeline folder that ``FluxPipeline.from_pretrained`` loads without a network; all weights follow ``seed``.

    guidance: shaped like FLUX.1-dev (guidance embedding, resolution-dependent shift) instead of schnell. layers,
    single_layers: blocks with two streams and with one. The VAE has the real 16 channels and 8 pixels per latent,
    the tokenizers the real special tokens and lengths (T5 512, CLIP 77). The global generator is left as it was.
    """
    t5_tokenizer, clip_tokenizer = tiny_t5_tokenizer(), tiny_clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = FluxPipeline(
            transformer=_transformer(guidance, layers, single_layers),
            text_encoder=tiny_clip(clip_tokenizer),
            text_encoder_2=tiny_t5(t5_tokenizer),
            vae=tiny_vae(),
            tokenizer=clip_tokenizer,
            tokenizer_2=t5_tokenizer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
        )
    pipe.save_pretrained(folder)


def write_tiny_redux(folder: Path, *, seed: int = 0, text_dim: int = TEXT_DIM) -> None:
    """What FLUX.1-Redux-dev adds to a pipeline, very small: 2 x 2 patches of 14 pixels, 24 features each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        tower = SiglipVisionModel(SiglipVisionConfig(image_size=28, patch_size=14, vision_use_head=False, **sizes)).eval()
        embedder = ReduxImageEncoder(redux_dim=24, txt_in_features=text_dim)
    tower.save_pretrained(folder / "image_encoder")
    embedder.save_pretrained(folder / "image_embedder")
    (folder / "feature_extractor").mkdir(parents=True, exist_ok=True)
    kind = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}, "resample": 3}
    kind |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_rescale": True, "do_normalize": True}
    (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(kind))
    classes = {"image_encoder": ("transformers", "SiglipVisionModel"), "image_embedder": ("flux", "ReduxImageEncoder")}
    classes |= {"feature_extractor": ("transformers", "SiglipImageProcessor")}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPriorReduxPipeline"} | classes))


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
