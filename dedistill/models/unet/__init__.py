"""What families share whose denoiser is a UNet2DConditionModel that was trained by diffusion. No family itself."""
