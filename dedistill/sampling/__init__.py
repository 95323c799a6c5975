"""Making images with a model, and storing pairs for distillation."""
