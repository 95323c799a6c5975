"""The processes of one run: what started them, what they exchange, and their signs of life."""
