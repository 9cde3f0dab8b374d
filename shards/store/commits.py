"""What goes to the hub together: the files of a folder in one commit, and the logs that wait for the next one."""

from __future__ import annotations

import os
from pathlib import Path

from shards.store import objects
from shards.store.errors import bucket_of
from shards.store.urls import url_of
from shards.store.versions import Memos

_later: set[Path] = set()  # logs with new lines


def wait(path: Path) -> None:
    """Put a log with the next commit to its repository, with the lines that it has then."""
    _later.add(path)


def commit(folder: Path, url: str, names: list[str]) -> None:
    """Put files of a folder in one commit, and the logs that wait for one; remember which versions they are.

    Raises as store.change does; the logs wait on then.
    """
    repository = bucket_of(url)
    logs = {path for path in list(_later) if (url_of(path) or "").startswith(f"{repository}/")}
    _later.difference_update(logs)  # now, for a line that is added meanwhile waits for the commit after this one
    chosen = {f"{url}/{name}": folder / name for name in sorted(names)}
    chosen |= {url_of(path) or "": path for path in logs if path.is_file()}
    if not chosen:
        return
    found = {name: os.stat(folder / name) for name in names}
    try:
        objects.change(chosen)
    except BaseException:
        _later.update(logs)
        raise
    there, memos = objects.listing(url), Memos(folder)
    for name in names:
        if name in there and there[name].size == found[name].st_size:  # so that it is not fetched back
            memos.note(name, there[name].version, found[name])
    memos.write()
