"""Training: the loop and what it needs. Everything it remembers is one integer and the tensors."""
