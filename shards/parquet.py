"""Small Parquet tables with key-value metadata: deterministic bytes out, damage found on the way in."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import Damaged

if TYPE_CHECKING:
    import pyarrow


def encode(table: pyarrow.Table, kv: dict[str, str]) -> bytes:
    """The bytes of a Parquet file holding `table`, page checksums included, and `kv` as its schema metadata."""
    import pyarrow.parquet

    sink = io.BytesIO()
    table = table.replace_schema_metadata(dict(sorted(kv.items())))
    pyarrow.parquet.write_table(table, sink, write_page_checksum=True)
    return sink.getvalue()


def metadata(path: str | Path, hint: str) -> dict[str, str]:
    """The metadata of a Parquet file, its rows not read. Raises Damaged as `read`."""
    import pyarrow

    try:
        with _open(path) as file:
            return _texts(file.schema_arrow)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise Damaged(f"{path}: {_reason(error)}", hint) from error


def read(path: str | Path, hint: str) -> tuple[pyarrow.Table, dict[str, str]]:
    """Table and metadata of a Parquet file. Raises Damaged with `hint` when it is missing, cut or altered."""
    import pyarrow

    try:
        with _open(path) as file:
            table = file.read(use_threads=False)
        kv = _texts(table.schema)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise Damaged(f"{path}: {_reason(error)}", hint) from error
    return table.replace_schema_metadata(None), kv


def _texts(schema: pyarrow.Schema) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def _open(path: str | Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(os.fspath(path), page_checksum_verification=True)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    return f"the table is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
