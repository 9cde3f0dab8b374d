"""What goes to the hub together: the files of a folder in one commit, and the logs that wait for the next one."""

from __future__ import annotations

import os
from pathlib import Path

from shards.store.objects import Objects
from shards.store.urls import Cache
from shards.store.versions import Memos


class Commits:
    """The commits of one working copy."""

    def __init__(self, objects: Objects, cache: Cache) -> None:
        self.objects, self.cache = objects, cache
        self._later: set[Path] = set()  # logs with new lines

    def wait(self, path: Path) -> None:
        """Put a log with the next commit, with the lines that it has then."""
        self._later.add(path)

    def commit(self, folder: Path, url: str, names: list[str]) -> None:
        """Put files of a folder and the logs that wait in one commit; remember which versions they are.

        Raises as Objects.change does; the logs wait on then.
        """
        logs = set(self._later)
        self._later -= logs  # now, for a line that is added meanwhile waits for the commit after this one
        chosen = {f"{url}/{name}": folder / name for name in sorted(names)}
        chosen |= {self.cache.url_of(path) or "": path for path in logs if path.is_file()}
        if not chosen:
            return
        found = {name: os.stat(folder / name) for name in names}
        try:
            self.objects.change(chosen)
        except BaseException:
            self._later |= logs
            raise
        there, memos = self.objects.listing(url), Memos(folder, self.cache)
        for name in names:
            if name in there and there[name].size == found[name].st_size:  # so that it is not fetched back
                memos.note(name, there[name].version, found[name])
        memos.write()
