"""Files that appear whole or not at all: publishing, hashing and reading back."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shards.errors import FULL, RunFailed, UserError
from shards.locks import flock, is_still, name_new, open_creating
from shards.records.opening import open_file, read_plain, refuse_escape
from shards.records.strict_json import MOST_BYTES, parse_object
from shards.store.urls import url_of, working_copy

Buffer = bytes | bytearray | memoryview
TEMPORARY = ".tmp-"  # Arrow, pandas and our own listings skip names that begin with a dot
VECTORS = 64  # buffers per writev; IOV_MAX is 1024 on Linux


def publish_new(path: str | Path, data: Buffer | Iterable[Buffer]) -> bool:
    """Write `data` under `path` unless somebody was first. True when the published bytes are ours.

    The file is written aside, synced and hard-linked to its name, so that it is complete from the moment it can be
    seen, and the first of several writers wins. When the name is taken at the start, `data` is not even read.
    In the working copy of a run at a URL the store decides: the file is put there first, and the loser of a race finds
    the winner's bytes under `path`.
    Raises RunFailed when the disk is full or broken; nothing is left behind then.
    """
    path = working_copy(path)
    refuse_escape(path)
    if os.path.lexists(path):
        if url_of(path):
            from shards.store import mirror

            mirror.agree(path, put_back=True)
        return False
    with _written_aside(path, data) as temporary:
        if url_of(path):
            from shards.store import mirror

            return mirror.publish_new(temporary, path)
        with _disk_errors(path):
            return name_new(temporary, path)


def publish_replace(path: str | Path, data: Buffer | Iterable[Buffer]) -> None:
    """Write `data` under `path` in place of what was there; the last writer wins. Raises as publish_new does."""
    path = working_copy(path)
    refuse_escape(path)
    with _written_aside(path, data) as temporary:
        if url_of(path):
            from shards.store import mirror

            mirror.put(temporary, path)
        with _disk_errors(path):
            os.replace(temporary, path)


def sweep_temporary(directory: str | Path) -> int:
    """Remove what killed writers left in `directory`; returns how many files.

    A living writer holds a lock on its file, which the kernel drops at its death: no clock and no process id is asked.
    """
    removed = 0
    with suppress(FileNotFoundError):
        for name in os.listdir(directory):
            if name.startswith(TEMPORARY):
                removed += is_abandoned(Path(directory, name), remove=True)
    return removed


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """What changes whenever a file does; None when there is none. The time is that of its last change of any kind,
    which nobody can set."""
    with suppress(FileNotFoundError):
        found = os.stat(path)
        return found.st_ino, found.st_ctime_ns, found.st_size
    return None


def sha256_file(path: str | Path) -> str:
    """Hexadecimal sha256 of a plain file. Raises FileNotFoundError, and Damaged as `open_file`."""
    with os.fdopen(open_file(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_sha256(value: Any) -> str:
    """sha256 of a value as JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any, where: str | Path) -> bytes:
    """Canonical JSON: sorted keys, UTF-8, one line. Raises UserError for what JSON or UTF-8 cannot hold."""
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode() + b"\n"
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: text is not valid Unicode near {error.object[error.start : error.end]!r}",
            "a lone surrogate cannot be written as UTF-8; correct the prompts file",
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: cannot be written as JSON: {error}", "use finite numbers, text, lists") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file of any kind; records have readers of their own. Raises UserError when it is missing or
    damaged."""
    try:
        return parse_object(read_plain(path, MOST_BYTES))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", "run the stage that writes it") from error
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}", "restore it from a copy; `rushes verify` lists all faults"
        ) from error


def out_of_room(error: Exception) -> RunFailed | None:
    """What to say of an error that a full disk or quota caused inside a library; None for any other error."""
    told = re.search(r"\(os error (\d+)\)$", str(error))  # as libraries in Rust say it
    code = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if code not in FULL:
        return None
    where = getattr(error, "filename", None)
    return RunFailed(
        f"{where}: disk full" if where else "the disk is full, or its quota is used up",
        "make room and run the same command again; what was finished is kept",
    )


@contextmanager
def aside(path: Path) -> Iterator[tuple[Path, int]]:
    """An empty private file beside `path` and its descriptor; the private name is gone in the end whatever happens."""
    with _disk_errors(path):
        temporary, handle = _create_temporary(path)
    try:
        yield temporary, handle
    finally:  # one place for every outcome: a private file left on a full disk would keep it full
        with suppress(FileNotFoundError):  # os.replace took it
            os.unlink(temporary)
        os.close(handle)


@contextmanager
def _written_aside(path: Path, data: Buffer | Iterable[Buffer]) -> Iterator[Path]:
    """A synced private file beside `path` with its content."""
    with aside(path) as (temporary, handle):
        _write(handle, data, path)
        with _disk_errors(path):
            os.fsync(handle)
        yield temporary
    with _disk_errors(path):
        sync(path.parent)


def _create_temporary(path: Path) -> tuple[Path, int]:
    """A new locked file beside `path`. Tries again when a sweep removed it between its creation and its lock."""
    while True:
        unique = f"{TEMPORARY}{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}"
        temporary = path.with_name(unique)
        handle = open_creating(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with suppress(OSError):  # no locks on this file system: then nothing is ever swept either
            flock(handle, wait=True)
        if is_still(temporary, handle):
            return temporary, handle
        os.close(handle)


def is_abandoned(path: Path, *, remove: bool = False) -> bool:
    """Whether a private file has no living writer; removes it then when asked to."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not flock(handle, wait=False):
            return False
        if remove:
            os.unlink(path)
        return True
    except OSError:  # no locks on this file system, or another sweep was faster
        return False
    finally:
        os.close(handle)


def _write(handle: int, data: Buffer | Iterable[Buffer], path: Path) -> None:
    """Gathering writes straight from the memory of the buffers; nothing is copied or joined."""
    buffers = iter((data,) if isinstance(data, bytes | bytearray | memoryview) else data)
    while batch := list(itertools.islice(buffers, VECTORS)):  # outside _disk_errors: its errors are its own
        with _disk_errors(path):
            _write_batch(handle, [memoryview(buffer).cast("B") for buffer in batch if len(buffer)])


def _write_batch(handle: int, views: list[memoryview]) -> None:
    while views:
        written = os.writev(handle, views)
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]


@contextmanager
def _disk_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise RunFailed(
                f"{path}: disk full", "make room and run the same command again; nothing is lost"
            ) from error
        raise RunFailed(f"{path}: cannot be written: {error.strerror}", "check the disk and its permissions") from error
