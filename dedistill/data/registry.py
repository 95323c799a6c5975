"""From a recipe's [data] table to a source."""

from pathlib import Path
from typing import Any

from dedistill.data.digits import DIGIT_SOURCES
from dedistill.data.pairs import PairSource
from dedistill.data.source import Source


def open_source(data: Any) -> Source:
    """The source that ``data`` (a recipe's [data] table) names. Raises UserError when it cannot be read."""
    if data.source == "pairs":
        return PairSource(Path(data.path))
    return DIGIT_SOURCES[data.source](data.path, data.caption_noise)
