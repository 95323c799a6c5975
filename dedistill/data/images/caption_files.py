"""Captions from the files that people keep beside their images: text, JSON, and lists in tables."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
LINE_END = re.compile(r"\r\n|[\n\r]")
"""What ends a line of a text file. Unicode has more, which word processors and models that write captions put inside one."""


INVISIBLE = "\ufeff\u200b\u2060"
"""Marks of files that were joined, and spaces of no width: no text."""


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
    lines = [line.strip() for line in LINE_END.split(text.strip())]
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
    """A cell or a JSON value: a string, a list of strings, or nothing. Nulls of a list are what a captioner did not answer.

    Raises ``BadCaption`` for other types.
    """
    values: list[Any] = [v for v in (value if isinstance(value, list) else [value]) if v is not None]
    if wrong := [v for v in values if not isinstance(v, str)]:
        raise BadCaption(f"{field!r} holds a {type(wrong[0]).__name__}; expected a string or a list of strings")
    return values


def cleaned(captions: list[str]) -> tuple[str, ...]:
    """Captions without surrounding blanks, without empty ones and repetitions. Raises ``BadCaption`` for what is no text."""
    captions = [caption.strip().strip(INVISIBLE).strip() for caption in captions]
    if (longest := max(map(len, captions), default=0)) > MAX_BYTES:
        raise BadCaption(f"{longest:,} characters; the limit is {MAX_BYTES:,}")
    if any("\0" in caption for caption in captions):
        raise BadCaption("a NUL character in the text (saved as UTF-16?)")
    if any("\ud800" <= character <= "\udfff" for caption in captions for character in caption):
        raise BadCaption("not UTF-8, or half a surrogate pair in the text, which no encoding can hold")
    return tuple(dict.fromkeys(caption for caption in captions if caption))


# --- lists of images with their captions ---------------------------------------------------------------------------


CAPTION_COLUMN = re.compile(r"(\w+_)?captions?(_(short|long|\d+))?|text|prompt")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
BAD_BYTES = "surrogateescape"
"""What is not UTF-8 costs the row it stands in: captions with surrogates are refused."""
MAX_ROWS = 4_000_000
MAX_TABLE_BYTES = 1 << 30
Row = dict[str, object]


SHOWN = 20


def some(names: Sequence[str]) -> str:
    """Names for a message, of many the first."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


class BadRow(str):
    """Why a row cannot be used. ``named``: the fields that it has for all that."""

    named: dict[str, str]

    def __new__(cls, reason: str, named: dict[str, str]) -> "BadRow":
        row = super().__new__(cls, reason)
        row.named = named
        return row


def read_table(source: ImageSet, path: Path) -> list[tuple[str, tuple[str, ...], str, str]]:
    """(file, captions, problem, "") for each image of the list; several rows of one image are joined.

    For a row that cannot be used: (where, (), why, the image it names).

    Caption columns are ``source.fields``, else those with a usual name (caption, short_caption, captions, text ...), else
    the only other column of text. Raises ``UserError`` for an unreadable list or an undecided choice of columns.
    """
    try:
        if not path.is_file():  # a pipe, whose end may never come
            raise ValueError("not a regular file")
        if (size := path.stat().st_size) > MAX_TABLE_BYTES:
            raise ValueError(f"{size:,} bytes; the limit is {MAX_TABLE_BYTES:,}: split it into several sets")
        rows = READERS[path.suffix.lower()](path)
    except (OSError, ValueError, csv.Error) as e:  # pyarrow's errors are ValueErrors, a wrong encoding is one too
        raise UserError(f"data: source '{source.title}': '{path}' cannot be read: {e}") from e
    good = [row for _, row in rows if isinstance(row, dict)]
    if not good:
        first = next((f"{where}: {row}" for where, row in rows if isinstance(row, str)), "it has no rows")
        raise UserError(f"data: source '{source.title}': '{path}' cannot be read: {first}")
    kept = _caption_columns(source, path, good)
    joined: dict[str, tuple[list[str], str]] = {}
    about: dict[str, str] = {}
    for where, row in rows:
        file = row.get(source.file_column) if isinstance(row, dict) else None
        if isinstance(row, str) or not isinstance(file, str) or not file:
            joined[f"{path.name} {where}"] = ([], row if isinstance(row, str) else f"no {source.file_column!r}")
            about[f"{path.name} {where}"] = row.named.get(source.file_column, "") if isinstance(row, BadRow) else ""
            continue
        captions, problem = joined.setdefault(file, ([], ""))
        try:
            captions += cleaned([caption for column in kept for caption in as_captions(row.get(column), column)])
        except BadCaption as e:
            joined[file] = (captions, problem or f"{path.name} {where}: {e}")
    return [(file, tuple(dict.fromkeys(c)), problem, about.get(file, "")) for file, (c, problem) in joined.items()]


