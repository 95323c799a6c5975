"""What a run will need, known before it is started: its real step on tensors without numbers, and what cards make of it."""
