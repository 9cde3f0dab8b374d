"""Files that appear whole or not at all: publishing, hashing and reading back; and what a run asks of its files.

Knows no store: `Files` is what code above asks, `LocalFiles` answers for a disk, shards/store/files.py for a store.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shards.errors import FULL, RunFailed, UserError
from shards.locks import create_temporary, name_new
from shards.records.opening import open_file, read_plain, refuse_escape
from shards.records.strict_json import MOST_BYTES, parse_object

Buffer = bytes | bytearray | memoryview
Wanted = Callable[[str], bool]
"""Whether a file is wanted, by its name relative to its folder."""
VECTORS = 64  # buffers per writev; IOV_MAX is 1024 on Linux


def every(name: str) -> bool:
    """Wanted: all files of a folder."""
    return True


@dataclass(frozen=True)
class Ranges:
    """A file that lies elsewhere; threads may share it."""

    read: Callable[[int, int], bytes]
    """Its bytes from the first position to before the second one."""
    pieces: Path
    """A folder here for what may be asked for again."""


class Claims(Protocol):
    """Claims on a stage as machines without a common folder see them. They are advice: no method raises."""

    def begin(self, path: Path, content: bytes) -> bool:
        """Show a new claim; False when another machine has put one of that name."""

    def keep(self, path: Path, content: bytes) -> bool:
        """Show a sign of life; False when the claim was taken over."""

    def end(self, path: Path) -> None:
        """Show a claim no more, ours or that of a dead one."""

    def gather(self, folder: Path) -> None:
        """Lay what other machines claim on the stage in `folder` beside our own claims."""


class Files(Protocol):
    """What stages ask of the files of a run or folder, wherever it is. Paths are those on this machine.

    Methods that reach a store raise UserError for missing credentials, no access and no such bucket, RunFailed when it
    gives no good answer. A run holds one of these and hands it down; what it remembers it keeps inside.
    """

    claims: Claims
    one_spool: bool
    """Whether all workers of a shard fill one spool, so that its tar has the same bytes whoever seals it."""
    one_clock: bool
    """Whether one clock gave all files their times."""

    def shown(self, text: str) -> str:
        """A message with the names that people know in place of those on this machine."""

    def common_name(self, folder: Path) -> str | None:
        """The name by which all machines find a folder; None for a path, which each may have for another one."""

    def exists(self, path: Path) -> bool:
        """Whether a file is there, without fetching it."""

    def look(self, path: Path) -> bool:
        """Whether a file is there; it is here then."""

    def pull(self, folder: Path) -> None:
        """See what others have published in a folder: its small files are here then, those deleted elsewhere not."""

    def refresh(self, folder: Path) -> None:
        """As `pull`, at most once a second: for places that look often."""

    def settle(self, folder: Path) -> None:
        """For those who only read: what `pull` has just found is good enough for a while."""

    def agree(self, path: Path) -> None:
        """Have one file as it was published last, or not at all."""

    def fetch(self, folder: Path, wanted: Wanted = every) -> None:
        """Have the wanted files of a folder here, large ones too."""

    def fetch_newest(self, folder: Path, commit: str) -> None:
        """Have the newest folder inside `folder` that holds the file `commit` here."""

    def borrowed(self, path: Path) -> AbstractContextManager[None]:
        """Have a file here for a while."""

    def afresh(self, path: Path) -> AbstractContextManager[tuple[Files, Path]]:
        """To prove what is published: files with nothing remembered and nothing fetched, and the path there."""

    def open_range(self, path: Path, size: int) -> Ranges | None:
        """A file of `size` bytes to be read by position; None when it is to be read here. Raises Damaged when it is
        neither here nor elsewhere with that size."""

    def publish_new(self, path: Path, data: Buffer | Iterable[Buffer]) -> bool:
        """As `publish_new` of this module: the first of several writers wins, wherever they are."""

    def publish_replace(self, path: Path, data: Buffer | Iterable[Buffer]) -> None:
        """As `publish_replace` of this module: the last writer wins."""

    def append(self, path: Path, line: str) -> None:
        """Add a line to a log of one writer."""

    def put_folder(self, folder: Path, last: str = "", wanted: Wanted = every) -> None:
        """Publish a folder that was written here; the file `last` makes it count."""

    def remove(self, folder: Path, keep: Iterable[str]) -> None:
        """Where a folder is published elsewhere: delete what it has there but for the folders in it named in `keep`."""

    def remove_files(self, paths: Iterable[Path]) -> None:
        """Delete files, here and where they are published; one that is already gone is fine."""


class LocalFiles:
    """As Files, on a disk or a file system that all machines share: what is published is here, and nowhere else."""

    one_spool = one_clock = True

    def __init__(self) -> None:
        self.claims: Claims = NoClaims()

    def shown(self, text: str) -> str:
        return text

    def common_name(self, folder: Path) -> str | None:
        return None

    def exists(self, path: Path) -> bool:
        return path.exists()

    def look(self, path: Path) -> bool:
        return path.exists()

    def pull(self, folder: Path) -> None: ...
    def refresh(self, folder: Path) -> None: ...
    def settle(self, folder: Path) -> None: ...
    def agree(self, path: Path) -> None: ...
    def fetch(self, folder: Path, wanted: Wanted = every) -> None: ...
    def fetch_newest(self, folder: Path, commit: str) -> None: ...
    def put_folder(self, folder: Path, last: str = "", wanted: Wanted = every) -> None: ...
    def remove(self, folder: Path, keep: Iterable[str]) -> None: ...

    def remove_files(self, paths: Iterable[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def borrowed(self, path: Path) -> AbstractContextManager[None]:
        return nullcontext()

    def afresh(self, path: Path) -> AbstractContextManager[tuple[Files, Path]]:
        return nullcontext((self, path))

    def open_range(self, path: Path, size: int) -> Ranges | None:
        return None

    def publish_new(self, path: Path, data: Buffer | Iterable[Buffer]) -> bool:
        return publish_new(path, data)

    def publish_replace(self, path: Path, data: Buffer | Iterable[Buffer]) -> None:
        publish_replace(path, data)

    def append(self, path: Path, line: str) -> None:
        append(path, line)


class NoClaims:
    """As Claims, where all machines see one folder, or claims are not worth showing."""

    def begin(self, path: Path, content: bytes) -> bool:
        return True

    def keep(self, path: Path, content: bytes) -> bool:
        return True

    def end(self, path: Path) -> None: ...
    def gather(self, folder: Path) -> None: ...


def publish_new(path: Path, data: Buffer | Iterable[Buffer]) -> bool:
    """Write `data` under `path` on this machine unless somebody was first. True when the published bytes are ours.

    The file is written aside, synced and hard-linked to its name, so that it is complete from the moment it can be
    seen, and the first of several writers wins. When the name is taken at the start, `data` is not even read.
    Raises RunFailed when the disk is full or broken; nothing is left behind then. Raises Damaged where a link leads out
    of the run.
    """
    refuse_escape(path)
    if os.path.lexists(path):
        return False
    with written_aside(path, data) as temporary, disk_errors(path):
        return name_new(temporary, path)


def publish_replace(path: Path, data: Buffer | Iterable[Buffer]) -> None:
    """Write `data` under `path` in place of what was there; the last writer wins. Raises as publish_new does."""
    refuse_escape(path)
    with written_aside(path, data) as temporary, disk_errors(path):
        os.replace(temporary, path)


def append(path: Path, line: str) -> None:
    """Add a line to a file on this machine that has one writer. Raises Damaged where a link leads out of the run."""
    refuse_escape(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


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


def canonical_sha256(value: object) -> str:
    """sha256 of a value as JSON with sorted keys and no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: object, where: str | Path) -> bytes:
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


