"""From a recipe's [data] table to a source."""

from pathlib import Path
from typing import Any

from dedistill.data.digits import idx_files, load_digits, load_mnist
from dedistill.data.pairs import FACTS, PairSource
from dedistill.data.source import Source


def open_source(data: Any) -> Source:
    """The source that ``data`` (a recipe's [data] table) names, which has nothing to encode. Raises UserError if unreadable."""
    if data.source == "pairs":
        return PairSource(Path(data.path))
    if data.source == "mnist":
        return load_mnist(data.path, data.caption_noise)
    if data.source == "digits":
        return load_digits(data.caption_noise)
    raise ValueError(f"'{data.source}' must be encoded first: dedistill.prepare.open_data")


def data_files(data: Any) -> list[Path]:
    """The files whose bytes decide what ``data`` draws; pairs.json holds the hash of every shard. Empty for packages."""
    if data.path is None:  # pictures are bound by what the index says of them
        return []
    return [Path(data.path) / FACTS] if data.source == "pairs" else idx_files(Path(data.path))
