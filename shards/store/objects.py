"""Objects in a store (s3://, gs://, hf://) through fsspec: put, get, list, read a range; patience, and plain errors."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shards.errors import RunFailed, UserError
from shards.store.errors import WAITS, Missing, Short, Taken, bucket_of, passes, plain, status_of, wait_of

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from shards.store.hub import Hub

T = TypeVar("T")

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
PAUSES = (0.3, 1.0, 3.0)  # s, after the store's own client has given up
RETRIES = {"mode": "standard", "total_max_attempts": 5}  # of botocore: throttling, 5xx, timeouts, lost connections
TIMEOUTS = {"connect_timeout": 10, "read_timeout": 60}  # s; a read counts from one byte to the next
PROBE = ".rushes-probe"


@dataclass(frozen=True)
class Entry:
    """An object as a listing shows it."""

    size: int
    version: str
    """Changes whenever the content does."""
    checksum: str | None
    """Of the content, as `checksum` writes it, where the store seems to tell one; S3 does for what was put in one piece
    and not encrypted, the hub always."""
    modified: float | None = None
    """When it was written, in seconds since 1970 on the clock of the store; None where that is not told."""


class Objects:
    """The objects of one store, named by their URLs; threads and forked processes may share it.

    It remembers what the store was found to be like: whether it honours conditional puts, and which buckets
    have tags that are not md5 sums.
    """

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self._clients: dict[int, AbstractFileSystem] = {}  # one a process, for its connections do not survive a fork
        self._untold: set[str] = set()  # buckets whose tags look like an md5 and are none, because a key encrypts them
        self._first: dict[str, bool] = {}  # by run: whether the store honours a conditional put

    def __getstate__(self) -> dict[str, object]:
        """What another process may take over: a connection is none of it."""
        return {**vars(self), "_clients": {}}

    @property
    def in_commits(self) -> bool:
        """Whether every change is a commit to a repository: slow, counted, and kept for ever in its history.

        What can go together should, and what only says that somebody lives should not go there.
        """
        return self.scheme == "hf"

    def put(self, local: Path, url: str) -> None:
        """Put a file under `url`, whole or not at all; the last writer wins. Raises as `get`."""
        store = self._client()
        _patiently(url, lambda: store.put_file(str(local), _key(url)))

    def put_new(self, local: Path, url: str, run_url: str) -> bool:
        """Put a file under `url` unless something is there; False when somebody was first.

        One conditional put where the store has it, on the hub one commit on top of that which lacked the name. Where
        there is neither (a probe below `run_url` tells), the name is looked up first: two writers within the time of
        one put may then both believe that they won, and the last one's bytes stay.
        Raises as `get`.
        """
        store = self._client()
        if not self._keeps_the_first(run_url):
            if self.head(url) is not None:
                return False
            self.put(local, url)
            return True
        try:
            _patiently(url, lambda: store.put_file(str(local), _key(url), mode="create"))
        except Taken:
            return False
        return True

    def get(self, url: str, local: Path, entry: Entry) -> Entry:
        """Fetch an object into a file, its size and, where it is known, its checksum verified.

        Returns the entry of what was fetched: another one than `entry` where the object was replaced since it was
        listed. Raises UserError for missing credentials, no access, no such object; RunFailed when the store gives no
        good answer after all retries.
        """
        store, refused = self._client(), set[str | None]()

        def fetch() -> Entry:
            nonlocal entry
            store.get_file(_key(url), str(local))
            size = local.stat().st_size
            told = entry.checksum
            found = checksum(local, told) if told and bucket_of(url) not in self._untold else told
            if (size, found) == (entry.size, told):
                return entry
            now = self.head(url)
            if now is not None and now.version != entry.version:
                entry = now
                refused.clear()
                raise Short("the object was replaced while it was fetched")
            if size != entry.size:
                raise Short(f"{size} bytes arrived of {entry.size}")
            if found not in refused:
                refused.add(found)
                raise Short("the content is not that of its checksum")
            self._untold.add(bucket_of(url))  # the same twice: no damage, but a tag that is not an md5
            return entry

        return _patiently(url, fetch)

    def read(self, url: str, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop` of an object, in one ranged request. Raises as `get`."""
        store = self._client()

        def fetch() -> bytes:
            data: bytes = store.cat_file(_key(url), start=start, end=stop)
            if len(data) != stop - start:
                raise Short(f"{len(data)} bytes arrived of {stop - start}")
            return data

        return _patiently(url, fetch)

    def listing(self, url: str) -> dict[str, Entry]:
        """Everything below `url`, by its name relative to it; empty when there is nothing. Raises as `get`."""
        store, base = self._client(), _key(url) + "/"

        def ask() -> dict[str, dict[str, object]]:
            store.invalidate_cache()
            found: dict[str, dict[str, object]] = store.find(base, detail=True)
            return found

        try:
            found = _patiently(url, ask)
        except Missing:
            return {}
        files = {name: info for name, info in sorted(found.items()) if info.get("type") == "file"}
        return {
            name[len(base) :]: self.entry_of(info)
            for name, info in files.items() if name.startswith(base) and not name.endswith("/")
        }  # fmt: skip

    def head(self, url: str) -> Entry | None:
        """One object, or None when there is none. Raises as `get`."""
        store = self._client()

        def ask() -> dict[str, object]:
            store.invalidate_cache()
            info: dict[str, object] = store.info(_key(url))
            return info

        try:
            info = _patiently(url, ask)
        except Missing:
            return None
        return self.entry_of(info) if info.get("type") == "file" else None

    def change(self, add: Mapping[str, Path], remove: Sequence[str] = ()) -> None:
        """Put files under their URLs and delete objects, all in one commit; for a store that is `in_commits`.

        What is so already is left out. Raises as `get`.
        """
        url = next(iter([*add, *remove]))
        store, files = self._client(), {_key(name): file for name, file in add.items()}
        _patiently(url, lambda: store.change(files, [_key(name) for name in remove]))

    def remove(self, url: str) -> None:
        """Delete an object; nothing happens when it is gone already. Raises as `get`."""
        store = self._client()
        try:
            _patiently(url, lambda: store.rm_file(_key(url)))
        except Missing:
            return

    def entry_of(self, info: Mapping[str, Any]) -> Entry:
        """An object from what its store's file system says of it."""
        tag = str(info.get("ETag") or info.get("etag") or "").strip('"')
        content = f"md5:{tag}" if re.fullmatch(r"[0-9a-f]{32}", tag) else None
        if isinstance(info.get("md5Hash"), str):
            content = f"md5:{base64.b64decode(info['md5Hash']).hex()}"
        if info.get("blob_id"):  # for large files that of a note about them
            content = f"sha256:{info['lfs'].sha256}" if info.get("lfs") else f"git:{info['blob_id']}"
        names = ("generation", "blob_id", "xet_hash", "LastModified", "last_modified", "mtime", "created")
        version = tag or next((str(info[name]) for name in names if info.get(name)), "")
        return Entry(int(info["size"] or 0), version, content, _written(info))

    def _keeps_the_first(self, run_url: str) -> bool:
        """Whether the store honours a conditional put: the same tiny object is put twice, the second must be refused.

        Some S3 servers ignore the condition without a word. Asked once for each run; of the hub it is known.
        """
        if run_url not in self._first:
            self._first[run_url] = self.in_commits or self._probe(f"{run_url}/{PROBE}")
        return self._first[run_url]

    def _probe(self, url: str) -> bool:
        store = self._client()

        def accepted() -> bool:
            try:
                _patiently(url, lambda: store.pipe_file(_key(url), b"conditional put?\n", mode="create"))
            except Taken:
                return False
            return True

        try:
            return not (accepted() and accepted())
        except RunFailed as error:
            if status_of(error) == 501:  # the server says that it does not know the condition
                return False
            raise

    def _client(self) -> AbstractFileSystem:
        process = os.getpid()
        if process not in self._clients:
            self._clients[process] = _open(self.scheme)
        return self._clients[process]


