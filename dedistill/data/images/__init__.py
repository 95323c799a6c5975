"""Images and captions of the user's own, from files to an index of what can be used."""
