"""Decoding: a known pixel of every format, and every kind of damage refused with a reason."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from sklearn.datasets import load_sample_images

from dedistill.data.images import decode as decode_module
from dedistill.data.images.decode import ORIENTATION, BadImage, decode

LOSSLESS = {"PNG": {}, "TIFF": {}, "BMP": {}, "WEBP": {"lossless": True}, "PPM": {}}
LOSSY = {
    "JPEG": {"quality": 95},
    "MPO": {"quality": 95},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 95},
    "JPEG2000": {},
    "GIF": {},
}


@pytest.fixture(scope="module")
def china() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).resize((160, 107), Image.Resampling.LANCZOS)


def data(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean())


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_return_their_pixels(china, kind):
    assert np.array_equal(decode(data(china, kind, **LOSSLESS[kind])), china)


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_formats_come_close(china, kind):
    assert difference(decode(data(china, kind, **LOSSY[kind])), china) < 6


def with_orientation(image: Image.Image, orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return data(image, kind, exif=exif, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, kind):
    """The red corner of the stored image ends where EXIF says row 0 and column 0 are."""
    stored = Image.new("RGB", (48, 32), "black")
    stored.paste((255, 0, 0), (0, 0, 16, 16))
    image = with_orientation(stored, orientation, kind)
    upright = decode(image)
    # EXIF 2.32, tag 274: which side of the scene the 0th row and the 0th column show
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    x = 4 if "l" in corner else upright.width - 5
    y = 4 if "t" in corner else upright.height - 5
    assert upright.size == ((48, 32) if orientation < 5 else (32, 48))
    red = np.asarray(upright)[y, x].astype(int)
    assert red[0] > 200 and red[1:].max() < 60
    assert np.asarray(upright)[upright.height - 1 - y, upright.width - 1 - x].max() < 60


def test_broken_exif_is_ignored(china):
    assert decode(data(china, "JPEG", exif=b"Exif\0\0garbage garbage")).size == china.size


def test_alpha_over_white():
    """Transparent is white, half transparent half white, however the transparency is stored."""
    rgba = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    rgba.putpixel((1, 1), (0, 0, 255, 255))
    rgba.putpixel((2, 2), (0, 0, 0, 128))
    for kind in ("PNG", "WEBP"):
        pixels = np.asarray(decode(data(rgba, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))))
        assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[1, 1].tolist() == [0, 0, 255]
        assert abs(int(pixels[2, 2, 0]) - 127) <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    pixels = np.asarray(decode(data(palette, "PNG", transparency=0)))
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[0, 1].tolist() == [200, 100, 50]
    pixels = np.asarray(decode(data(Image.new("L", (4, 4), 7), "PNG", transparency=7)))
    assert (pixels == 255).all()
    pixels = np.asarray(decode(data(Image.new("LA", (4, 4), (0, 128)), "PNG")))
    assert abs(int(pixels[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    image = Image.fromarray(np.tile(ramp, (4, 1)))
    assert image.mode == "I;16"
    grey = np.asarray(decode(data(image, kind)))
    assert np.abs(grey[0, :, 0].astype(int) - np.arange(256)).max() == 0
    assert (grey == grey[..., :1]).all()


def test_integers_outside_sixteen_bits_and_floats_are_refused():
    with pytest.raises(BadImage, match="from 0 to 70000"):
        decode(data(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF"))
    with pytest.raises(BadImage, match="floating-point"):
        decode(data(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    """Full cyan is (0, 255, 255), no ink is white: ink is not taken for light."""
    inks = Image.new("CMYK", (32, 16), (255, 0, 0, 0))
    inks.paste((0, 0, 0, 0), (16, 0, 32, 16))
    pixels = np.asarray(decode(data(inks, kind))).astype(int)
    assert np.abs(pixels[8, 4] - [0, 255, 255]).max() < 8 and np.abs(pixels[8, 28] - 255).max() < 8


def test_cmyk_with_a_useless_profile(china):
    """A profile for RGB inside a CMYK image cannot be applied; the plain formula remains."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decode(data(china.convert("CMYK"), "TIFF"))
    assert np.array_equal(decode(data(china.convert("CMYK"), "TIFF", icc_profile=profile)), plain)
    assert np.array_equal(decode(data(china.convert("CMYK"), "TIFF", icc_profile=b"no profile")), plain)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    animation = data(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(animation)).n_frames == 3
    assert np.asarray(decode(animation))[8, 8].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr"])
def test_other_modes(china, mode):
    image = china.convert(mode)
    assert difference(decode(data(image, "TIFF")), image.convert("RGB")) < 1


