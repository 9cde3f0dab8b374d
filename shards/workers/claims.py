"""Claims on pieces of work: the owner counts, the others watch. They save double work; nothing relies on them."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import RunFailed, UserError
from shards.files import Claims, NoClaims
from shards.locks import is_still, open_creating
from shards.process.signals import check
from shards.process.versions import our_version
from shards.workers import owners
from shards.workers.owners import SECONDS, Found, Owner

if TYPE_CHECKING:
    from shards.run import Stage

BEATS = 12  # signs of life in the time after which a claim is void
COUNT = 12  # digits of the counter


class Claim:
    """A claim that is ours until it is released, or until others hold us for dead because we were silent."""

    def __init__(self, path: Path, handle: int, owner: Owner, shown: Claims) -> None:
        self.path, self.handle, self.owner, self.shown = path, handle, owner, shown
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
                show = self.shown.keep if self.count > 1 else self.shown.begin
                self.lost |= not show(self.path, content)
            except OSError:  # a broken disk stops the work itself soon enough, in plain words
                return

    def require(self) -> None:
        """Raise RunFailed when the claim was taken over: for work that must not be published twice."""
        self.beat()
        if self.lost:
            raise RunFailed(
                f"{self.path.name} was taken over: this process gave no sign of life for too long",
                "another process continues with the work; nothing is lost",
            )

    def release(self) -> None:
        """Give the work free."""
        _heart.forget(self)
        with self.guard, suppress(OSError):
            if is_still(self.path, self.handle):
                os.unlink(self.path)
            if not self.lost:  # else the name in the store is another's
                self.shown.end(self.path)
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
            yield Claim(Path(os.devnull), nothing.fileno(), _owner(SECONDS, worker, False), NoClaims())
        return
    held = _take(stage, shard, what, seconds, worker)
    try:
        yield held
    finally:
        if held:
            held.release()


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


# --- Taking a claim --------------------------------------------------------------------------------------------------


def _take(stage: Stage, shard: int, what: str, seconds: float, worker: tuple[int, int]) -> Claim | None:
    """The claim, when nobody has it or its owner is dead: then under the next number, which only one can create."""
    last = owners.generation(stage, shard, what)
    if last and _stands(owners.read(owners.claim_path(stage, shard, what, last), shard, what), seconds):
        return None
    held = _create(stage, owners.claim_path(stage, shard, what, last + 1), seconds, worker)
    if held and owners.generation(stage, shard, what) > last + 1:  # somebody was ahead of what we saw
        held.release()
        return None
    if held:
        for number in range(1, last + 1):
            owners.remove(stage, owners.claim_path(stage, shard, what, number))
        _heart.keep(held)
    return held


def _stands(found: Found | None, seconds: float) -> bool:
    """Whether the owner of a claim may live. Raises UserError for one that runs another version of rushes."""
    state = owners.life(found, seconds) if found else "gone"
    if found and state != "gone":
        _check_version(found)
    return state in ("alive", "silent")


def _check_version(found: Found) -> None:
    if found.owner and found.owner.version != our_version():
        raise UserError(
            f"{found.path} was claimed by rushes {found.owner.version or 'without a version'} on {found.owner.host}, "
            f"this is {our_version() or 'without a version'}",
            "use one version for all workers; if that one is gone for good, delete that file",
        )


def _create(stage: Stage, path: Path, seconds: float, worker: tuple[int, int]) -> Claim | None:
    try:
        handle = open_creating(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return None
    except OSError as error:
        hint = "check the disk, its quota and permissions"
        raise RunFailed(f"{path}: cannot be written: {error.strerror}", hint) from error
    held = Claim(path, handle, _owner(seconds, worker, _lock(handle)), stage.files.claims)
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
    return Owner(uuid.uuid4().hex, socket.gethostname(), owners.boot(), os.getpid(), part, every, locked, our_version())


# --- Keeping it ------------------------------------------------------------------------------------------------------


class _Heart:
    """One thread that counts for all claims of this process. It ends when there are none."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """With no claims; in a forked process too, where those that there were are held by its parent."""
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
os.register_at_fork(after_in_child=_heart.begin)
