"""Named tensors as safetensors bytes, with a crc32 of every tensor in the header's metadata."""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from shards.errors import REPAIR, Damaged
from shards.files import Buffer
from shards.records.strict_json import parse_object

if TYPE_CHECKING:
    import numpy
    import torch
    from numpy.typing import NDArray

    Array = torch.Tensor | NDArray[numpy.generic]

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
TORCH = {
    "F64": "float64",
    "I64": "int64",
    "F32": "float32",
    "I32": "int32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
NAMES = {name: code for code, name in TORCH.items()}
ALIGNMENT = 8  # bytes; the header is padded to it and wider types come first, so every tensor is aligned
STACKED = "latents"  # its crc32 is taken per entry of the first dimension, so that one state can be read and checked


class Entry(NamedTuple):
    """One tensor inside a safetensors member."""

    dtype: str
    """safetensors code: F32, BF16, …"""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the member."""
    stop: int
    crc32: tuple[int, ...]
    """One checksum, or one per entry of the first dimension for `latents`."""


def header_in_order(header: bytes) -> bytes:
    """The JSON header of a safetensors file with sorted keys and no spaces.

    The library writes metadata in the order of a hash table, another one in each process: sorted, equal files have
    equal bytes.
    """
    return json.dumps(json.loads(header), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def encode(tensors: Mapping[str, Array]) -> list[Buffer]:
    """Header and tensors as buffers to write one after the other; the tensors' own memory is used where it can be.

    Accepts torch tensors of any device and NumPy arrays. Raises TypeError for a type safetensors has no code for.
    """
    parts = {name: _raw(name, tensor) for name, tensor in tensors.items()}
    order = sorted(parts, key=lambda name: (-SIZES[parts[name][0]], name))
    table: dict[str, object] = {}
    offset = 0
    for name in order:
        code, shape, view = parts[name]
        table[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + len(view)]}
        offset += len(view)
    checksums = {name: _checksums(name, shape, view) for name, (_, shape, view) in parts.items()}
    metadata = {"crc32": json.dumps(checksums, sort_keys=True, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return [struct.pack("<Q", len(text)) + text, *(parts[name][2] for name in order)]


def parse(buffer: memoryview, where: str, size: int | None = None) -> tuple[dict[str, Entry], int]:
    """Entries of a safetensors member, and the bytes of its header. Raises Damaged; reads no tensor.

    Every number in the header is checked against the size of the member before it is used: `size` bytes where `buffer`
    holds the header alone.
    """
    try:
        (length,) = struct.unpack_from("<Q", buffer)
        if length > len(buffer) - 8:
            raise ValueError(f"its header claims {length} of {len(buffer)} bytes")
        table: dict[str, Any] = parse_object(bytes(buffer[8 : 8 + length]))
        checksums = parse_object(table.pop("__metadata__")["crc32"])
        entries = {name: _entry(name, item, 8 + length, checksums[name]) for name, item in table.items()}
        _check_cover(entries, 8 + length, len(buffer) if size is None else size)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise Damaged(f"{where}: damaged tensor header: {error}", REPAIR) from error
    return entries, 8 + length


def check(buffer: memoryview, entries: Mapping[str, Entry], where: str) -> None:
    """Compare every tensor with its checksum. Raises Damaged naming the first that differs."""
    for name, entry in entries.items():
        found = _checksums(name, list(entry.shape), buffer[entry.start : entry.stop])
        wrong = [str(row) for row, (a, b) in enumerate(zip(found, entry.crc32, strict=False)) if a != b]
        if tuple(found) != entry.crc32:
            rows = f"[{', '.join(wrong)}]" if name == STACKED else ""
            raise Damaged(f"{where}: tensor {name}{rows} is damaged (crc32)", REPAIR)


def decode(buffer: bytearray | memoryview, where: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors member, checked; they share the (writable) memory of `buffer`. Raises Damaged."""
    view = memoryview(buffer)
    entries, _ = parse(view, where)
    check(view, entries, where)
    return {name: as_tensor(view, entry) for name, entry in entries.items()}


def as_tensor(buffer: memoryview, entry: Entry) -> torch.Tensor:
    """The tensor of one entry as a view on `buffer`."""
    import torch

    dtype = torch_dtype(entry.dtype)
    if entry.start == entry.stop:  # torch.frombuffer refuses empty tensors
        return torch.empty(entry.shape, dtype=dtype)
    count = (entry.stop - entry.start) // SIZES[entry.dtype]
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=entry.start).view(entry.shape)


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors code."""
    import torch

    dtype = getattr(torch, TORCH[code])
    assert isinstance(dtype, torch.dtype)
    return dtype


def _raw(name: str, tensor: Array) -> tuple[str, list[int], memoryview]:
    """Code, shape and bytes of a tensor."""
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in NAMES:
        raise TypeError(f"tensor {name} has dtype {kind}, which shards do not store")
    shape = [int(size) for size in tensor.shape]
    if hasattr(tensor, "detach"):
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        import numpy

        flat = numpy.ascontiguousarray(tensor).reshape(-1).view(numpy.uint8)
    return NAMES[kind], shape, flat.data if flat.size else memoryview(b"")


def _checksums(name: str, shape: list[int], view: memoryview) -> list[int]:
    rows = shape[0] if name == STACKED and shape else 1
    size = len(view) // rows if rows else 0
    return [zlib.crc32(view[row * size : (row + 1) * size]) for row in range(rows)]


def _entry(name: str, item: dict[str, Any], base: int, checksums: object) -> Entry:
    start, stop = item["data_offsets"]
    shape = tuple(item["shape"])
    if any(type(size) is not int or not 0 <= size < 2**53 for size in (*shape, start, stop)) or len(shape) > 8:
        raise ValueError(f"{name[:80]} has a shape or offset that is not a natural number")
    if not isinstance(checksums, list) or any(type(one) is not int for one in checksums):
        raise ValueError(f"{name[:80]} has no list of checksums")
    if stop - start != math.prod(shape) * SIZES[item["dtype"]]:
        raise ValueError(f"{name} of shape {list(shape)} does not fit its {stop - start} bytes")
    return Entry(item["dtype"], shape, base + start, base + stop, tuple(checksums))


def _check_cover(entries: dict[str, Entry], start: int, size: int) -> None:
    """Tensors follow each other without gap or overlap to the very end, as the safetensors format demands."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != start:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        start = entry.stop
    if start != size:
        raise ValueError(f"{size - start} bytes belong to no tensor")
