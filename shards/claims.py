"""Claims on pieces of work: the owner counts, the others watch. They save double work; nothing relies on them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shards import beacons
from shards.errors import RunFailed, UserError
from shards.locks import is_still, open_creating
from shards.signals import check

if TYPE_CHECKING:
    from shards.run import Stage

SECONDS = 60.0  # without a sign of life, after which a claim is void
BEATS = 12  # signs of life in that time
COUNT = 12  # digits of the counter
NAME = re.compile(r"shard-(\d{6})\.([a-z]+)\.claim-(\d{4,})")

Life = Literal["alive", "silent", "dead", "gone"]


@dataclass(frozen=True)
class Owner:
    """Who holds a claim: the first line of its file. The second line is the counter."""

    owner: str
    """Random, one for each claim."""
    host: str
    boot: str
    """Of the kernel the owner runs on; with the host name it says whether its locks can be asked."""
    pid: int
    worker: str
    """Its part of the work, like 1/4."""
    every: float
    """Seconds between two signs of life."""
    locked: bool
    """Whether the owner could lock the file, so that the kernel tells of its death."""
    version: str
    """Of rushes."""

    @property
    def same_kernel(self) -> bool:
        """Whether it runs where we run, so that a lock that is free proves its death."""
        return (self.host, self.boot) == (socket.gethostname(), _boot()) != (self.host, "")


@dataclass(frozen=True)
class Found:
    """A claim file as it was read."""

    path: Path
    shard: int
    what: str
    owner: Owner | None
    """None while its first line is being written."""
    content: bytes


class Claim:
    """A claim that is ours until it is released, or until others hold us for dead because we were silent."""

    def __init__(self, path: Path, handle: int, owner: Owner) -> None:
        self.path, self.handle, self.owner = path, handle, owner
        self.count = 0
        self.lost = False
        self.guard = threading.Lock()  # a beat must not write to a handle that was closed and given to another file
        self.head = json.dumps(asdict(owner), sort_keys=True).encode() + b"\n"

    def beat(self) -> None:
        """Count on, in place: whoever took the name from us has a file of his own, which this cannot touch."""
        with self.guard:
            if self.lost or self.handle < 0:
                return
            self.count += 1
            try:
                self.lost = not is_still(self.path, self.handle)
                content = self.head + b"%0*d\n" % (COUNT, self.count)
                os.pwrite(self.handle, content, 0)
                os.fsync(self.handle)  # a network file system shows it to others now
                show = beacons.keep if self.count > 1 else beacons.begin
                self.lost |= not show(self.path, content)
            except OSError:  # a broken disk stops the work itself soon enough, in plain words
                return

    def require(self) -> None:
        """Raise RunFailed when the claim was taken over: for work that must not be published twice."""
        self.beat()
        if self.lost:
            raise RunFailed(
                f"{self.path.name} was taken over: this process gave no sign of life for too long",
                "another process goes on with the work; nothing is lost",
            )

    def release(self) -> None:
        """Give the work free."""
        _heart.forget(self)
        with self.guard, suppress(OSError):
            if is_still(self.path, self.handle):
                os.unlink(self.path)
            if not self.lost:  # else the name in the store is another's
                beacons.end(self.path)
        with self.guard:
            os.close(self.handle)
            self.handle = -1
        with suppress(OSError):  # others still work there
            self.path.parent.rmdir()


@contextmanager
def claim(
    stage: Stage, shard: int, what: str, seconds: float = SECONDS, worker: tuple[int, int] = (0, 1)
) -> Iterator[Claim | None]:
    """Claim a piece of work (`what`: rollout, score or train); None when a living worker holds it.

    A claim is void when its owner's lock is free, which only the kernel that the owner runs on can say, or when we have
    watched it for `seconds` of our own monotonic clock without a sign of life. `seconds` 0 turns claims off: then
    everybody gets everything. Raises UserError when the owner runs another version of rushes.
    """
    if not seconds:
        with open(os.devnull, "wb") as nothing:
            yield Claim(Path(os.devnull), nothing.fileno(), _owner(SECONDS, worker, False))
        return
    held = _take(stage, shard, what, seconds, worker)
    try:
        yield held
    finally:
        if held:
            held.release()


def order(shards: Sequence[int], worker: tuple[int, int]) -> list[int]:
    """Shards in the order in which worker (i, n) tries them: its own share, then that of the next worker, and so on."""
    index, count = worker
    if not 0 <= index < count:
        raise UserError(f"worker {index}/{count} does not exist", "workers are counted from 0: 0/4, 1/4, 2/4, 3/4")
    return sorted(shards, key=lambda shard: ((shard - index) % count, shard))


def claims(stage: Stage) -> list[Found]:
    """The claims of a stage, the newest of each piece of work."""
    newest: dict[tuple[int, str], tuple[int, Path]] = {}
    for (shard, what, generation), path in _files(stage).items():
        newest[shard, what] = max(newest.get((shard, what), (0, path)), (generation, path))
    found = [_read(path, shard, what) for (shard, what), (_, path) in sorted(newest.items())]
    return [one for one in found if one is not None]


def holder(stage: Stage, shard: int, what: str) -> Found | None:
    """The claim on a piece of work, or None when there is none."""
    last = _generation(stage, shard, what)
    return _read(_path(stage, shard, what, last), shard, what) if last else None


def life(found: Found, seconds: float = SECONDS) -> Life:
    """What this process knows of the owner of a claim by now; it learns more by asking again.

    alive: counted between two looks not long ago, or its lock is held. silent: not yet decided. dead: its lock is free,
    or it did not count for `seconds`.
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


