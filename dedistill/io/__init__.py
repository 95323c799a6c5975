"""Files known by their bytes."""
