"""Claims on a run in a store, for other machines to see: ours are put there, theirs lie as copies beside ours.

Claims are advice. When the store does not answer, nothing is said and nothing is waited for: two machines may then do
the same shard, and one of the two is kept.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from shards.errors import UserError
from shards.files import aside
from shards.store.objects import Objects
from shards.store.urls import Cache, run_of

COPY = b"elsewhere\n"  # last line of the copy of a claim that another machine holds


class StoredClaims:
    """As Claims. `look_again` is the time in seconds between two looks at the claims of a stage."""

    def __init__(self, objects: Objects, cache: Cache, look_again: float) -> None:
        self.objects, self.cache, self.look_again = objects, cache, look_again
        self._looked: dict[Path, float] = {}

    def begin(self, path: Path, content: bytes) -> bool:
        """As Claims."""
        with suppress(UserError):
            return self._send(path, content, new=True)
        return True

    def keep(self, path: Path, content: bytes) -> bool:
        """As Claims: it was taken over when it is gone from the store, or the next one is there."""
        url = self._url(path)
        with suppress(UserError):
            if self.objects.head(url) is None or self.objects.head(_next(url)) is not None:
                return False
            return self._send(path, content, new=False)
        return True

    def end(self, path: Path) -> None:
        """As Claims."""
        with suppress(UserError):
            self.objects.remove(self._url(path))

    def gather(self, folder: Path) -> None:
        """As Claims; copies that are over are dropped. What was claimed on this machine is left alone."""
        url = self.cache.url_of(folder.parent)
        now = time.monotonic()
        if now - self._looked.get(folder, -self.look_again) < self.look_again:
            return
        self._looked[folder] = now
        with suppress(UserError):
            there = self.objects.listing(f"{url}/claims")
            copies = {path.name for path in folder.glob("*.claim-*") if _is_copy(path)}
            ours = {path.name for path in folder.glob("*.claim-*")} - copies
            for name in there.keys() - ours:
                self._copy(f"{url}/claims/{name}", folder / name, there[name].size)
            for name in copies - there.keys():
                (folder / name).unlink(missing_ok=True)

    def _url(self, path: Path) -> str:
        return f"{self.cache.url_of(path.parent.parent)}/claims/{path.name}"

    def _send(self, path: Path, content: bytes, *, new: bool) -> bool:
        """Put a claim to the store as others read it: they cannot ask whether our lock is held."""
        url = self._url(path)
        with aside(self.cache.notes_folder(path.parent) / path.name) as (temporary, _):
            temporary.write_bytes(content.replace(b'"locked": true', b'"locked": false') + COPY)
            if new:
                return self.objects.put_new(temporary, url, run_of(url))
            self.objects.put(temporary, url)
            return True

    def _copy(self, url: str, path: Path, size: int) -> None:
        with suppress(UserError), aside(self.cache.notes_folder(path.parent) / path.name) as (temporary, _):
            temporary.write_bytes(self.objects.read(url, 0, size))  # released in the meantime: an error, and no copy
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)


def _next(url: str) -> str:
    """The claim that whoever takes this one over makes; its number is the last part of the name."""
    name, _, number = url.rpartition("-")
    return f"{name}-{int(number) + 1:0{len(number)}d}"


def _is_copy(path: Path) -> bool:
    with suppress(OSError):
        return path.read_bytes().endswith(COPY)
    return False
