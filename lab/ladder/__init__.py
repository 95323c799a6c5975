"""The ladder of reflow on digits: a diffusion model, its reflow from three starts, one step; numbers over several seeds."""
