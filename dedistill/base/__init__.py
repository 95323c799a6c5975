"""The frozen base: how its weights are stored while an adapter trains on top."""
