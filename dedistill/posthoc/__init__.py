"""All averaging after training."""
