"""Captions from the files people keep beside their pictures: plain text, JSON, and cells of tables."""

import json

EXTENSIONS = ("txt", "caption", "json")
FIELDS = ("caption", "caption_short", "captions")
"""Keys of a JSON file that hold captions where a recipe names no others."""
MAX_BYTES = 1 << 20


class BadCaption(Exception):
    """A caption file that cannot be used. The message is the reason, without the name of the file."""


def captions_in(data: bytes, extension: str, *, fields: tuple[str, ...], split_lines: bool | None) -> tuple[str, ...]:
    """The captions of one file. ``fields`` are the keys looked up in JSON (default ``FIELDS``).

    ``split_lines`` says whether each line of a text file is a caption of its own; None decides file by file: lines are
    captions, unless a blank line stands between them (then they are the paragraphs of one long caption). Raises
    ``BadCaption``.
    """
    if len(data) > MAX_BYTES:
        raise BadCaption(f"{len(data):,} bytes; the limit is {MAX_BYTES:,}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadCaption(f"not UTF-8: byte 0x{data[e.start]:02x} at offset {e.start}; save it as UTF-8") from None
    return _from_json(text, fields or FIELDS) if extension == "json" else _from_text(text, split_lines)


def _from_text(text: str, split_lines: bool | None) -> tuple[str, ...]:
    lines = [line.strip() for line in text.strip().splitlines()]
    if split_lines is None:
        split_lines = "" not in lines
    return cleaned(lines if split_lines else [text])


def _from_json(text: str, fields: tuple[str, ...]) -> tuple[str, ...]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BadCaption(f"not JSON: {e}") from None
    if not isinstance(content, dict):
        raise BadCaption(f"expected a JSON object, found a {type(content).__name__}")
    return cleaned([caption for field in fields for caption in as_captions(content.get(field), field)])


def as_captions(value: object, field: str) -> list[str]:
    """A cell or a JSON value: a string, a list of strings, or nothing. Raises ``BadCaption`` for other types."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    wrong = next((v for v in values if not isinstance(v, str)), None)
    if wrong is not None:
        raise BadCaption(f"{field!r} holds a {type(wrong).__name__}; expected a string or a list of strings")
    return values


def cleaned(captions: list[str]) -> tuple[str, ...]:
    """Captions without surrounding blanks, without empty ones and repetitions. Raises ``BadCaption`` for what is no text."""
    captions = [caption.strip() for caption in captions]
    if (longest := max(map(len, captions), default=0)) > MAX_BYTES:
        raise BadCaption(f"{longest:,} characters; the limit is {MAX_BYTES:,}")
    if any("\0" in caption for caption in captions):
        raise BadCaption("a NUL character in the text (saved as UTF-16?)")
    if any("\ud800" <= character <= "\udfff" for caption in captions for character in caption):
        raise BadCaption("not UTF-8, or half a surrogate pair in the text, which no encoding can hold")
    return tuple(dict.fromkeys(caption for caption in captions if caption))
