"""From the bytes of an image file to upright 8-bit RGB. Sizes are checked before anything is decoded."""

import io
from contextlib import nullcontext
from functools import lru_cache
from threading import Lock
from typing import BinaryIO, cast

import numpy as np
from PIL import Image, ImageCms

from dedistill.errors import is_out_of_memory

MAX_PIXELS = 80_000_000
"""Below Pillow's own warning (89 million). Pillow itself refuses more than 178,956,970, whatever the limit here says."""
LARGE = 40_000_000
"""Pixels from which on one image is decoded at a time, whatever the number of threads: each takes up to 8 bytes per pixel, 4 as
Pillow decodes it and 4 as RGB."""
ROWS = 512
"""So many are converted at once, so that no step between takes memory for the whole image."""
_ONE_LARGE = Lock()
MAX_BYTES = 100 << 20
MAX_SCANS = 64
"""Of a JPEG. Progressive ones have about ten, and as many for each further image in the same file."""
_SCAN = b"\xff\xda"
# EPS and PDF would start other programs; formats of one vendor or purpose only widen what hostile bytes can reach
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
PILLOW_READS = ("jpg", "jpeg", "jfif", "png", "apng", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm")
EXTENSIONS = frozenset((*PILLOW_READS, "heic", "heif", "jxl"))
"""What counts as an image by its name. The last three are listed so that they are reported rather than passed over."""
NO_IMAGE = f"not an image of a known format ({', '.join(FORMATS)}), or its header is damaged"
ORIENTATION = 0x0112


class BadImage(Exception):
    """An image that cannot be used. The message is the reason, without the name of the file."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> Image.Image:
    """The image in ``data`` as RGB: turned as its EXIF says, alpha over white, the first frame of an animation.

    Grey of 16 bits is scaled to 8; colours go through the image's own profile, where it has one, to sRGB.
    Raises ``BadImage`` for everything that is too large, unknown, damaged or cut short.
    """
    image = _open(data, max_pixels, max_bytes)
    name = image.format
    try:
        with _ONE_LARGE if image.width * image.height > LARGE else nullcontext():
            image.load()
            turn = _TURNS.get(_orientation(image))  # a PNG may tell it behind its pixels
            image = _rgb(image)  # what was decoded is let go before another copy is made
            return image if turn is None else image.transpose(turn)
    except BadImage:
        raise
    except Exception as e:  # decoders raise any kind of error over damaged bytes
        if is_out_of_memory(e):  # no image is bad for that
            raise
        raise BadImage(f"{name} cannot be decoded: {e}") from e


def size_by_header(file: BinaryIO) -> tuple[int, int]:
    """Width and height, upright, of what an image's header says; nothing is decoded. Raises ``BadImage``."""
    try:
        image = Image.open(file, formats=FORMATS)
        width, height = image.size
        return (height, width) if _orientation(image) in range(5, 9) else (width, height)
    except Image.UnidentifiedImageError:
        raise BadImage(NO_IMAGE) from None
    except Exception as e:
        raise BadImage(f"its header cannot be read: {e}") from e


def _open(data: bytes, max_pixels: int, max_bytes: int) -> Image.Image:
    if not data:
        raise BadImage("the file is empty")
    if len(data) > max_bytes:
        raise BadImage(f"{len(data):,} bytes; the limit is {max_bytes:,}")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise BadImage(NO_IMAGE) from None
    except Exception as e:
        if is_out_of_memory(e):
            raise
        raise BadImage(f"its header cannot be read: {e}") from e
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels; the limit is {max_pixels:,} pixels")
    # each is decoded over the whole image, and takes some thirty bytes
    if data.startswith(b"\xff\xd8") and (scans := data.count(_SCAN)) > MAX_SCANS:
        raise BadImage(f"a JPEG of {scans:,} scans; the limit is {MAX_SCANS}")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation that Pillow has not applied yet; 1 where there is none or the EXIF data are broken."""
    if image.format == "TIFF":  # Pillow turns these by itself
        return 1
    if image.format == "PNG" and "exif" not in image.info:  # getexif() would take XMP's word
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes it upright."""


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("floating-point pixels have no known range")
    if image.mode == "RGB" and not image.has_transparency_data and "icc_profile" not in image.info:
        return image
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, ROWS):
        rgb.paste(_rows_rgb(image.crop((0, top, image.width, min(top + ROWS, image.height)))), (0, top))
    return rgb


def _rows_rgb(image: Image.Image) -> Image.Image:
    """Of some rows: no pixel's colour depends on its neighbours."""
    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image))
    if image.mode == "CMYK":
        return _managed(image) if "icc_profile" in image.info else image.convert("RGB")
    profile = image.info.get("icc_profile")
    if not image.has_transparency_data:
        grey = image.mode in ("L", "1")
        return _in_srgb(image.convert("L" if grey else "RGB"), profile).convert("RGB")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(_in_srgb(image.convert("RGB"), profile), mask=image.getchannel("A"))
    return white


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """``image``, grey or RGB, as its colour profile says; unchanged without one that can be used, or where it says sRGB."""
    transform = _transform_of(profile, image.mode) if profile else None
    return cast(Image.Image, ImageCms.applyTransform(image, transform)) if transform else image


@lru_cache(maxsize=64)
def _transform_of(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From ``profile`` to sRGB; None where it changes nothing: the profiles of sRGB differ among each other by rounding."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")
        probe = _PROBE.convert(mode)
        moved = np.asarray(ImageCms.applyTransform(probe, transform), dtype=int) - np.asarray(probe.convert("RGB"), dtype=int)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return transform if np.abs(moved).max() > SRGB_DIFFERS else None


SRGB_DIFFERS = 2
"""Levels of 255."""
_STEPS = np.arange(0, 256, 15, dtype=np.uint8)
_PROBE = Image.fromarray(np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS), axis=-1).reshape(len(_STEPS), -1, 3))


def _from_integers(grey: np.ndarray) -> Image.Image:
    """Grey of up to 16 bits [H, W], scaled from 0 ... 65535 to 0 ... 255 (Pillow's convert would clip at 255)."""
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise BadImage(f"integer pixels from {low} to {high}; only 0 to 65535 have a known meaning")
    eight = (grey.astype(np.uint32) * 255 + 32767) // 65535
    return Image.fromarray(eight.astype(np.uint8)).convert("RGB")


def _managed(image: Image.Image) -> Image.Image:
    """CMYK through its own profile; without a usable profile, Pillow's plain formula."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        managed = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return cast(Image.Image, managed)  # None comes of inPlace alone
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
