"""dedistill: give distilled image models their training objective and their classifier-free guidance back."""

from collections.abc import Callable

__version__ = "0.1.0"
__all__ = ["load_lokr"]


def __getattr__(name: str) -> Callable[..., str]:
    # on demand: `import dedistill` stays free of torch and diffusers
    if name == "load_lokr":
        from dedistill.adapters.files import load_lokr

        return load_lokr
    raise AttributeError(f"module 'dedistill' has no attribute '{name}'")
