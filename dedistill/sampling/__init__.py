"""Making pictures with a model, judging them, and storing pairs for distillation."""
