"""The formats of prompts files: text, JSON lines, CSV and Parquet become rows with the numbers that errors name."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from shards.absolute_paths import nearest_file
from shards.errors import UserError
from shards.pointers import refuse_pointer
from shards.process.progress import counted
from shards.records.opening import read_plain
from shards.records.parquet_footer import check_pages, read_footer
from shards.run_toml import set_option
from shards.text.visible import one_line

if TYPE_CHECKING:
    import pyarrow

MOST_BYTES = 256 * 2**20  # of a prompts file, and of its columns when they are unpacked
MOST_VALUES = 2**26  # of all columns of a Parquet file; a run of equal ones takes a few bytes there, and memory here
SPLIT = "split it into several files"
FIELDS = ("target", "image", "negative", "tags", "tag")  # beside the column of the prompts

_MARKS = (  # a byte-order mark at the beginning of a file, and what follows it; the longer ones first
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LINE_END = re.compile(r"\r\n|\r|\n")
_CUT = "put a text that holds commas or line ends in quotation marks, and double those inside of it"


@dataclass(frozen=True)
class Column:
    """The name of the field that holds the prompts, and the setting that says so."""

    name: str = "prompt"
    setting: str = "rollout.prompt_column"

    def hint(self, names: Sequence[str], kind: str) -> str:
        """For a file that lacks it: the names it has instead, and the setting that takes one of them."""
        there = [name for name in names if name]
        if not there:
            return f"it has no {kind} at all; prompts belong in `{self.name}`"
        likely = [name for name in there if name.lower() in ("prompt", "caption", "text")] or there
        taken = set_option(self.setting, likely[0])
        return one_line(f"its {kind} are: {', '.join(there)}; to take one of them: {taken}")


@dataclass(frozen=True)
class Row:
    """One record of a file: `number` counts lines of text or JSON lines, else rows, from 0; `where` names it."""

    number: int
    where: str
    fields: Mapping[str, object]


def read_rows(file: Path, column: Column) -> Iterator[Row]:
    """The records of a prompts file, whose prompts stand in the field `column`; a text file has that field alone.

    Raises UserError, naming the line, for an unknown suffix, a file that is missing, a Git LFS pointer or not of its
    format, bytes that are not UTF-8, columns that are missing or doubled, and rows longer or shorter than their header.
    """
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file}: prompts of an unknown format", f"the suffix is one of {', '.join(READERS)}")
    if not file.is_file():
        raise UserError(f"{file}: {'a folder, not a file' if file.is_dir() else 'no such file'}", nearest_file(file))
    refuse_pointer(file)
    return reader(file, column)


def has_columns(file: Path) -> bool:
    """Whether prompts of this format have a name; those of a text file have none."""
    return file.suffix.lower() != ".txt"


# --- Text ------------------------------------------------------------------------------------------------------------


def _decode(file: Path) -> str:
    """The text of a file: UTF-8, or what its byte-order mark says. UserError names the line where it is not."""
    data = read_plain(file, MOST_BYTES, SPLIT)
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(encoding, errors="replace")
        line = len(_LINE_END.findall(before)) + 1
        name = encoding.removesuffix("-sig").upper()
        raise UserError(f"{file}, line {line}: not {name} at byte {error.start}", "save the file as UTF-8") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 0; LF, CR LF and CR alone end a line."""
    for number, line in enumerate(_LINE_END.split(_decode(file))):
        if line.strip():
            yield number, line


def _read_text(file: Path, column: Column) -> Iterator[Row]:
    for number, line in _lines(file):
        yield Row(number, f"{file}, line {number + 1}", {column.name: line})


# --- JSON lines ------------------------------------------------------------------------------------------------------


def _read_json(file: Path, column: Column) -> Iterator[Row]:
    for number, line in _lines(file):
        where = f"{file}, line {number + 1}"
        refuse_nul(line, where)
        try:
            row = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            problem = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
            raise UserError(f"{where}: {problem}", "one JSON object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object", 'for example {"prompt": "a sign"}')
        yield Row(number, where, row)


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """An object whose names differ; ValueError for others, of which JSON would keep the last."""
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{name!r} is given {count} times")
    return dict(pairs)


# --- CSV -------------------------------------------------------------------------------------------------------------