def bomb(width: int, height: int) -> bytes:
    """A PNG of 70 bytes that claims to hold width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (60000, 60000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_bombs_are_refused_by_their_header(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage):
            decode(bomb(*size))


def test_limits(china):
    png = data(china, "PNG")
    pixels = china.width * china.height
    assert decode(png, max_pixels=pixels, max_bytes=len(png)).size == china.size
    with pytest.raises(BadImage, match=rf"160 x 107 pixels; the limit is {pixels - 1:,} pixels"):
        decode(png, max_pixels=pixels - 1)
    with pytest.raises(BadImage, match=f"the limit is {len(png) - 1:,}"):
        decode(png, max_bytes=len(png) - 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "BMP", "JPEG2000"])
def test_truncated_files_are_failures(china, kind):
    whole = data(china, kind)
    assert decode(whole).size == china.size
    for share in (0.02, 0.3, 0.6, 0.9):
        with pytest.raises(BadImage):
            decode(whole[: int(len(whole) * share)])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404", "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (b"\xff\xd8\xff\xe0" + bytes(500), "format|header|decoded"),
        (b"\0" * 1000, "not an image"),
    ],
)
def test_other_files_are_refused(content, reason):
    with pytest.raises(BadImage, match=reason):
        decode(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_random_damage_never_raises_anything_else(china, kind):
    """Bytes flipped anywhere give an image or BadImage."""
    whole = np.frombuffer(data(china.resize((40, 30)), kind), dtype=np.uint8)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        hurt = whole.copy()
        hurt[rng.integers(0, len(hurt), 4)] = rng.integers(0, 256, 4)
        try:
            assert decode(hurt.tobytes()).mode == "RGB"
            outcomes.add("read")
        except BadImage as e:
            outcomes.add("refused")
            assert str(e)
    assert "refused" in outcomes


def test_size_is_exif_transposed_like_pillow(china):
    image = with_orientation(china, 6, "JPEG")
    assert np.array_equal(decode(image), ImageOps.exif_transpose(Image.open(io.BytesIO(image))))


SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
WIDE = {
    "Adobe RGB": (((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)), 2.2),
    "ProPhoto": (((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491)), 1.8),
    "linear sRGB": (SRGB, 1.0),
}
"""XYZ (D50) of red, green and blue, and gamma."""


def icc_profile(primaries, gamma: float, space: bytes = b"RGB ") -> bytes:
    """A matrix profile, or a grey one, by the ICC's own layout (version 2.4)."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in values))

    white, curve = (0.9642, 1.0, 0.8249), b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    tags = [(b"desc", b"desc\0\0\0\0" + struct.pack(">I", 5) + b"mine\0" + b"\0" * 78), (b"wtpt", xyz(*white))]
    tags += [(b"cprt", b"text\0\0\0\0none\0")]
    if space == b"GRAY":
        tags += [(b"kTRC", curve)]
    for letter, primary in zip("rgb", primaries):
        tags += [(f"{letter}XYZ".encode(), xyz(*primary)), (f"{letter}TRC".encode(), curve)]
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags:
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag + b"\0" * (-len(tag) % 4)
    head = struct.pack(">I", start + len(body)) + b"\0\0\0\0" + struct.pack(">I", 0x02400000) + b"mntr" + space + b"XYZ "
    return head + b"\0" * 12 + b"acsp" + b"\0" * 28 + xyz(*white)[8:] + b"\0" * 48 + table + body


def in_srgb(pixels: np.ndarray, primaries, gamma: float) -> np.ndarray:
    """By the definitions of both spaces, cut at their edges."""
    linear = (pixels / 255) ** gamma @ np.array(primaries) @ np.linalg.inv(np.array(SRGB))
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


COLOURS = np.array([[230, 60, 60], [40, 160, 70], [30, 50, 200], [128, 128, 128], [255, 255, 255], [0, 0, 0]], dtype=np.uint8)


@pytest.mark.parametrize("space", WIDE)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_go_through_the_profile_of_the_image(space, mode):
    image = Image.fromarray(np.tile(COLOURS, (4, 1, 1)))
    image = image.quantize(16, dither=Image.Dither.NONE) if mode == "P" else image.convert(mode)
    found = np.asarray(decode(data(image, "PNG", icc_profile=icc_profile(*WIDE[space])))).astype(int)
    assert np.abs(found[1] - in_srgb(COLOURS, *WIDE[space])).max() <= 4


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", [1, 4, 6])
def test_rows_that_are_converted_apart_make_the_same_image(mode, orientation, china, monkeypatch):
    """As all at once does: a large image is held twice, and not four times."""
    if mode == "I;16":
        image = Image.fromarray(np.asarray(china.convert("L")).astype(np.uint16) * 257)
    else:
        image = china.convert("RGBA" if mode == "LA" else mode).convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    profile = {} if mode in ("L", "LA", "1", "I;16", "CMYK") else {"icc_profile": icc_profile(*WIDE["ProPhoto"])}
    stored = data(image, "JPEG" if mode == "CMYK" else "PNG", exif=exif, **profile)
    found = {}
    for rows in (1000, 16, 107, 106):
        monkeypatch.setattr(decode_module, "ROWS", rows)
        found[rows] = np.asarray(decode(stored))
    assert all(np.array_equal(found[1000], other) for other in found.values())
    assert found[1000].shape == ((160, 107, 3) if orientation == 6 else (107, 160, 3))


@pytest.mark.parametrize("gamma", [1.8, 2.6])
def test_grey_goes_through_its_profile_too(gamma):
    ramp = np.arange(20, 256, dtype=np.uint8)
    found = np.asarray(decode(data(Image.fromarray(ramp[None]), "TIFF", icc_profile=icc_profile((), gamma, b"GRAY"))))
    wanted = in_srgb(np.repeat(ramp[:, None], 3, 1), SRGB, gamma)
    assert np.abs(found[0].astype(int) - wanted).max() <= 3


@pytest.mark.parametrize("profile", [icc_profile(SRGB, 1.0)[:300], icc_profile((), 2.2, b"GRAY"), b"", b"junk" * 100])
def test_a_profile_that_cannot_be_used_changes_nothing(china, profile):
    assert np.array_equal(decode(data(china, "PNG", icc_profile=profile)), decode(data(china, "PNG")))


def test_a_profile_of_srgb_changes_nothing_at_all(china):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decode(data(china, "PNG", icc_profile=profile)), decode(data(china, "PNG")))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(mode):
    """A file of a megabyte could keep the decoder busy for hours."""
    whole = data(Image.new(mode, (3000, 3000)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert decode(whole + last * 40).size == (3000, 3000)
    with pytest.raises(BadImage, match="scans; the limit is 64"):
        decode(whole[:-2] + last * 30_000 + whole[-2:])
