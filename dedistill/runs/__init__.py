"""What a run keeps on disk, and how it is read again. All that it remembers is one integer and the tensors."""
