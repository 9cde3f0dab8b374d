"""Lines of metrics.jsonl: one update each, with a checksum of its own; what follows a damaged line is not read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shards.errors import Damaged
from shards.records.opening import read_plain
from shards.records.reading import CHECKSUM
from shards.records.strict_json import parse_object

MOST_BYTES = 64 * 2**20  # of metrics.jsonl: forty thousand updates in one iteration
MOST_LINE = 2**20  # bytes
COUNTS = ("iteration", "update", "total_updates")
MEND = "delete that line"

Update = dict[str, Any]


def update_line(record: Update) -> str:
    """The line of one update, sealed with its checksum; numbers that are not finite are words, as Python has them."""
    return _text(record | {CHECKSUM: _checksum(record)}) + "\n"


def read_updates(path: Path, iteration: int | None = None) -> list[Update]:
    """The updates in a metrics.jsonl, without their checksums; none when there is no file.

    A last line cut off by a kill is left out. So is all that follows a damaged line, which `rushes verify` names, or a
    line of another iteration than the one that is asked for. Raises Damaged for a file that is not plain, or too large.
    """
    found = []
    for line in _lines(path):
        try:
            record = parse_update(line)
        except ValueError:
            break
        if iteration not in (None, record["iteration"]):
            break
        found.append(record)
    return found


def update_faults(path: Path, iteration: int, *, ended: bool) -> Iterator[Damaged]:
    """The first damaged line of a metrics.jsonl, and updates that are not there.

    Until the training has `ended`, a last line without its end may have been cut by a kill; the next update mends that.
    """
    lines, cut = _lines(path), not ended and not _ends_whole(path)
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_update(line)
        except ValueError as error:
            if number < len(lines) or not cut:
                yield Damaged(f"{path}: line {number} is damaged, so the rest is not read either: {error}", MEND)
            return
        expert, update = record["expert"], record["update"]
        if record["iteration"] != iteration:
            yield Damaged(f"{path}: line {number} is of iteration {record['iteration']}", MEND)
        if update != seen.get(expert, 0) + 1:
            yield Damaged(f"{path}: line {number} is update {update} of {expert} after {seen.get(expert, 0)}", MEND)
        seen[expert] = update
    if ended and not _ends_whole(path):
        yield Damaged(f"{path}: its last line is cut off", MEND)


def unsealed(path: Path) -> bool:
    """Whether a metrics.jsonl has lines without a checksum, as older versions wrote them."""
    return any(f'"{CHECKSUM}"'.encode() not in line for line in _lines(path))


def parse_update(line: bytes) -> Update:
    """The update in a line, without its checksum. Raises ValueError for a line that training did not write."""
    record: Update = parse_object(line, most=MOST_LINE, nan=True)
    checksum = record.pop(CHECKSUM, None)
    for name, value in record.items():
        if name == "expert":
            if not isinstance(value, str):
                raise ValueError("its expert is not a text")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name[:80]} is not a number")
    for name in COUNTS:
        if not isinstance(record.get(name), int) or not 0 <= record[name] < 2**53:
            raise ValueError(f"it has no {name}")
    if "expert" not in record or record["update"] < 1:
        raise ValueError("it is of no update of an expert")
    if checksum is not None and (checksum != _checksum(record) or update_line(record).encode()[:-1] != line):
        raise ValueError(f"it is not what was written ({CHECKSUM})")
    return record


def _lines(path: Path) -> list[bytes]:
    try:
        return read_plain(path, MOST_BYTES).splitlines()
    except FileNotFoundError:
        return []


def _ends_whole(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return read_plain(path, MOST_BYTES).endswith(b"\n")
    return True


def _text(record: Update) -> str:
    return json.dumps(record, sort_keys=True)


def _checksum(record: Update) -> str:
    return hashlib.sha256(_text(record).encode()).hexdigest()