def read_json(path: str | Path) -> dict[str, object]:
    """The object in a JSON file of any kind; records have readers of their own. Raises UserError when it is missing or
    damaged."""
    try:
        return parse_object(read_plain(path, MOST_BYTES))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", "run the stage that writes it") from error
    except ValueError as error:
        hint = "restore it from a copy; `rushes verify` lists all faults"
        raise UserError(f"{path} is damaged: {error}", hint) from error


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
    with disk_errors(path):
        temporary, handle = create_temporary(path)
    try:
        yield temporary, handle
    finally:  # one place for every outcome: a private file left on a full disk would keep it full
        with suppress(FileNotFoundError):  # os.replace took it
            os.unlink(temporary)
        os.close(handle)


@contextmanager
def written_aside(path: Path, data: Buffer | Iterable[Buffer]) -> Iterator[Path]:
    """A synced private file beside `path` with its content."""
    with aside(path) as (temporary, handle):
        _write(handle, data, path)
        with disk_errors(path):
            os.fsync(handle)
        yield temporary
    with disk_errors(path):
        sync(path.parent)


def _write(handle: int, data: Buffer | Iterable[Buffer], path: Path) -> None:
    """Gathering writes straight from the memory of the buffers; nothing is copied or joined."""
    buffers = iter((data,) if isinstance(data, bytes | bytearray | memoryview) else data)
    while batch := list(itertools.islice(buffers, VECTORS)):  # outside disk_errors: its errors are its own
        with disk_errors(path):
            _write_batch(handle, [memoryview(buffer).cast("B") for buffer in batch if len(buffer)])


def _write_batch(handle: int, views: list[memoryview]) -> None:
    while views:
        written = os.writev(handle, views)
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            hint = "make room and run the same command again; nothing is lost"
            raise RunFailed(f"{path}: disk full", hint) from error
        raise RunFailed(f"{path}: cannot be written: {error.strerror}", "check the disk and its permissions") from error
