"""Who holds which work: claim files as everybody reads them, and what watching them tells of their owners."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Le

from shards.errors import Damaged
from shards.records.opening import read_plain
from shards.records.reading import parse_record

if TYPE_CHECKING:
    from pydantic import ConfigDict

    from shards.run import Stage

SECONDS = 60.0  # without a sign of life, after which a claim is void
MOST_BYTES = 2**16  # of a claim
NAME = re.compile(r"shard-(\d{6})\.([a-z]+)\.claim-(\d{4,})")

Life = Literal["alive", "silent", "dead", "gone"]


@dataclass(frozen=True)
class Owner:
    """Who holds a claim: the first line of its file. The second line is the counter."""

    __pydantic_config__: ClassVar[ConfigDict] = {"strict": True, "extra": "forbid", "allow_inf_nan": False}

    owner: str
    """Random, one for each claim."""
    host: str
    boot: str
    """Of the kernel the owner runs on; with the host name it says whether its locks can be asked."""
    pid: int
    worker: str
    """Its part of the work, like 1/4."""
    every: Annotated[float, Ge(0), Le(86400)]
    """Seconds between two signs of life."""
    locked: bool
    """Whether the owner could lock the file, so that the kernel tells of its death."""
    version: str
    """Of rushes."""

    @property
    def same_kernel(self) -> bool:
        """Whether it runs where we run, so that a lock that is free proves its death."""
        return (self.host, self.boot) == (socket.gethostname(), boot()) != (self.host, "")


@dataclass(frozen=True)
class Found:
    """A claim file as it was read."""

    path: Path
    shard: int
    what: str
    owner: Owner | None
    """None while its first line is being written."""
    content: bytes


def claims_of(stage: Stage) -> list[Found]:
    """The claims of a stage, the newest of each piece of work."""
    newest: dict[tuple[int, str], tuple[int, Path]] = {}
    for (shard, what, number), path in _files(stage).items():
        newest[shard, what] = max(newest.get((shard, what), (0, path)), (number, path))
    found = [read(path, shard, what) for (shard, what), (_, path) in sorted(newest.items())]
    return [one for one in found if one is not None]


def holder(stage: Stage, shard: int, what: str) -> Found | None:
    """The claim on a piece of work, or None when there is none."""
    last = generation(stage, shard, what)
    return read(claim_path(stage, shard, what, last), shard, what) if last else None


def life(found: Found, seconds: float = SECONDS) -> Life:
    """What this process knows of the owner of a claim by now; it learns more by asking again.

    alive: counted between two looks not long ago, or its lock is held. silent: not yet decided. dead: its lock is free,
    or it did not count for `seconds`. gone: it has just given the work free.
    """
    now = time.monotonic()
    before = _seen.get(found.path)
    if before is None or before.content != found.content:
        before = _seen[found.path] = _Seen(found.content, now, before is not None)
    silence, owner = now - before.since, found.owner
    if owner is None:
        return "dead" if silence >= seconds else "silent"
    locked = _is_locked(found.path) if owner.locked else None
    if locked is False and owner.same_kernel:
        return "dead" if found.path.exists() else "gone"
    if silence >= max(seconds, 3 * owner.every):
        return "dead"
    return "alive" if locked or (before.counted and silence < 2.5 * owner.every) else "silent"


def sweep(stage: Stage, what: str, seconds: float = SECONDS) -> None:
    """Remove the claims of the dead, which nobody will take over when their work is done."""
    for found in claims_of(stage):
        if found.what == what and life(found, seconds) == "dead":
            remove(stage, found.path)
    with suppress(OSError):
        (stage.path / "work").rmdir()


# --- What taking a claim needs ---------------------------------------------------------------------------------------


def claim_path(stage: Stage, shard: int, what: str, number: int) -> Path:
    """The file of a claim; `number` is 1, and one more for each that took the work over from a dead owner."""
    return stage.path / "work" / f"shard-{shard:06d}.{what}.claim-{number:04d}"


def generation(stage: Stage, shard: int, what: str) -> int:
    """The number of the newest claim on a piece of work; 0 when there is none."""
    return max((number for one, kind, number in _files(stage) if (one, kind) == (shard, what)), default=0)


def read(path: Path, shard: int, what: str) -> Found | None:
    """The claim in a file; None when it is gone."""
    try:
        content = read_plain(path, MOST_BYTES)
    except FileNotFoundError:
        return None
    except Damaged:  # nobody counts in it, so that it is void in a while
        return Found(path, shard, what, None, b"")
    try:
        owner = parse_record(Owner, content.partition(b"\n")[0], path)
    except Damaged:  # its owner is writing it
        owner = None
    return Found(path, shard, what, owner, content)


def remove(stage: Stage, path: Path) -> None:
    """Take away a claim whose owner is dead: here, for all machines, and from what we remember."""
    _seen.pop(path, None)
    path.unlink(missing_ok=True)
    stage.files.claims.end(path)


@cache
def boot() -> str:
    """Identity of the running kernel; empty where there is none to be had."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


# --- Reading and watching --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """The last content of a claim that was new to us, and when that was on our clock."""

    content: bytes
    since: float
    counted: bool
    """Whether we had seen another content before: a sign of life, unlike the first look."""


_seen: dict[Path, _Seen] = {}


def _files(stage: Stage) -> dict[tuple[int, str, int], Path]:
    folder, found = stage.path / "work", {}
    stage.files.claims.gather(folder)
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if match := NAME.fullmatch(name):
                found[int(match[1]), match[2], int(match[3])] = folder / name
    return found


def _is_locked(path: Path) -> bool | None:
    """Whether somebody holds the lock; None when that cannot be said."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask must not take each other for it
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
