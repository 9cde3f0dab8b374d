"""Small Parquet tables with key-value metadata: deterministic bytes out, damage found on the way in."""

from __future__ import annotations

import base64
import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import Damaged
from shards.records.opening import read_plain
from shards.records.parquet_footer import (
    BYTE_ARRAY,
    FIXED,
    INT96,
    SNAPPY,
    UNCOMPRESSED,
    Footer,
    check_pages,
    read_footer,
)

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

MOST_BYTES = 256 * 2**20  # of a file, and of its columns when they are unpacked
MOST_ROWS = 2**17
MOST_COLUMNS = 1000
MOST_VALUES = 2**23
TEXTS = (BYTE_ARRAY, FIXED, INT96)
FILE = "file_sha256"  # of all bytes of the file, with this value as zeros
_ZEROS = b"0" * 64


def encode(table: pyarrow.Table, kv: dict[str, str]) -> bytes:
    """The bytes of a Parquet file holding `table`, page checksums included, and `kv` as its schema metadata."""
    import pyarrow.parquet

    sink = io.BytesIO()
    table = table.replace_schema_metadata(dict(sorted(kv.items())))
    pyarrow.parquet.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def encode_sealed(table: pyarrow.Table, kv: dict[str, str]) -> bytes:
    """As `encode`, with the sha256 of the whole file in its metadata, which vouches for footers and statistics too."""
    data = encode(table, kv | {FILE: _ZEROS.decode()})
    start = data.index(_ZEROS, data.rindex(FILE.encode()))
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[start + len(_ZEROS) :]


def is_sealed(data: bytes, kv: dict[str, str]) -> bool:
    """Whether the bytes of a file are those its own sha256 was taken of."""
    value, key = kv.get(FILE, "").encode(), data.rfind(FILE.encode())
    start = data.find(value, key) if len(value) == len(_ZEROS) and key >= 0 else -1
    if start < 0:
        return False
    return hashlib.sha256(data[:start] + _ZEROS + data[start + len(_ZEROS) :]).hexdigest().encode() == value


def metadata(path: str | Path, hint: str) -> dict[str, str]:
    """The metadata of a Parquet file, its rows not read. Raises Damaged as `read`."""
    import pyarrow

    data = _content(path, hint)
    try:
        _check_sizes(data, None)
        with _open(data) as file:
            return _texts(file)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, ValueError) as error:
        raise Damaged(f"{path}: {_reason(error)}", hint) from error


def read(
    path: str | Path, hint: str, data: bytes | None = None, rows: int | None = None
) -> tuple[pyarrow.Table, dict[str, str]]:
    """Table and metadata of a Parquet file, whose content may be at hand as `data`.

    Raises Damaged with `hint` when it is missing, cut or altered. Its footer is looked at first: a file that has
    another number of `rows`, or would take more memory than a table of a shard does, is refused before it is unpacked.
    """
    import pyarrow

    data = _content(path, hint) if data is None else data
    try:
        footer = _check_sizes(data, rows)
        with _open(data) as file:
            table, kv = _bounded(file, data, footer), _texts(file)
        table.validate(full=True)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, ValueError) as error:
        raise Damaged(f"{path}: {_reason(error)}", hint) from error
    return table.replace_schema_metadata(None), kv


def schema_of(path: str | Path, hint: str) -> pyarrow.Schema:
    """Names and types of the columns of a Parquet file, its rows not read. Raises Damaged as `read`."""
    import pyarrow

    data = _content(path, hint)
    try:
        _check_sizes(data, None)
        with _open(data) as file:
            return file.schema_arrow.remove_metadata()
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        raise Damaged(f"{path}: {_reason(error)}", hint) from error


def _content(path: str | Path, hint: str) -> bytes:
    try:
        return read_plain(path, MOST_BYTES, hint)
    except FileNotFoundError as error:
        raise Damaged(f"{path}: the file does not exist", hint) from error


def _check_sizes(data: bytes, rows: int | None) -> Footer:
    """ValueError for what would need too much memory, by what the footer and the pages say; the footer."""
    footer = read_footer(data)
    if rows is not None and footer.rows != rows:
        raise ValueError(f"it has {footer.rows} rows for {rows} samples")
    if footer.rows > MOST_ROWS or len(footer.columns) > MOST_COLUMNS:
        raise ValueError(f"it has {footer.rows} rows in {len(footer.columns)} columns")
    if sum(column.values for column in footer.columns) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES} values")
    room = MOST_BYTES
    for column in footer.columns:
        if column.codec not in (UNCOMPRESSED, SNAPPY):
            raise ValueError(f"{column.path} is compressed in a way that tables of a run are not")
        room -= check_pages(data, column, room)
    return footer


def _bounded(file: pyarrow.parquet.ParquetFile, data: bytes, footer: Footer) -> pyarrow.Table:
    """The whole table. Texts are unpacked last: a dictionary of one long text can stand for gigabytes."""
    import pyarrow
    from pyarrow import compute

    schema = file.schema_arrow
    foreign = next((field for field in schema if not _is_ours(field.type)), None)
    if foreign is not None:
        raise ValueError(f"{foreign.name[:80]} is of type {str(foreign.type)[:80]}, which tables of a run do not have")
    largest = sum(column.values * column.unpacked for column in footer.columns if column.physical in TEXTS)
    if largest <= MOST_BYTES:
        return file.read(use_threads=False)
    texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
    with _open(data, read_dictionary=texts) as packed:
        table = packed.read(columns=texts, use_threads=False)
    for name in texts:
        for chunk in table.column(name).chunks:
            lengths = compute.binary_length(chunk.dictionary).cast("int64")
            if (compute.sum(lengths.take(chunk.indices)).as_py() or 0) > MOST_BYTES:
                raise ValueError(f"the texts of {name} have more than {MOST_BYTES} bytes")
    return file.read(use_threads=False)


def _is_ours(kind: pyarrow.DataType) -> bool:
    """Whether tables of a run have columns of a type: text, numbers, and lists of these; packed texts are not among
    them."""
    from pyarrow import types

    inner = kind.value_type if types.is_list(kind) else kind
    return types.is_string(inner) or types.is_integer(inner) or types.is_floating(inner) or types.is_boolean(inner)


def _texts(file: pyarrow.parquet.ParquetFile) -> dict[str, str]:
    """The metadata of a file. Arrow keeps its schema, and in it all of this once more, under a name of its own.

    ValueError where both have other names: a file whose seal has another name would pass for one that never had any.
    """
    import pyarrow

    found = dict(file.metadata.metadata or {})
    schema = found.pop(b"ARROW:schema", None)
    if schema is not None:
        twice = pyarrow.ipc.read_schema(pyarrow.py_buffer(base64.b64decode(schema))).metadata or {}
        if twice.keys() != found.keys():
            raise ValueError("its metadata are not those it was written with")
    return {key.decode(): value.decode() for key, value in found.items()}


def _open(data: bytes, **options: object) -> pyarrow.parquet.ParquetFile:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data), page_checksum_verification=True, **options)


def _reason(error: Exception) -> str:
    return f"the table is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
