"""Which version in the store each file of a working copy is, so that nothing is fetched twice."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from shards.files import aside
from shards.locks import sweep_temporary
from shards.store.urls import Cache

MEMO = "versions.json"  # of every folder: the version in the store that each file here is, and its size and time here


class Memos:
    """The memos of the folders under one folder of a working copy. A lost one costs a comparison, or a transfer."""

    def __init__(self, folder: Path, cache: Cache) -> None:
        self.folder, self.cache = folder, cache
        self._read: dict[str, dict[str, list[str | int]]] = {}
        self._new: dict[str, dict[str, list[str | int]]] = {}

    def of(self, name: str) -> list[str | int] | None:
        """[version, bytes, time of the local file] of a file when it was fetched or found the same."""
        folder, _, file = name.rpartition("/")
        return self._of_folder(folder).get(file)

    def note(self, name: str, version: str, found: os.stat_result) -> None:
        """Remember that a file with this size and time is that version. Both must have been taken before it got its
        name, or before it was compared: by now another process may have put another file in its place."""
        folder, _, file = name.rpartition("/")
        self._new.setdefault(folder, {})[file] = [version, found.st_size, found.st_mtime_ns]

    def write(self) -> None:
        """Keep what was noted."""
        for folder, files in self._new.items():
            before = self._of_folder(folder)
            if (after := before | files) != before:
                self._write(folder, after)
        self._new.clear()

    def _of_folder(self, folder: str) -> dict[str, list[str | int]]:
        if folder not in self._read:
            self._read[folder] = {}
            with suppress(OSError, ValueError):
                self._read[folder] = json.loads((self.cache.notes_folder(self.folder / folder) / MEMO).read_bytes())
        return self._read[folder]

    def _write(self, folder: str, files: dict[str, list[str | int]]) -> None:
        path = self.cache.notes_folder(self.folder / folder) / MEMO
        with aside(path) as (temporary, _):
            temporary.write_text(json.dumps(files), encoding="utf-8")
            os.replace(temporary, path)
        sweep_temporary(path.parent)
