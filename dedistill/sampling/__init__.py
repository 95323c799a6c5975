"""Making pictures with a model, and storing pairs for distillation."""
