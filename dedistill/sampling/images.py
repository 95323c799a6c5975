"""Contact sheets: a labelled grid of images as one image, readable without a browser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dedistill.errors import amount

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SHORT_SIDE = 64  # an image smaller than this is enlarged, or nobody can judge it
GAP = 4
MARGIN = 20
LABEL_WIDTH = 14  # in units of the text size
LABEL_LINES = 4
TEXT_SIZES = 14, 24  # text grows with the images between these, or a large sheet shown small is unreadable
PAPER, INK, EMPTY = (255, 255, 255), (32, 33, 36), (238, 238, 236)


def integer_scale(width: int, height: int, short_side: int = SHORT_SIDE) -> int:
    """The smallest whole factor that brings the shorter side to ``short_side`` pixels, and 1 for larger images."""
    return max(1, -(-short_side // max(1, min(width, height))))


def as_image(image: Tensor) -> Image.Image:
    """One image [C, H, W] in [-1, 1], clamped, at its own resolution; grey for one channel, RGB for three."""
    x = ((torch.nan_to_num(image).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    return Image.fromarray(x[0] if len(x) == 1 else x.transpose(1, 2, 0))


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]],
    columns: Sequence[str],
    *,
    title: str,
    scale: int | None = None,
) -> Image.Image:
    """Lay images out in a grid with a label per row and per column.

    ``scale`` enlarges every image by a whole factor without smoothing; ``None`` picks one that makes tiny images
    legible. ``None`` in place of an image leaves an empty field. The sheet is RGB whatever the images are.
    """
    for label, images in rows:
        if len(images) != len(columns):
            raise ValueError(f"row {label!r} has {amount(len(images), 'image')} for {amount(len(columns), 'column')}")
    sizes = [image.size for _, images in rows for image in images if image is not None]
    if not sizes:
        raise ValueError("a contact sheet needs at least one image")
    width, height = max(w for w, _ in sizes), max(h for _, h in sizes)
    scale = scale or integer_scale(width, height)
    field = width * scale, height * scale
    text_size = min(max(max(field) // 13, TEXT_SIZES[0]), TEXT_SIZES[1])
    title_size = round(1.4 * text_size)
    title_font, font = ImageFont.load_default(size=title_size), ImageFont.load_default(size=text_size)

    column_width = max([field[0], *(int(font.getlength(name)) + 8 for name in columns)]) + GAP
    labels = [_wrap(label, font, LABEL_WIDTH * text_size) for label, _ in rows]
    label_width = int(max(font.getlength(line) for lines in labels for line in lines)) + 12
    line_height = round(1.3 * text_size)
    row_heights = [max(field[1], len(lines) * line_height) + GAP for lines in labels]
    left = MARGIN + label_width
    top = MARGIN + title_size + 16 + line_height + 4

    grid_width = column_width * len(columns) - GAP
    sheet_width = max(left + grid_width, MARGIN + int(title_font.getlength(title))) + MARGIN
    sheet = Image.new("RGB", (sheet_width, top + sum(row_heights) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=title_font, anchor="lt")
    for i, name in enumerate(columns):
        centre = left + i * column_width + (column_width - GAP) // 2
        draw.text((centre, top - 6), name, fill=INK, font=font, anchor="ms")
    for (_, images), lines, row_height in zip(rows, labels, row_heights):
        middle = top + (row_height - GAP) // 2
        for i, line in enumerate(lines):
            y = middle + round((i - (len(lines) - 1) / 2) * line_height)
            draw.text((left - 12, y), line, fill=INK, font=font, anchor="rm")
        for i, image in enumerate(images):
            x = left + i * column_width + (column_width - GAP - field[0]) // 2
            _place(sheet, image, (x, middle - field[1] // 2), field, scale)
        top += row_height
    return sheet


def _place(sheet: Image.Image, image: Image.Image | None, corner: tuple[int, int], field: tuple[int, int], scale: int) -> None:
    """Paste one image in the middle of its field; a missing one leaves a pale field."""
    if image is None:
        sheet.paste(EMPTY, (*corner, corner[0] + field[0], corner[1] + field[1]))
        return
    large = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    sheet.paste(large, (corner[0] + (field[0] - large.width) // 2, corner[1] + (field[1] - large.height) // 2))


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Break a label into at most ``LABEL_LINES`` lines of ``width`` pixels; what does not fit becomes an ellipsis."""
    lines: list[str] = [""]
    for word in text.split():
        # A single word may be wider than the column (a file name, a URL): cut it by characters.
        for piece in _pieces(word, font, width):
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    if len(lines) > LABEL_LINES:
        last = lines[LABEL_LINES - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: LABEL_LINES - 1], last.rstrip() + "..."]
    return lines


def _pieces(word: str, font: Font, width: int) -> list[str]:
    """The word itself, or its parts when it is wider than ``width``."""
    pieces = [""]
    for character in word:
        if font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces
