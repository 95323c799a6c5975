"""What one sample's loss is."""
