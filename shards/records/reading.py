"""Records read from JSON with every field checked, and the checksum that a record carries of its own content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shards.errors import Damaged, UserError
from shards.files import to_json
from shards.records.opening import COPY, read_plain
from shards.records.strict_json import MOST_BYTES, parse_object

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
_readers: dict[type, Any] = {}
CHECKSUM = "content_sha256"  # of the canonical JSON of a record without this field


def sealed(record: Mapping[str, object], where: str | Path) -> bytes:
    """Canonical JSON of a record with its checksum added. Raises UserError as `to_json`."""
    return to_json({**record, CHECKSUM: _checksum(record, where)}, where)


def read_record(kind: type[T], path: Path, hint: str = COPY, root: Path | None = None) -> T:
    """The record of one kind in a file, checked as `parse_record` does. Raises UserError when there is no file."""
    try:
        data = read_plain(path, MOST_BYTES, hint, root)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", "run the stage that writes it") from error
    return parse_record(kind, data, path, hint)


def parse_record(kind: type[T], data: bytes, where: object, hint: str = COPY) -> T:
    """The record of one kind in JSON, which errors say is in `where`.

    Raises Damaged with `hint` for what is not JSON or not a record of that kind (a field that is missing, unknown or of
    another type, values that do not fit together), and for a record that is not the one its checksum was taken of.
    A record written before there were checksums has none, and is not held against one.
    """
    from pydantic import ValidationError

    try:
        content = parse_object(data)
        check_sum(content, data, where)
    except ValueError as error:
        raise Damaged(f"{where} is damaged: {error}", hint) from error
    try:
        return reader(kind).validate_json(data)
    except ValidationError as error:
        found = first_fault(error, where)
        raise Damaged(found.problem, found.hint if "schema" in found.problem else hint) from error


def check_sum(content: Mapping[str, object], data: bytes, where: object) -> None:
    """Raise ValueError unless a record that has a checksum is the one it was taken of, byte for byte."""
    if CHECKSUM not in content:
        return
    rest = {name: value for name, value in content.items() if name != CHECKSUM}
    if content[CHECKSUM] != _checksum(rest, str(where)) or to_json(content, str(where)) != data:
        raise ValueError(f"its content is not what was written ({CHECKSUM})")


def reader(kind: type[T]) -> TypeAdapter[T]:
    """What reads one kind of record; it is made once."""
    from pydantic import TypeAdapter

    if kind not in _readers:
        _readers[kind] = TypeAdapter(kind)
    return _readers[kind]


def first_fault(error: ValidationError, where: object) -> UserError:
    """The first thing that is wrong with a file; another schema explains all the rest."""
    faults = error.errors(include_url=False)
    first = next((fault for fault in faults if fault["loc"] == ("schema",)), faults[0])
    field, kind, found = ".".join(map(str, first["loc"]))[:200], first["type"], first["input"]
    if field == "schema" and kind != "missing":
        known = first.get("ctx", {}).get("expected", "1")
        return UserError(
            f"{where} has schema {short(found)}; this version reads {known}",
            "use the version of rushes that wrote it",
        )
    if kind == "missing":
        return UserError(f"{where} is damaged: it has no {field}", COPY)
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return UserError(f"{where} is damaged: it has an unknown field {field}", COPY)
    if kind == "predicate_failed":
        wanted = first["msg"].split()[1].strip("'").rpartition(".")[2].replace("_", " ")
        return UserError(f"{where} is damaged: {field.removesuffix('.[key]')} is {short(found)}, not {wanted}", COPY)
    message = first["msg"][0].lower() + first["msg"][1:]
    if not field:
        return UserError(f"{where} is damaged: {message}", f"{COPY}; `rushes verify` lists all faults")
    return UserError(f"{where} is damaged: {field}: {message}, but it is {short(found)}", COPY)


def short(value: object) -> str:
    """A value of a file as it stands in a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _checksum(record: Mapping[str, object], where: object) -> str:
    return hashlib.sha256(to_json(record, str(where))).hexdigest()
