"""Image files that are written whole, and known to be whole when they are met again."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from dedistill.io.atomic import replace_file


def replace_image(path: Path, image: Image.Image, **options: Any) -> None:
    """Put ``image`` at ``path`` in the format of its suffix, whole or not at all. options: those of Pillow's ``save``."""
    data = io.BytesIO()
    image.save(data, Image.registered_extensions()[path.suffix], **options)
    replace_file(path, data.getvalue())


def is_whole_image(path: Path) -> bool:
    """Whether there is an image at ``path``, to its end: a disk that lost power may keep a name without the bytes."""
    try:
        with Image.open(path) as image:
            image.verify() if image.format == "PNG" else image.load()  # a PNG has checksums of its own
    except (OSError, SyntaxError, ValueError):  # what Pillow raises over bytes of any kind
        return False
    return True
