"""Images that lie in parquet tables as the Hugging Face hub keeps them: a column of structs (bytes, path), or of bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from dedistill.data.images.caption_files import BadCaption, as_captions, choose_columns, cleaned, parquet_rows
from dedistill.data.images.decode import BadImage
from dedistill.data.images.types import Found, ImageSet, Place
from dedistill.errors import UserError

if TYPE_CHECKING:
    import pyarrow

USUAL = "image"
MAX_GROUP = 1 << 30
"""Bytes of a column in one group of rows, which is read as a whole; groups of a hub's tables have some 1e8."""
UNKNOWN_SIZE = 1
"""Of an image in a table: how long it is is known when it is read."""


def image_column(path: Path, file_column: str) -> str | None:
    """The column of a table that holds images themselves; None where none does, or its rows name files.

    Raises OSError or ValueError for what is no table.
    """
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    if file_column in schema.names:
        return file_column if _holds_bytes(schema.field(file_column).type) else None
    found = [field.name for field in schema if _holds_bytes(field.type)]
    return USUAL if USUAL in found else found[0] if len(found) == 1 else None


def _holds_bytes(kind: "pyarrow.DataType") -> bool:
    import pyarrow as pa

    t = pa.types
    if t.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    if t.is_dictionary(kind):
        kind = kind.value_type
    return t.is_binary(kind) or t.is_large_binary(kind) or t.is_binary_view(kind) or t.is_fixed_size_binary(kind)


def rows_of(source: ImageSet, path: Path, table: Place) -> Iterator[Found]:
    """The images of a table that holds them, named by row. table: the place of the whole file.

    Raises UserError for one that cannot be read, or an undecided choice of columns.
    """
    where = f"data: source '{source.title}': '{path}'"
    try:
        rows = [row for _, row in parquet_rows(path)]
    except (OSError, ValueError) as e:
        raise UserError(f"{where} cannot be read: {e}") from e
    columns = list(dict.fromkeys(key for row in rows for key in row))
    kept = choose_columns(source, path, columns, rows)
    for number, row in enumerate(rows):
        name, place = f"{table.file}::{number}", table._replace(offset=number, size=UNKNOWN_SIZE)
        try:
            captions = cleaned([caption for column in kept for caption in as_captions(row.get(column), column)])
            yield Found(name, place, captions=captions)
        except BadCaption as e:
            yield Found(name, problem=f"row {number + 1}: {e}")


def is_table(file: str) -> bool:
    return file.lower().endswith(".parquet")


def read_row(path: Path, place: Place, file_column: str) -> bytes:
    """The bytes of the image in row ``place.offset``. Raises BadImage; memory: two groups of rows at most."""
    table = place._replace(offset=0)  # a changed file is another one
    try:
        with _LOCK:
            first, group, column = 0, 0, _shape(path, table, file_column)
            while place.offset >= first + column.groups[group]:
                first, group = first + column.groups[group], group + 1
            value = _cells(path, table, group, column.name)[place.offset - first].as_py()
    except (ValueError, IndexError) as e:  # pyarrow's errors are ValueErrors
        raise BadImage(f"its row cannot be read: {e}") from e
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        raise BadImage("its row holds no bytes")
    return bytes(data)


_LOCK = Lock()


@dataclass(frozen=True)
class _Column:
    """The column of images of a table. groups: how many rows each has."""

    name: str
    groups: list[int]


@lru_cache(maxsize=256)
def _shape(path: Path, table: Place, file_column: str) -> _Column:
    import pyarrow.parquet as pq

    if (name := image_column(path, file_column)) is None:
        raise ValueError("the table holds no images any more")
    metadata = pq.read_metadata(path)
    return _Column(name, [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])


@lru_cache(maxsize=2)
def _cells(path: Path, table: Place, group: int, column: str) -> "pyarrow.ChunkedArray":
    """One column of one group of rows. Images are read in their order, so each group is read about once."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        size = file.metadata.row_group(group).total_byte_size
        if size > MAX_GROUP:
            raise ValueError(f"its group of rows has {size:,} bytes; the limit is {MAX_GROUP:,}: write it in smaller groups")
        return file.read_row_group(group, columns=[column]).column(column)
