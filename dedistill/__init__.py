"""dedistill: give distilled image models their training objective and their classifier-free guidance back."""

__version__ = "0.1.0"
