"""The one way in which files of a run are opened: plain files alone, never waiting, within a size and the run."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from shards.errors import Damaged

COPY = "restore it from a copy"
STAGE = re.compile(r"iter-\d{4,}")
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def open_file(path: str | Path, hint: str = COPY, root: Path | None = None) -> int:
    """Descriptor of a plain file, to be read. Nothing of another kind is opened: a device might act, a pipe wait.

    A link is followed only within `root`, the run, which is found by the path where it is not given. Raises
    FileNotFoundError when there is no file, and Damaged with `hint` when it is not a plain file or cannot be opened.
    """
    refuse_escape(path, hint, root)
    try:
        _refuse_kind(path, os.stat(path).st_mode, hint)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Damaged(f"{path}: cannot be opened: {reason}", hint) from error
    try:
        _refuse_kind(path, os.fstat(handle).st_mode, hint)
    except Damaged:
        os.close(handle)
        raise
    return handle


def read_plain(path: str | Path, most: int, hint: str = COPY, root: Path | None = None) -> bytes:
    """The content of a plain file of at most `most` bytes, read no further than that. Raises as `open_file`, and
    Damaged for a larger file and for one that cannot be read."""
    handle = open_file(path, hint, root)
    try:
        with os.fdopen(handle, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(most + 1) if size <= most else b""
    except OSError as error:
        raise Damaged(f"{path}: cannot be read: {error.strerror}", hint) from error
    if size > most or len(data) > most:
        raise Damaged(f"{path}: has {max(size, len(data))} bytes, more than the {most} that are read", hint)
    return data


def is_plain(path: Path) -> bool:
    """Whether a path names a plain file that `open_file` would open."""
    try:
        refuse_escape(path)
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError, Damaged):
        return False


def refuse_escape(path: str | Path, hint: str = COPY, root: Path | None = None) -> None:
    """Raise Damaged when a link below the run directory leads out of it: the file itself, or a folder on the way.

    The run directory itself may be reached by links: it is named by the person at the keyboard, what lies in it is not.
    """
    root = root or run_above(path)
    if root is None:
        return
    step = root
    for part in Path(path).relative_to(root).parts:
        step = step / part
        if os.path.islink(step) and not _leads_inside(step, root):
            raise Damaged(f"{step}: a link that leads out of the run", f"replace it by what it stands for, or {hint}")


def run_above(path: str | Path) -> Path | None:
    """The run directory of a path in one of its stages, by the names alone; None for any other path."""
    parts = Path(path).parts
    for at in range(len(parts) - 1, -1, -1):
        if STAGE.fullmatch(parts[at]):
            return Path(*parts[: at - 1 if at and parts[at - 1] == "eval" else at])
    return None


def inside(name: object) -> bool:
    """Whether a name in a record stays in the folder it counts from: relative, and without `..`."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name or name.startswith("/"):
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def _leads_inside(link: Path, root: Path) -> bool:
    target, home = os.path.realpath(link), os.path.realpath(root)
    return target == home or target.startswith(home.rstrip("/") + "/")


def _refuse_kind(path: str | Path, mode: int, hint: str) -> None:
    if not stat.S_ISREG(mode):
        raise Damaged(f"{path}: {_KINDS.get(stat.S_IFMT(mode), 'something')}, not a plain file", hint)
