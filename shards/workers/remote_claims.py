"""Claims on a run at a URL, for other machines to see: ours are put to the store, theirs lie as copies beside ours.

Claims are advice. When the store does not answer, nothing is said and nothing is waited for: two machines may then do
the same shard, and one of the two is kept.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.files import aside
from shards.store import objects
from shards.store.mirror import RUN
from shards.store.urls import notes_folder, url_of

if TYPE_CHECKING:
    from shards.run import Stage

COPY = b"elsewhere\n"  # last line of the copy of a claim that another machine holds
LOOK_AGAIN = 1.0  # s between two looks at the claims of a stage

_looked: dict[Path, float] = {}


def begin(path: Path, content: bytes) -> bool:
    """Show a new claim; False when another machine has put one of that name. True at once for a local run."""
    url = _url(path)
    with suppress(UserError):
        return url is None or _send(path, content, url, new=True)
    return True


def keep(path: Path, content: bytes) -> bool:
    """Show a sign of life; False when the claim was taken over: it is gone from the store, or the next one is there."""
    url = _url(path)
    with suppress(UserError):
        if url is None:
            return True
        if objects.head(url) is None or objects.head(_next(url)) is not None:
            return False
        return _send(path, content, url, new=False)
    return True


def end(path: Path) -> None:
    """Take a claim out of the store, ours or that of a dead one."""
    url = _url(path)
    with suppress(UserError):
        if url is not None:
            objects.remove(url)


def gather(stage: Stage) -> None:
    """Copy what other machines claim into the stage's work folder, once a second at most, and drop copies that are
    over. What was claimed on this machine is left alone."""
    url, folder = _shown(stage.path), stage.path / "work"
    now = time.monotonic()
    if url is None or now - _looked.get(stage.path, -LOOK_AGAIN) < LOOK_AGAIN:
        return
    _looked[stage.path] = now
    with suppress(UserError):
        there = objects.listing(f"{url}/claims")
        copies = {path.name for path in folder.glob("*.claim-*") if _is_copy(path)}
        ours = {path.name for path in folder.glob("*.claim-*")} - copies
        for name in there.keys() - ours:
            _copy(f"{url}/claims/{name}", folder / name, there[name].size)
        for name in copies - there.keys():
            (folder / name).unlink(missing_ok=True)


def _url(path: Path) -> str | None:
    url = _shown(path.parent.parent)
    return f"{url}/claims/{path.name}" if url else None


def _shown(folder: Path) -> str | None:
    """The URL of a stage; None where no claims are shown, as on the hub: each sign of life would be a commit."""
    url = url_of(folder)
    return None if url and objects.in_commits(url) else url


def _next(url: str) -> str:
    """The claim that whoever takes this one over makes; its number is the last part of the name."""
    name, _, number = url.rpartition("-")
    return f"{name}-{int(number) + 1:0{len(number)}d}"


def _send(path: Path, content: bytes, url: str, *, new: bool) -> bool:
    """Put a claim to the store as others shall read it: they cannot ask whether our lock is held."""
    with aside(notes_folder(path.parent) / path.name) as (temporary, _):
        temporary.write_bytes(content.replace(b'"locked": true', b'"locked": false') + COPY)
        if new:
            return objects.put_new(temporary, url, RUN.sub("", url))
        objects.put(temporary, url)
        return True


def _copy(url: str, path: Path, size: int) -> None:
    with suppress(UserError), aside(notes_folder(path.parent) / path.name) as (temporary, _):
        temporary.write_bytes(objects.read(url, 0, size))  # released in the meantime: an error, and no copy
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)


def _is_copy(path: Path) -> bool:
    with suppress(OSError):
        return path.read_bytes().endswith(COPY)
    return False