def sweep_claims(stage: Stage, what: str, seconds: float = SECONDS) -> None:
    """Remove the claims of the dead, which nobody will take over when their work is done."""
    for found in claims(stage):
        if found.what == what and life(found, seconds) == "dead":
            found.path.unlink(missing_ok=True)
            beacons.end(found.path)
    with suppress(OSError):
        (stage.path / "work").rmdir()


class Pause:
    """Waiting for others: a moment at first, then ever longer, a tenth of what was waited, at most `longest` s."""

    def __init__(self, longest: float) -> None:
        self.longest, self.waited = longest, 0.0

    def __call__(self) -> None:
        """Sleep. Raises Stopped when a signal asked for the end."""
        check("while it waited for other workers")
        seconds = min(self.longest, 0.05 + 0.1 * self.waited)
        time.sleep(seconds)
        self.waited += seconds


# --- The owner -------------------------------------------------------------------------------------------------------


def _take(stage: Stage, shard: int, what: str, seconds: float, worker: tuple[int, int]) -> Claim | None:
    """The claim, when nobody has it or its owner is dead: then under the next number, which only one can create."""
    last = _generation(stage, shard, what)
    if last:
        found = _read(_path(stage, shard, what, last), shard, what)
        state = life(found, seconds) if found else "gone"
        if found and state != "gone":
            _check_version(found)
        if state in ("alive", "silent"):
            return None
    held = _create(_path(stage, shard, what, last + 1), seconds, worker)
    if held and _generation(stage, shard, what) > last + 1:  # somebody was ahead of what we saw
        held.release()
        return None
    if held:
        for number in range(1, last + 1):
            _seen.pop(_path(stage, shard, what, number), None)
            _path(stage, shard, what, number).unlink(missing_ok=True)
            beacons.end(_path(stage, shard, what, number))
        _heart.keep(held)
    return held


def _create(path: Path, seconds: float, worker: tuple[int, int]) -> Claim | None:
    try:
        handle = open_creating(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return None
    except OSError as error:
        hint = "check the disk, its quota and permissions"
        raise RunFailed(f"{path}: cannot be written: {error.strerror}", hint) from error
    held = Claim(path, handle, _owner(seconds, worker, _lock(handle)))
    held.beat()
    if held.lost:  # another machine was first in the store
        held.release()
        return None
    return held


def _lock(handle: int) -> bool:
    """Whether we could lock our new file. Those who ask for its owner hold it for a moment; nothing waits for ever."""
    for _ in range(50):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.002)
        except OSError:  # no locks on this file system
            return False
    return False


def _owner(seconds: float, worker: tuple[int, int], locked: bool) -> Owner:
    part = f"{worker[0]}/{worker[1]}"
    every = max(0.02, seconds / BEATS)
    return Owner(uuid.uuid4().hex, socket.gethostname(), _boot(), os.getpid(), part, every, locked, our_version())


def _check_version(found: Found) -> None:
    if found.owner and found.owner.version != our_version():
        raise UserError(
            f"{found.path} was claimed by rushes {found.owner.version or 'without a version'} on {found.owner.host}, "
            f"this is {our_version() or 'without a version'}",
            "use one version for all workers; if that one is gone for good, delete that file",
        )


class _Heart:
    """One thread that counts for all claims of this process. It ends when there are none."""

    def __init__(self) -> None:
        self.held: set[Claim] = set()
        self.wake = threading.Event()
        self.guard = threading.Lock()
        self.thread: threading.Thread | None = None

    def keep(self, one: Claim) -> None:
        with self.guard:
            self.held.add(one)
            self.wake.set()  # it may have to count more often than those before it
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="claims", daemon=True)
                self.thread.start()

    def forget(self, one: Claim) -> None:
        with self.guard:
            self.held.discard(one)

    def _run(self) -> None:
        while True:
            with self.guard:
                held = list(self.held)
                if not held:
                    self.thread = None
                    return
            self.wake.wait(min(one.owner.every for one in held))
            self.wake.clear()
            for one in held:
                one.beat()


_heart = _Heart()


# --- The others ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """The last content of a claim that was new to us, and when that was on our clock."""

    content: bytes
    since: float
    counted: bool
    """Whether we had seen another content before: a sign of life, unlike the first look."""


_seen: dict[Path, _Seen] = {}


def _path(stage: Stage, shard: int, what: str, generation: int) -> Path:
    return stage.path / "work" / f"shard-{shard:06d}.{what}.claim-{generation:04d}"


def _files(stage: Stage) -> dict[tuple[int, str, int], Path]:
    beacons.gather(stage)
    folder, found = stage.path / "work", {}
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            if match := NAME.fullmatch(name):
                found[int(match[1]), match[2], int(match[3])] = folder / name
    return found


def _generation(stage: Stage, shard: int, what: str) -> int:
    return max((number for one, kind, number in _files(stage) if (one, kind) == (shard, what)), default=0)


def _read(path: Path, shard: int, what: str) -> Found | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head, _, _ = content.partition(b"\n")
    try:
        owner = Owner(**json.loads(head))
    except (ValueError, TypeError):  # its owner is writing it
        owner = None
    return Found(path, shard, what, owner, content)


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


@cache
def _boot() -> str:
    """Identity of the running kernel; empty where there is none to be had."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


@cache
def our_version() -> str:
    """Version of this package; empty when it runs from a checkout that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rushes")
    except PackageNotFoundError:
        return ""