def checksum(file: Path | BufferedReader, like: str) -> str:
    """Checksum of a file, `md5:…`, `sha256:…` or `git:…` (the name that git has for a content), of the kind that `like`
    has; an open file is read from its beginning."""
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            return checksum(opened, like)
    kind = like.partition(":")[0]
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    begin = {
        "md5": lambda: hashlib.md5(usedforsecurity=False),
        "git": lambda: hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False),
        "sha256": hashlib.sha256,
    }[kind]
    return f"{kind}:{hashlib.file_digest(file, begin).hexdigest()}"


def _patiently(url: str, ask: Callable[[], T]) -> T:
    """Ask, and ask again after what passes: throttling, timeouts, lost connections, short and damaged answers."""
    for pause in (*PAUSES, None):
        try:
            return ask()
        except Exception as error:
            told = wait_of(error)
            if not passes(error) or pause is None or told > WAITS:
                raise plain(url, error) from error
            time.sleep(told + pause * random.uniform(0.7, 1.3))  # workers must not come back all at once
    raise AssertionError


def _open(scheme: str) -> AbstractFileSystem:
    """The file system of a scheme. fsspec hands out one for all that ask for the same in a process."""
    import fsspec

    options: dict[str, object] = {"use_listings_cache": False}
    if scheme == "s3":
        own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        defaults = TIMEOUTS if {"AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"} & os.environ.keys() else {
            **TIMEOUTS, "retries": RETRIES
        }  # fmt: skip
        options["config_kwargs"] = {**defaults, **own}
    try:
        store: AbstractFileSystem = _hub() if scheme == "hf" else fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = PACKAGES[scheme]
        old = scheme == "hf" and not isinstance(error, ModuleNotFoundError)  # it lacks a name that we import
        problem = f"{scheme}:// needs the package {package}, which is {'too old' if old else 'not installed'}"
        raise UserError(problem, f"pip install -U {package}") from error
    except Exception as error:
        raise plain(f"{scheme}://", error) from error
    store.retries = 1  # of s3fs: botocore and _patiently repeat enough
    return store


def _hub() -> Hub:
    from shards.store.hub import Hub

    return Hub(use_listings_cache=False, skip_instance_cache=True)


def _key(url: str) -> str:
    """The name of an object as fsspec's file systems take it."""
    return url.partition("://")[2]


def _written(info: Mapping[str, object]) -> float | None:
    """The time of an object in what its store's file system says of it."""
    names = ("LastModified", "mtime", "last_modified", "updated", "created")
    found = next((info[name] for name in names if info.get(name)), getattr(info.get("last_commit"), "date", None))
    with suppress(ValueError):
        found = datetime.fromisoformat(found) if isinstance(found, str) else found
    return found.timestamp() if isinstance(found, datetime) else None
