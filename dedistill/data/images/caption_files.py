"""Captions from the files that people keep beside their images: text, JSON, and lists in tables."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dedistill.data.images.types import ImageSet
from dedistill.errors import UserError, amount

if TYPE_CHECKING:
    import pyarrow

# --- captions from the files people keep beside their images -------------------------------------------------------


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
    values: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
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


# --- lists of images with their captions ---------------------------------------------------------------------------


CAPTION_COLUMN = re.compile(r"(\w+_)?captions?(_(short|long|\d+))?|text|prompt")
BAD_BYTES = "surrogateescape"
"""What is not UTF-8 costs the row it stands in: captions with surrogates are refused."""
Row = dict[str, object]


def read_table(source: ImageSet, path: Path) -> list[tuple[str, tuple[str, ...], str]]:
    """(file, captions, problem) for each image of the list; several rows of one image are joined.

    Caption columns are ``source.fields``, else those with a usual name (caption, short_caption, captions, text ...), else
    the only other column of text. Raises ``UserError`` for an unreadable list or an undecided choice of columns.
    """
    try:
        rows = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix.lower()](path)
    except (OSError, ValueError, csv.Error) as e:  # pyarrow's errors are ValueErrors, a wrong encoding is one too
        raise UserError(f"data: source '{source.title}': '{path}' cannot be read: {e}") from e
    good = [row for _, row in rows if isinstance(row, dict)]
    kept = _caption_columns(source, path, good)
    joined: dict[str, tuple[list[str], str]] = {}
    for where, row in rows:
        file = row.get(source.file_column) if isinstance(row, dict) else None
        if isinstance(row, str) or not isinstance(file, str) or not file:
            joined[f"{path.name} {where}"] = ([], row if isinstance(row, str) else f"no {source.file_column!r}")
            continue
        captions, problem = joined.setdefault(file, ([], ""))
        try:
            captions += cleaned([caption for column in kept for caption in as_captions(row.get(column), column)])
        except BadCaption as e:
            joined[file] = (captions, problem or f"{path.name} {where}: {e}")
    return [(file, tuple(dict.fromkeys(captions)), problem) for file, (captions, problem) in joined.items()]


def _caption_columns(source: ImageSet, path: Path, rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    where = f"data: source '{source.title}': '{path}'"
    if not columns:
        raise UserError(f"{where} cannot be read: no line of it is a row in UTF-8")
    if source.file_column not in columns:
        raise UserError(f"{where} has no column {source.file_column!r} that names the image (columns: {', '.join(columns)})")
    if missing := [field for field in source.fields if field not in columns]:
        raise UserError(f"{where} has no column {', '.join(map(repr, missing))} (columns: {', '.join(columns)})")
    if source.fields:
        return list(source.fields)
    texts = [c for c in columns if c != source.file_column and any(isinstance(row.get(c), str | list) for row in rows)]
    usual = [c for c in texts if CAPTION_COLUMN.fullmatch(c)]
    if len(usual or texts) > 1 and not usual:
        raise UserError(f"{where} has several columns of text ({', '.join(texts)}); name those with captions in 'fields'")
    return usual or texts


def _jsonl(path: Path) -> list[tuple[str, Row | str]]:
    return list(_json_rows(path))


def _json_rows(path: Path) -> Iterator[tuple[str, Row | str]]:
    with open(path, encoding="utf-8-sig", errors=BAD_BYTES) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield f"line {number}", row if isinstance(row, dict) else f"expected a JSON object, found {line.strip()[:40]}"
            except (ValueError, RecursionError) as e:
                yield f"line {number}", f"not JSON: {e}"


def _csv(path: Path) -> list[tuple[str, Row | str]]:
    csv.field_size_limit(1 << 30)  # beyond its own limit it would give up the whole table
    with open(path, encoding="utf-8-sig", errors=BAD_BYTES, newline="") as f:
        reader = csv.DictReader(f, restkey="")
        rows = []
        for row in reader:
            whole = "" not in row and None not in row.values()
            rows.append(
                (f"line {reader.line_num}", row if whole else f"expected {amount(len(reader.fieldnames or ()), 'field')}")
            )
        return rows


def _parquet(path: Path) -> list[tuple[str, Row | str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    plain = [field.name for field in schema if _is_text(field.type, pa)]
    table = pq.read_table(path, columns=plain)
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def _is_text(kind: "pyarrow.DataType", pa: ModuleType) -> bool:
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)
