"""Everything that gives a number about a model."""
