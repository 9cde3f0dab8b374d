"""Files of a working copy: whether one is what the store has, fetching it, and several transfers at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from shards.files import aside
from shards.store.objects import Entry, Objects, checksum
from shards.store.versions import Memos

AT_ONCE = 8  # transfers


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


def at_once(work: Callable[[str], None], names: Iterable[str]) -> None:
    """Several transfers at a time; the first error ends it."""
    chosen = list(names)
    if not chosen:
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(AT_ONCE, len(chosen))) as pool:
        jobs = [pool.submit(work, name) for name in chosen]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
