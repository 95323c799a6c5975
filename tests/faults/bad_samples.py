"""Sixty-odd ways in which a sample can be bad, or odd but good. Each kind: files to write, and what must become of it."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

GOOD = "is used"


def encoded(kind: str, mode: str = "RGB", seed: int = 1, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def _raw(pixels: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, *extra: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + _chunk(b"IDAT", zlib.compress(bytes(64))) + _chunk(b"IEND", b"")


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


JPEG, PNG = encoded("JPEG"), encoded("PNG")
_CIRCLE = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x87i\0\x04\0\0\0\x01\0\0\0\x08" + bytes(4)
_BOMB = zlib.compress(bytes(200 << 20), 9)

IMAGES: dict[str, tuple[str, bytes, str]] = {
    # kind: extension, bytes, a word of the reason or GOOD
    "empty": ("jpg", b"", "the file is empty"),
    "one byte": ("jpg", b"\xff", "not an image"),
    "text": ("jpg", b"a text that says it is an image", "not an image"),
    "an error page": ("jpg", b"<!DOCTYPE html><html>404</html>", "not an image"),
    "random bytes": ("png", np.random.default_rng(0).bytes(4000), "not an image"),
    "a program": ("png", b"\x7fELF" + bytes(200), "not an image"),
    "a pickle": ("png", b"cos\nsystem\n(S'true'\ntR.", "not an image"),
    "a zip": ("png", b"PK\x03\x04" + bytes(100), "not an image"),
    "gzip": ("jpg", b"\x1f\x8b\x08" + bytes(100), "not an image"),
    "SVG": ("png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    "PDF": ("jpg", b"%PDF-1.4\n1 0 obj\n", "not an image"),
    "EPS": ("jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
    "JPEG cut in its header": ("jpg", JPEG[:100], ""),
    "JPEG cut in its pixels": ("jpg", JPEG[: len(JPEG) * 2 // 3], "cut short|truncated|cannot be decoded"),
    "JPEG header zeroed": ("jpg", bytes(64) + JPEG[64:], "not an image"),
    "PNG cut": ("png", PNG[: len(PNG) // 2], "cannot be decoded"),
    "PNG with a wrong sum": ("png", _flipped(PNG, len(PNG) // 2), "cannot be decoded"),
    "PNG of no width": ("png", _png(0, 8), ""),
    "PNG bomb": ("png", _png(40_000, 40_000), "exceeds limit"),
    "PNG of one row, 4 billion wide": ("png", _png(2**32 - 1, 1), ""),
    "PNG without enough pixels": ("png", _png(500, 500), "cannot be decoded"),
    "PNG with a text bomb": ("png", _png(8, 8, _chunk(b"zTXt", b"a\0\0" + _BOMB)), ""),
    "PNG with a profile bomb": ("png", _png(8, 8, _chunk(b"iCCP", b"a\0\0" + _BOMB)), ""),
    "GIF cut": ("gif", encoded("GIF")[:60], ""),
    "WebP cut": ("webp", encoded("WEBP")[:200], ""),
    "TIFF cut": ("tif", encoded("TIFF")[:300], ""),
    "BMP that says it is huge": ("bmp", _flipped(_flipped(encoded("BMP"), 20), 24), ""),
    "TIFF of floats": ("tif", _raw(np.ones((8, 8), np.float32), "TIFF"), "floating-point"),
    "TIFF of large integers": ("tif", _raw(np.full((8, 8), 2**20, np.int32), "TIFF"), "integer pixels"),
    "HEIC": ("heic", b"\0\0\0\x18ftypheic" + bytes(100), "not an image"),
    "JPEG XL": ("jxl", b"\xff\x0a" + bytes(100), "not an image"),
    "CMYK": ("jpg", encoded("JPEG", "CMYK"), GOOD),
    "grey": ("png", encoded("PNG", "L"), GOOD),
    "16 bits": ("png", _raw(np.full((8, 8), 40_000, np.uint16), "PNG"), GOOD),
    "a palette with transparency": ("png", encoded("PNG", "P", transparency=3), GOOD),
    "one bit": ("png", encoded("PNG", "1"), GOOD),
    "an animation": ("gif", encoded("GIF", save_all=True, append_images=[Image.new("RGB", (32, 24))]), GOOD),
    "broken EXIF": ("jpg", encoded("JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + bytes(20)), GOOD),
    "EXIF in a circle": ("jpg", encoded("JPEG", exif=_CIRCLE), GOOD),
    "a name in capitals": ("JPG", JPEG, GOOD),
    "a wrong extension": ("png", JPEG, GOOD),
}

CAPTIONS: dict[str, tuple[str, bytes | None, str]] = {
    "no caption": ("txt", None, "no caption"),
    "empty caption": ("txt", b"", "no caption"),
    "blank caption": ("txt", b" \n\t\n", "no caption"),
    "Latin-1 caption": ("txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
    "UTF-16 caption": ("txt", "a caption".encode("utf-16"), "not UTF-8"),
    "NUL in the caption": ("txt", b"a\0b", "NUL"),
    "10 MB of caption": ("txt", b"word " * (2 << 20), "the limit is"),
    "half JSON": ("json", b'{"caption": "a', "not JSON"),
    "JSON list": ("json", b'["a"]', "expected a JSON object"),
    "JSON number": ("json", b'{"caption": 5}', "expected a string"),
    "deep JSON": ("json", b'{"caption":' + b"[" * 50_000, "not JSON"),
    "long number": ("json", b'{"width": ' + b"9" * 9000 + b"}", "not JSON"),
    "JSON without a caption": ("json", b'{"title": "a"}', "no caption"),
    "half a surrogate pair": ("json", b'{"caption": "\\ud800"}', "surrogate"),
    "byte order mark": ("txt", b"\xef\xbb\xbfa caption", GOOD),
    "Windows lines": ("txt", b"a caption\r\nanother\r\n", GOOD),
}

ROWS: dict[str, tuple[object, str]] = {
    "no JSON": (b"{oops", "not JSON"),
    "a list": (b'["good0.jpg", "a"]', "expected a JSON object"),
    "deep": (b"[" * 50_000, "not JSON"),
    "Latin-1": (b'{"file_name": "good1.jpg", "text": "caf\xe9"}', "UTF-8|surrogate"),
    "no file": ({"text": "a"}, "no 'file_name'"),
    "a number for a file": ({"file_name": 5, "text": "a"}, "no 'file_name'"),
    "no such file": ({"file_name": "gone.jpg", "text": "a"}, "cannot be read"),
    "a file above": ({"file_name": "../secret.jpg", "text": "a"}, "lies outside"),
    "an absolute file": ({"file_name": "/etc/hostname", "text": "a"}, "lies outside"),
    "NUL in a name": ({"file_name": "a\0.jpg", "text": "a"}, "cannot be read"),
    "a long name": ({"file_name": "n" * 5000, "text": "a"}, "cannot be read"),
    "a folder": ({"file_name": "folder", "text": "a"}, "a directory"),
    "a number for a caption": ({"file_name": "good2.jpg", "text": 5}, "expected a string"),
    "no caption": ({"file_name": "good3.jpg", "text": None}, "no caption"),
    "10 MB of caption": ({"file_name": "good4.jpg", "text": "word " * (2 << 20)}, "the limit is"),
}


def write_folder(folder: Path) -> dict[str, str]:
    """All kinds in one folder beside three good images; {name of the image: what must become of it}."""
    folder.mkdir()
    expected = {}

    def put(kind: str, extension: str, data: bytes | None, outcome: str) -> Path:
        file = folder / f"{kind}.{extension}"
        expected[file.name] = outcome
        if data is not None:
            file.write_bytes(data)
        (folder / f"{kind}.txt").write_text("a caption")
        return file

    for kind, (extension, data, outcome) in IMAGES.items():
        put(kind, extension, data, outcome)
    for kind, (extension, data, outcome) in CAPTIONS.items():
        put(kind, "jpg", JPEG, outcome)
        (folder / f"{kind}.txt").unlink()
        if data is not None:
            (folder / f"{kind}.{extension}").write_bytes(data)
    with open(put("sparse and large", "jpg", b"", "the limit is"), "r+b") as f:
        f.truncate(200 << 20)
    put("dangling link", "jpg", None, "cannot be read").symlink_to(folder / "nowhere")
    put("link to itself", "jpg", None, "cannot be read").symlink_to("link to itself.jpg")
    os.mkfifo(put("a pipe", "jpg", None, "not a regular file"))
    put("link to a device", "jpg", None, "not a regular file|leads out of this folder").symlink_to("/dev/zero")
    put("a pipe for a caption", "jpg", JPEG, "not a regular file")
    (folder / "a pipe for a caption.txt").unlink()
    os.mkfifo(folder / "a pipe for a caption.txt")
    put("a folder for a caption", "jpg", JPEG, "a directory")
    (folder / "a folder for a caption.txt").unlink()
    (folder / "a folder for a caption.txt").mkdir()
    for i in range(3):
        put(f"good{i}", "jpg", encoded("JPEG", seed=i), GOOD)
    put("quote' \"and\nline", "jpg", JPEG, GOOD)
    put("n" * 240, "jpg", JPEG, GOOD)
    return expected


def write_table(folder: Path) -> list[str]:
    """A metadata.jsonl with all kinds of rows among five good ones; the reasons that must be given."""
    (folder / "folder").mkdir(parents=True)
    lines = []
    for i in range(10):
        (folder / f"good{i}.jpg").write_bytes(encoded("JPEG", seed=i))
    for i in range(5, 10):
        lines.append(json.dumps({"file_name": f"good{i}.jpg", "text": f"caption {i}"}).encode())
    lines[2:2] = [row if isinstance(row, bytes) else json.dumps(row).encode() for row, _ in ROWS.values()]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return [outcome for _, outcome in ROWS.values()]