def _caption_columns(source: ImageSet, path: Path, rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if source.file_column not in columns:
        listed = f"data: source '{source.title}': '{path}' has no column {source.file_column!r} that names the image"
        raise UserError(f"{listed} ({_all_columns(path, columns)})" + _other_form(path, columns))
    return choose_columns(source, path, columns, rows)


def choose_columns(source: ImageSet, path: Path, columns: list[str], rows: Sequence[Row]) -> list[str]:
    """Those of ``columns`` that hold captions. path: of the table. Raises UserError where there is none, or several might."""
    where = f"data: source '{source.title}': '{path}'"
    if missing := [field for field in source.fields if field not in columns]:
        raise UserError(f"{where} has no column {', '.join(map(repr, missing))} ({_all_columns(path, columns)})")
    if source.fields:
        return list(source.fields)
    textual = {c for row in rows for c, value in row.items() if isinstance(value, str | list)} - {source.file_column}
    texts = [c for c in columns if c in textual]
    usual = [c for c in texts if CAPTION_COLUMN.fullmatch(c)]
    if len(usual or texts) > 1 and not usual:
        raise UserError(
            f"{where} has several columns of text ({some(texts)}); name those with captions: "
            "captions in [[data.sets]], or --fields of dedistill scan"
        )
    if not texts and source.missing_captions == "error":
        raise UserError(
            f"{where} has no column with captions ({_all_columns(path, columns)}); without captions, set "
            'data.missing_captions to "empty"'
        )
    return usual or texts


def _all_columns(path: Path, columns: list[str]) -> str:
    """For a message, those of a parquet table that are not text among them."""
    other = []
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        other = [f"{field.name} of {str(field.type)[:60]}" for field in pq.read_schema(path) if not _is_text(field.type, pa)]
    return f"columns: {some(columns)}" + (f"; no text: {some(other)}" if other else "")


def _other_form(path: Path, columns: list[str]) -> str:
    """What a table without the column looks like, and how to have it read; empty where it is just another table."""
    with open(path, "rb") as f:
        if f.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return "; it is UTF-16: save it as UTF-8"
    separator = next((name for sign, name in SEPARATORS.items() if sign in columns[0]), "") if len(columns) == 1 else ""
    if separator:
        return f"; its fields are separated by {separator}: save it with commas"
    return "; another column is named by file_column in [[data.sets]], or --file-column of dedistill scan"


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
    """Rows without the columns that have no name: pandas' index stands in the first, spreadsheets add empty ones at the end."""
    csv.field_size_limit(1 << 30)  # beyond its own limit it would give up the whole table
    with open(path, encoding="utf-8-sig", errors=BAD_BYTES, newline="") as f:
        reader = csv.reader(f, skipinitialspace=True, strict=True)
        names = [name.strip() for name in next(reader, [])]
        named = [name for name in names if name]
        if twice := [name for name, times in Counter(named).items() if times > 1]:
            raise ValueError(f"two columns are called {twice[0]!r}")
        wrong = f"expected {amount(len(names), 'field')}"
        rows: list[tuple[str, Row | str]] = []
        while True:
            start = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return rows
            except csv.Error as e:  # else the field would go on to the next quote, over the rows between
                rows.append((f"line {start}", f"its quotes do not match ({e}): inside a quoted field a quote is written twice"))
                continue
            if not row:
                continue
            found = {name: value for name, value in zip(names, row) if name}
            whole: Row = dict(found)
            rows.append((f"line {reader.line_num}", whole if len(row) == len(names) else BadRow(wrong, found)))


def parquet_rows(path: Path) -> list[tuple[str, Row]]:
    """Its columns of text. Raises OSError or ValueError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if (count := file.metadata.num_rows) > MAX_ROWS:
            raise ValueError(f"it has {count:,} rows; the limit is {MAX_ROWS:,}: split it into several sets")
        plain = [field.name for field in file.schema_arrow if _is_text(field.type, pa)]
        rows: list[Row] = []
        size = 0
        for batch in file.iter_batches(batch_size=1024, columns=plain):  # a small file may unpack to any size
            if (size := size + batch.nbytes) > MAX_TABLE_BYTES:
                raise ValueError(f"its texts exceed {MAX_TABLE_BYTES >> 20:,} MiB together: split it into several sets")
            rows += batch.to_pylist()
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _is_text(kind: "pyarrow.DataType", pa: ModuleType) -> bool:
    """Text or lists of text, however they are kept: pandas' categories, for one, are dictionaries."""
    t = pa.types
    lists = (t.is_list, t.is_large_list, t.is_fixed_size_list, t.is_list_view, t.is_large_list_view)
    if any(is_list(kind) for is_list in lists):
        kind = kind.value_type
    if t.is_dictionary(kind):
        kind = kind.value_type
    return t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)


READERS: dict[str, Callable[[Path], Sequence[tuple[str, Row | str]]]]
READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": parquet_rows}
