"""Locks, names that only one of several writers can take, and private files, locked as long as their writer lives."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp-"  # Arrow, pandas and our own listings skip names that begin with a dot
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}  # what such file systems answer
AT_FDCWD, RENAME_NOREPLACE = -100, 1  # of Linux' renameat2


def name_new(temporary: Path, path: Path) -> bool:
    """Give a private file its name, unless that is taken; False then. The private name may be gone afterwards.

    By a hard link. A file system without them is asked for a rename that replaces nothing; one that cannot do that
    either gets a look and a rename under a lock, which hold the first writer's file as far as its locks reach. On one
    without locks two writers in the same instant may both be told that they were first, and the last one's file stays,
    whole. Raises OSError.
    """
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        # NFS may repeat a link request whose answer was lost: two names mean that the first one was ours
        return os.stat(temporary).st_nlink == 2
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    renamed = _rename_new(temporary, path)
    if renamed is not None:
        return renamed
    with waiting(path.with_name(f".{path.name}.lock")):
        if os.path.lexists(path):
            return False
        os.rename(temporary, path)
        return True


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, waiting for it; it is removed at release. Nothing is held where there are no locks."""
    handle = None
    while handle is None:
        handle = _lock_handle(path, wait=True)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the advisory lock file `path`; yields False at once when somebody else holds it.

    The file is removed at release. Where the file system has no locks this yields True: locks only save double work.
    """
    handle = _lock_handle(path)
    if handle is None:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)


def _lock_handle(path: Path, *, wait: bool = False) -> int | None:
    while True:
        handle = open_creating(path, os.O_RDWR | os.O_CREAT)
        try:
            if not flock(handle, wait=wait):
                os.close(handle)
                return None
        except OSError:  # no locks on this file system
            return handle
        if is_still(path, handle):
            return handle
        os.close(handle)  # the holder before us removed the name between our open and our lock


def open_creating(path: Path, flags: int) -> int:
    """Open a file, making its directory; another worker may remove that directory while it is empty."""
    for _ in range(100):
        os.makedirs(path.parent, exist_ok=True)
        with suppress(FileNotFoundError):
            return os.open(path, flags | os.O_CLOEXEC, 0o644)
    raise FileNotFoundError(errno.ENOENT, "its directory vanishes again and again", str(path))


def is_still(path: Path, handle: int) -> bool:
    """Whether `path` still names the file that is open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def flock(handle: int, *, wait: bool) -> bool:
    """Lock an open file; False when somebody else holds it and we do not wait. OSError where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def create_temporary(path: Path) -> tuple[Path, int]:
    """A new private file beside `path` and its descriptor, locked.

    Tries again when a sweep removed it between its creation and its lock.
    """
    while True:
        unique = f"{TEMPORARY}{socket.gethostname()[:40]}-{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}"
        temporary = path.with_name(unique)
        handle = open_creating(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        with suppress(OSError):  # no locks on this file system: then nothing is ever swept either
            flock(handle, wait=True)
        if is_still(temporary, handle):
            return temporary, handle
        os.close(handle)


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


def _rename_new(source: Path, target: Path) -> bool | None:
    """Rename unless `target` is taken, in one step; None where the system or the file system cannot do that."""
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return None
    if rename(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    if code in NO_LINKS | {errno.EINVAL}:
        return None
    raise OSError(code, os.strerror(code), str(target))
