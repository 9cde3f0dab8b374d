"""Objects in a store (s3://, gs://, hf://) through fsspec: put, get, list, read a range; patience, and plain errors."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from shards.errors import RunFailed, UserError
from shards.files import FULL

T = TypeVar("T")

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
EXTRAS = {"s3": "s3", "gs": "gs"}  # hf:// comes with what rushes needs anyway
HINTS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws; for a public bucket "
    "FSSPEC_S3='{\"anon\": true}'",
    "gs": "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "`hf auth login`, or HF_TOKEN",
}
PAUSES = (0.3, 1.0, 3.0)  # s, after the store's own client has given up
RETRIES = {"mode": "standard", "total_max_attempts": 5}  # of botocore: throttling, 5xx, timeouts, lost connections
TIMEOUTS = {"connect_timeout": 10, "read_timeout": 60}  # s; a read counts from one byte to the next
PASSING = {errno.EBUSY, errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", -1)}
PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}  # 409: two conditional puts met
PASSING_NAMES = {  # of the clients under fsspec, which are not imported for this
    "ClientConnectionError", "ClientPayloadError", "FlexibleChecksumError", "HTTPClientError", "ChecksumError",
    "IncompleteRead", "ResponseParserError", "RequestError", "TransportError",
}  # fmt: skip
NO_KEYS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "CredentialRetrievalError"}
PROBE = ".rushes-probe"
_untold: set[str] = set()  # buckets whose tags look like an md5 and are none, because a key encrypts them


@dataclass(frozen=True)
class Entry:
    """An object as a listing shows it."""

    size: int
    version: str
    """Changes whenever the content does."""
    md5: str | None
    """Of the content, where the store seems to tell it; S3 does for what was put in one piece and not encrypted."""


class _Missing(UserError):
    """No such object; not an error to those who only look."""


class _Taken(Exception):
    """The name is taken already."""


class _Short(Exception):
    """Fewer or other bytes arrived than the store has."""


def put(local: Path, url: str) -> None:
    """Put a file under `url`, whole or not at all; the last writer wins. Raises as `get`."""
    store = _store(url)
    _patiently(url, lambda: store.put_file(str(local), _key(url)))


def put_new(local: Path, url: str, run_url: str) -> bool:
    """Put a file under `url` unless something is there; False when somebody was first.

    One conditional put where the store has it. Where it has not (a probe below `run_url` tells), the name is looked up
    first: two writers within the time of one put may then both believe that they won, and the last one's bytes stay.
    Raises as `get`.
    """
    store = _store(url)
    if not _keeps_the_first(run_url):
        if head(url) is not None:
            return False
        put(local, url)
        return True
    try:
        _patiently(url, lambda: store.put_file(str(local), _key(url), mode="create"))
    except _Taken:
        return False
    return True


def get(url: str, local: Path, entry: Entry) -> None:
    """Fetch an object into a file, its size and, where it is known, its checksum verified.

    Raises UserError for missing credentials, no access, no such object; RunFailed when the store gives no good answer
    after all retries.
    """
    store, refused = _store(url), set()

    def fetch() -> None:
        store.get_file(_key(url), str(local))
        size = local.stat().st_size
        if size != entry.size:
            raise _Short(f"{size} bytes arrived of {entry.size}")
        found = md5(local) if entry.md5 and _bucket(url) not in _untold else entry.md5
        if found != entry.md5 and found not in refused:
            refused.add(found)
            raise _Short("the content is not that of its md5")
        if found != entry.md5:  # the same twice: no damage, but a tag that is no md5
            _untold.add(_bucket(url))

    _patiently(url, fetch)


def read(url: str, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop` of an object, in one ranged request. Raises as `get`."""
    store = _store(url)

    def fetch() -> bytes:
        data: bytes = store.cat_file(_key(url), start=start, end=stop)
        if len(data) != stop - start:
            raise _Short(f"{len(data)} bytes arrived of {stop - start}")
        return data

    return _patiently(url, fetch)


def listing(url: str) -> dict[str, Entry]:
    """Everything below `url`, by its name relative to it; empty when there is nothing. Raises as `get`."""
    store, base = _store(url), _key(url) + "/"

    def ask() -> dict[str, Any]:
        store.invalidate_cache()
        found: dict[str, Any] = store.find(base, detail=True)
        return found

    try:
        found = _patiently(url, ask)
    except _Missing:
        return {}
    files = {name: info for name, info in found.items() if info.get("type") == "file" and name.startswith(base)}
    return {name[len(base) :]: _entry(info) for name, info in sorted(files.items()) if not name.endswith("/")}


def head(url: str) -> Entry | None:
    """One object, or None when there is none. Raises as `get`."""
    store = _store(url)

    def ask() -> dict[str, Any]:
        store.invalidate_cache()
        info: dict[str, Any] = store.info(_key(url))
        return info

    try:
        info = _patiently(url, ask)
    except _Missing:
        return None
    return _entry(info) if info.get("type") == "file" else None