def _read_csv(file: Path, column: Column) -> Iterator[Row]:
    rows = _csv_rows(file)
    _, header = next(rows, (0, [""]))
    names = [name.strip() for name in header]
    check_columns(file, names, column, header)
    for number, (line, values) in enumerate(rows):
        if len(values) != len(names):
            few = len(values) < len(names)
            problem = f"{file}, line {line}: {counted(len(values), 'field')}, but the header has {len(names)}"
            raise UserError(problem, "write every field, empty ones too" if few else _CUT)
        yield Row(number, f"{file}, line {line}", dict(zip_longest(names, values)))


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the number of its first line, from 1. White space after a comma is dropped."""
    text = _decode(file)
    nul = text.find("\0")  # the csv module stops at it without saying where
    if nul >= 0:
        refuse_nul("\0", f"{file}, line {len(_LINE_END.findall(text[:nul])) + 1}")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    line = 1
    try:
        for row in reader:
            if len(row) > 1 or any(map(str.strip, row)):
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end" in str(error):
            problem = f"{file}, line {line}: not CSV: a quotation mark in this row is never closed"
            raise UserError(problem, 'close it; inside of a quoted field write "" for one mark') from None
        raise UserError(f"{file}, line {reader.line_num}: not CSV: {error}", "correct that line") from None


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _read_parquet(file: Path, column: Column) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    data = read_plain(file, MOST_BYTES, SPLIT)
    try:
        footer, room = read_footer(data), MOST_BYTES
        if sum(one.unpacked for one in footer.columns) > MOST_BYTES:
            raise UserError(f"{file}: its columns have more than {MOST_BYTES} bytes", SPLIT)
        if sum(one.values for one in footer.columns) > MOST_VALUES:
            raise UserError(f"{file}: its columns have more than {MOST_VALUES} values", SPLIT)
        for one in footer.columns:  # Arrow takes as much memory as a page asks for
            room -= check_pages(data, one, room) if one.values else 0
        with parquet.ParquetFile(
            pyarrow.BufferReader(data)
        ) as opened:  # read_table would look at names of folders, too
            schema = opened.schema_arrow
        check_columns(file, schema.names, column)
        wanted = [name for name in dict.fromkeys((column.name, *FIELDS)) if name in schema.names]
        texts = [name for name in wanted if pyarrow.types.is_string(schema.field(name).type)]
        # a text that stands in many rows is unpacked once
        with parquet.ParquetFile(pyarrow.BufferReader(data), read_dictionary=texts) as opened:
            table = opened.read(columns=wanted)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(f"{file}: not readable as Parquet: {line}", "write it again") from None
    for name in wanted:
        _check_type(file, name, table.column(name).type, prompts=name == column.name)
    size = 0
    for number in range(table.num_rows):
        where = f"{file}, row {number}"
        fields = {name: _value(table.column(name)[number], name, where) for name in wanted}
        size += sum(len(text) for text in fields.values() if isinstance(text, str))
        if size > MOST_BYTES:
            raise UserError(f"{where}: more than {MOST_BYTES} characters up to here", SPLIT)
        yield Row(number, where, fields)


def _check_type(file: Path, name: str, kind: pyarrow.DataType, prompts: bool) -> None:
    """UserError for a column that cannot hold what its name says. Tags may be of any type but bytes and maps."""
    from pyarrow import types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    text = types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)
    listed = types.is_list(inner) or types.is_large_list(inner) or types.is_struct(inner)
    binary = types.is_binary(inner) or types.is_large_binary(inner)
    if text or types.is_null(inner) or (prompts and listed) or (name in ("tags", "tag") and not binary):
        return
    raise UserError(f"{file}: the column `{name}` is of type {kind}, not text", "write it as a column of text")


def _value(scalar: pyarrow.Scalar, name: str, where: str) -> object:
    import pyarrow

    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: {name} is not UTF-8 at byte {error.start}", "write it again as UTF-8") from None
    except pyarrow.ArrowException as error:  # an index beyond the texts of a column
        line = " ".join(str(error).split())
        raise UserError(f"{where}: {name} is not readable as Parquet: {line}", "write it again") from None


# --- All of them -----------------------------------------------------------------------------------------------------


def refuse_nul(text: str, where: str) -> None:
    """UserError when a text has a NUL character, which no prompt has; UTF-16 without its mark has one every letter."""
    if "\0" in text:
        raise UserError(f"{where}: contains a NUL byte", "remove it; if the file is UTF-16, save it as UTF-8")


def check_columns(file: Path, names: Sequence[str], column: Column, header: Sequence[str] = ()) -> None:
    """UserError when a table has no column for the prompts, or two of one name.

    `header` is the first row of a CSV as it stands there, to tell that its fields are not separated by commas.
    """
    for name, count in Counter(names).items():
        if name and count > 1:
            problem = f"{file}: has {count} columns `{one_line(name)}`"
            raise UserError(problem, "keep one of them: it is unclear which one is meant")
    if column.name in names:
        return
    problem = f"{file}: has no column `{column.name}`"
    for separator in (";", "\t", "|"):
        if len(header) == 1 and column.name in (part.strip(' "') for part in header[0].split(separator)):
            hint = "save it with commas between the fields"
            raise UserError(f"{problem}: its fields are separated by {separator!r}", hint)
    raise UserError(problem, column.hint(names, "columns"))


READERS: dict[str, Callable[[Path, Column], Iterator[Row]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
