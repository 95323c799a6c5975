"""Messages of libraries that a user can do nothing about. Imports nothing of theirs: they must find this done."""

import logging
import os
import warnings


def quiet_dependencies() -> None:
    """Silence messages of libraries that a user can do nothing about. Call before importing them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