def md5(path: Path) -> str:
    """Hexadecimal md5 of a file, the checksum that stores know."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def remove(url: str) -> None:
    """Delete an object; nothing happens when it is gone already. Raises as `get`."""
    store = _store(url)
    try:
        _patiently(url, lambda: store.rm_file(_key(url)))
    except _Missing:
        return


def _patiently(url: str, ask: Callable[[], T]) -> T:
    """Ask, and ask again after what passes: throttling, timeouts, lost connections, short and damaged answers."""
    for pause in (*PAUSES, None):
        try:
            return ask()
        except Exception as error:
            if not _passes(error) or pause is None:
                raise _plain(url, error) from error
            time.sleep(pause * random.uniform(0.7, 1.3))  # workers must not come back all at once
    raise AssertionError


def _passes(error: BaseException) -> bool:
    if isinstance(error, _Short | TimeoutError | ConnectionError):
        return True
    if isinstance(error, OSError) and error.errno in PASSING:
        return True
    return any(kind.__name__ in PASSING_NAMES for kind in type(error).__mro__) or _status(error) in PASSING_STATUS


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, from whichever client it came."""
    while error is not None:
        response = getattr(error, "response", None)
        found: Any = getattr(error, "code", None) or getattr(response, "status_code", getattr(error, "status", None))
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if str(found).isdigit():
            return int(found)
        error = error.__cause__
    return None


def _plain(url: str, error: Exception) -> Exception:
    """An error in the words of this program; the first sentence of the client's where it adds something."""
    text = str(error).strip().splitlines()[0].strip() if str(error).strip() else type(error).__name__
    scheme, bucket = url.partition("://")[0], _bucket(url)
    names = {kind.__name__ for kind in type(error).__mro__} | {type(error.__cause__).__name__}
    if isinstance(error, FileExistsError) or _status(error) == 412:
        return _Taken(url)
    if isinstance(error, OSError) and error.errno in FULL:
        return RunFailed(f"{url}: the disk of the local cache is full", "make room, or name another in RUSHES_CACHE")
    if names & NO_KEYS:
        return UserError(f"{url}: no credentials for {scheme}://", f"set {HINTS[scheme]}")
    if "NoSuchBucket" in names or "bucket does not exist" in text:
        return UserError(f"{bucket}: no such bucket", "make it, or correct the URL")
    if isinstance(error, FileNotFoundError):
        return _Missing(f"{url}: no such object", "correct the URL, or run the stage that writes it")
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return UserError(f"{url}: access denied: {text}", f"check the rights of your key on {bucket}, and the key")
    return RunFailed(f"{url}: {text}", "what was published is kept; run the same command again when the store answers")


@cache
def _keeps_the_first(run_url: str) -> bool:
    """Whether the store honours a conditional put: the same tiny object is put twice, the second must be refused.

    Some S3 servers ignore the condition without a word. Asked once a process and run.
    """
    store, url = _store(run_url), f"{run_url}/{PROBE}"

    def accepted() -> bool:
        try:
            _patiently(url, lambda: store.pipe_file(_key(url), b"conditional put?\n", mode="create"))
        except _Taken:
            return False
        return True

    try:
        return not (accepted() and accepted())
    except RunFailed as error:
        if _status(error) == 501:  # the server says that it does not know the condition
            return False
        raise


def _store(url: str) -> Any:
    return _open(url.partition("://")[0], os.getpid())


@cache
def _open(scheme: str, _: int) -> Any:
    """The file system of a scheme; one a process, for its connections do not survive a fork."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        defaults = TIMEOUTS if {"AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"} & os.environ.keys() else {
            **TIMEOUTS, "retries": RETRIES
        }  # fmt: skip
        options["config_kwargs"] = {**defaults, **own}
    try:
        store = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package, extra = PACKAGES[scheme], EXTRAS.get(scheme)
        hint = f"pip install 'rushes[{extra}]'" if extra else f"pip install {package}"
        raise UserError(f"{scheme}:// needs the package {package}, which is not installed", hint) from error
    except Exception as error:
        raise _plain(f"{scheme}://", error) from error
    store.retries = 1  # of s3fs: botocore and _patiently repeat enough
    return store


def _key(url: str) -> str:
    """The name of an object as fsspec's file systems take it."""
    return url.partition("://")[2]


def _entry(info: dict[str, Any]) -> Entry:
    """An object from what its store's file system says of it."""
    tag = str(info.get("ETag") or info.get("etag") or "").strip('"')
    content = tag if re.fullmatch(r"[0-9a-f]{32}", tag) else None
    if isinstance(info.get("md5Hash"), str):
        content = base64.b64decode(info["md5Hash"]).hex()
    names = ("generation", "blob_id", "xet_hash", "LastModified", "last_modified", "mtime", "created")
    version = tag or next((str(info[name]) for name in names if info.get(name)), "")
    return Entry(int(info["size"] or 0), version, content)


def _bucket(url: str) -> str:
    return "/".join(url.split("/")[:3])
