"""Model families: each is one file that speaks BCHW pictures, our sigma and our velocity."""
