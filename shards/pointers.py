"""Git LFS pointers: the few lines that lie in place of a large file when a repository is cloned without Git LFS."""

from __future__ import annotations

from pathlib import Path

from shards.errors import UserError
from shards.store.urls import in_shell

BEGINS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
LONGEST = 1024  # bytes of a pointer, as its specification says


def refuse_pointer(path: Path) -> None:
    """UserError when a file is a Git LFS pointer and not the file itself; nothing happens when there is none.

    The hint is the command that fetches it, to be pasted into a shell.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(LONGEST + 1)
    except OSError:
        return  # whoever opens it for its content says so
    if len(beginning) <= LONGEST and beginning.lstrip(b"\xef\xbb\xbf").startswith(BEGINS):
        fetch = f"cd {in_shell(path.parent)} && git lfs pull"
        raise UserError(f"{path}: a Git LFS pointer, not the file itself", f"fetch it: {fetch}")
