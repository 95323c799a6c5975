"""Averages of snapshots made after training."""
