"""Model families, and what they share: each speaks BCHW images, our sigma, our velocity."""
