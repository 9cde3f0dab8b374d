"""One file of a working copy: whether it is what the store has, and fetching it."""

from __future__ import annotations

import os
from pathlib import Path

from shards.files import aside
from shards.store.objects import Entry, Objects, checksum
from shards.store.versions import Memos


def same(path: Path, entry: Entry | None, memos: Memos) -> bool:
    """Whether a file here is the object in the store, as far as can be told without fetching it."""
    if entry is None:
        return False
    name = path.relative_to(memos.folder).as_posix()
    try:
        with open(path, "rb") as file:  # all is asked of this file: another may get its name at any moment
            found = os.fstat(file.fileno())
            if found.st_size != entry.size:  # a log that grows here is put to the store line by line
                return path.suffix == ".jsonl" and found.st_size > entry.size
            if memos.of(name) == [entry.version, found.st_size, found.st_mtime_ns]:
                return True
            if entry.checksum is None or checksum(file, entry.checksum) != entry.checksum:
                return False
            _set_time(file.fileno(), entry)
            memos.note(name, entry.version, os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
    return True


def fetch_object(objects: Objects, url: str, path: Path, entry: Entry, memos: Memos) -> None:
    """Fetch an object and give it its name here, with its time in the store, so that all machines see the same one."""
    with aside(memos.cache.notes_folder(path.parent) / path.name) as (temporary, _):
        entry = objects.get(url, temporary, entry)
        _set_time(temporary, entry)
        found = os.stat(temporary)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)
    memos.note(path.relative_to(memos.folder).as_posix(), entry.version, found)


def _set_time(file: Path | int, entry: Entry) -> None:
    if entry.modified is not None:
        os.utime(file, (entry.modified, entry.modified))


def size_of(path: Path) -> int:
    """Bytes of a file; -1 when there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
