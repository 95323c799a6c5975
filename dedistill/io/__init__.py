"""Files: whole or not there, ours or the user's, and known by their bytes."""
