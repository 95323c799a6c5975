"""Lists of pictures with their captions: .jsonl, .csv and .parquet, as Hugging Face's imagefolder and others have them."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from dedistill.data.caption_files import BadCaption, as_captions, cleaned
from dedistill.data.picture_set import PictureSet
from dedistill.errors import UserError

CAPTION_COLUMN = re.compile(r"(\w+_)?captions?(_(short|long|\d+))?|text|prompt")
BAD_BYTES = "surrogateescape"
"""What is not UTF-8 costs the row it stands in: captions with surrogates are refused."""
Row = dict[str, object]


def read_table(source: PictureSet, path: Path) -> list[tuple[str, tuple[str, ...], str]]:
    """(file, captions, problem) for each picture of the list; several rows of one picture are joined.

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
        if not isinstance(file, str) or not file:
            joined[f"{path.name} {where}"] = ([], row if isinstance(row, str) else f"no {source.file_column!r}")
            continue
        captions, problem = joined.setdefault(file, ([], ""))
        try:
            captions += cleaned([caption for column in kept for caption in as_captions(row.get(column), column)])
        except BadCaption as e:
            joined[file] = (captions, problem or f"{path.name} {where}: {e}")
    return [(file, tuple(dict.fromkeys(captions)), problem) for file, (captions, problem) in joined.items()]


def _caption_columns(source: PictureSet, path: Path, rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    where = f"data: source '{source.title}': '{path}'"
    if not columns:
        raise UserError(f"{where} cannot be read: no line of it is a row in UTF-8")
    if source.file_column not in columns:
        raise UserError(f"{where} has no column {source.file_column!r} that names the picture (columns: {', '.join(columns)})")
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
            rows.append((f"line {reader.line_num}", row if whole else f"expected {len(reader.fieldnames)} fields"))
        return rows


def _parquet(path: Path) -> list[tuple[str, Row | str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    plain = [field.name for field in schema if _is_text(field.type, pa)]
    table = pq.read_table(path, columns=plain)
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def _is_text(kind, pa) -> bool:
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_string(inner) or pa.types.is_large_string(inner)
