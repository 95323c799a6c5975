"""What families share whose denoiser is a UNet2DConditionModel that was trained by diffusion. No family itself."""

from dedistill.models.spec import Config


def has_scale_embedding(config: Config) -> bool:
    """Whether such a network may be fed a guidance scale, as latent consistency models are."""
    return bool(config.get("time_cond_proj_dim"))
