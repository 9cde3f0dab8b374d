"""sha256 of large files, taken once on a machine and kept in the cache until the file changes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from shards.errors import RunFailed
from shards.files import publish_replace, sha256_file
from shards.store.urls import Cache

LARGE = 16 * 2**20  # bytes; smaller files are hashed faster than looked up
SETTLED = 2.0  # seconds since the last change: file systems may give two changes that are closer one time


def sha256_once(path: Path) -> str:
    """Hexadecimal sha256 of a file, from the cache when nothing about the file has changed since it was taken.

    What counts is device, inode, size and both times, of which nobody can set that of the last change of any kind. A
    cache that cannot be read or written costs nothing but time. Raises OSError when the file cannot be read.
    """
    before = _stamp(path)
    if before[2] < LARGE:
        return sha256_file(path)
    note = _note(path)
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_bytes())
        if known["path"] == str(path.resolve()) and known["stamp"] == before:
            return str(known["sha256"])
    found = sha256_file(path)
    if _stamp(path) == before and abs(time.time() - before[-1] / 1e9) > SETTLED:
        record = {"path": str(path.resolve()), "sha256": found, "stamp": before}
        with suppress(OSError, RunFailed):
            publish_replace(note, json.dumps(record).encode())
    return found


def _stamp(path: Path) -> list[int]:
    found = os.stat(path)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _note(path: Path) -> Path:
    """Where the sha256 of a file is kept: a file for each, so that no two processes write different things."""
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return Cache.current().top / "hashes" / f"{name}.json"
