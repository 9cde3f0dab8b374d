"""What a Parquet file says of its size, in its footer and before each of its pages, read before Arrow unpacks anything.

The footer is a Thrift structure in the compact protocol (apache/parquet-format, src/main/thrift/parquet.thrift). Arrow
reads it too, but its Python binding ends the process at some footers that are damaged, and believes what pages say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAGIC = b"PAR1"
DEEPEST = 16  # structures in each other; a footer has seven
MOST_FIELDS = 2**20  # values of one footer
UNCOMPRESSED, SNAPPY = 0, 1  # codecs
BYTE_ARRAY, INT96, FIXED = 6, 3, 7  # physical types
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3

Struct = dict[int, Any]


@dataclass(frozen=True)
class ColumnSize:
    """A column of one group of rows."""

    path: str
    physical: int
    codec: int
    rows: int
    values: int
    """What stands in it: more than rows for lists."""
    unpacked: int
    """Bytes of all its pages, headers included, when they are decompressed."""
    packed: int
    start: int
    """Byte of the file at which its first page begins."""


@dataclass(frozen=True)
class Footer:
    """Sizes of a Parquet file as its footer states them."""

    rows: int
    columns: tuple[ColumnSize, ...]


def read_footer(data: bytes) -> Footer:
    """The sizes in the footer of a Parquet file.

    Raises ValueError for bytes that have none, and for groups of rows that have others than the file, or than their
    columns have values: Arrow takes memory for as many rows as a group claims.
    """
    if len(data) < 12 or data[:4] != MAGIC or data[-4:] != MAGIC:
        raise ValueError("it does not begin and end as a Parquet file")
    length = int.from_bytes(data[-8:-4], "little")
    if length > len(data) - 12:
        raise ValueError(f"its footer claims {length} of {len(data)} bytes")
    try:
        content = _Thrift(data[len(data) - 8 - length : -8]).struct()
        groups = content.get(4, [])
        columns = tuple(_column(one[3], group[3]) for group in groups for one in group[1])
        rows, inside = _count(content[3]), sum(_count(group[3]) for group in groups)
    except (KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"its footer is damaged: {error!r}") from error
    if rows != inside:
        raise ValueError(f"it has {rows} rows, and {inside} in its groups")
    for column in columns:
        if column.values < column.rows:
            raise ValueError(f"{column.path} has {column.values} values in {column.rows} rows")
    return Footer(rows, columns)


def check_pages(data: bytes, column: ColumnSize, most: int) -> int:
    """Bytes that the pages of a column unpack to. Raises ValueError where that is more than `most`, and where they hold
    another number of values than the footer says."""
    at, end, unpacked, values = column.start, column.start + column.packed, 0, 0
    if not 4 <= at <= end <= len(data):
        raise ValueError(f"the pages of {column.path} do not lie in the file")
    while at < end and values < column.values:
        try:
            reader = _Thrift(data[at:end] if end - at < 2**16 else data[at : at + 2**16])
            page = reader.struct()
            kind, size, packed = page[1], _count(page[2]), _count(page[3])
            header = page.get({DATA_PAGE: 5, DATA_PAGE_V2: 8}.get(kind, 7), {})
            inside = _count(header[1]) if kind != DICTIONARY_PAGE else 0
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"a page of {column.path} is damaged: {error!r}") from error
        at, unpacked, values = at + reader.at + packed, unpacked + size, values + inside
        if unpacked > most:
            raise ValueError(f"the pages of {column.path} have more than {most} bytes")
    if values != column.values or at > end:
        raise ValueError(f"the pages of {column.path} have {values} values, its footer {column.values}")
    return unpacked


def _column(meta: Struct, rows: int) -> ColumnSize:
    first = meta.get(11)
    start = meta[9] if first is None or first <= 0 else min(first, meta[9])
    path = ".".join(part.decode() for part in meta[3])
    sizes = _count(meta[5]), _count(meta[6]), _count(meta[7]), _count(start)
    return ColumnSize(path[:80], meta[1], meta[4], _count(rows), *sizes)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ValueError(f"it has a size of {value!r}"[:80])
    return value


class _Thrift:
    """Structures of Thrift's compact protocol as {number of a field: value}; ValueError where there is none."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.left = data, 0, MOST_FIELDS

    def struct(self, depth: int = 0) -> Struct:
        """The structure that begins here."""
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        found: Struct = {}
        for number, kind in self._fields():
            found[number] = self._value(kind, depth)
        return found

    def _fields(self) -> Iterator[tuple[int, int]]:
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            self.left -= 1
            if self.left < 0:
                raise ValueError("it has too many fields")
            yield number, head & 15

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # of a field, the type is the value
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._take(8)
        if kind == 8:
            return self._take(self._varint())
        if kind in (9, 10):
            return self._list(depth)
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"it has a value of kind {kind}")

    def _list(self, depth: int) -> list[Any]:
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        head = self._byte()
        count, kind = (self._varint() if head >> 4 == 15 else head >> 4), head & 15
        self.left -= count
        if self.left < 0 or count > len(self.data):
            raise ValueError("it has too many values")
        if kind in (1, 2):  # in a list each is a byte
            return list(self._take(count))
        return [self._value(kind, depth + 1) for _ in range(count)]

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise ValueError("it is cut off")
        self.at += 1
        return self.data[self.at - 1]

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError("it is cut off")
        self.at += size
        return self.data[self.at - size : self.at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("it has a number of too many bytes")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
