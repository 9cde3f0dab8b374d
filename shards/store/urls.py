"""Runs and models at URLs: where in the local cache the working copy of each lies, and back. Imports no store."""

from __future__ import annotations

import os
import re
import shlex
from functools import cache
from pathlib import Path

from shards.errors import UserError

STORES = {"s3": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}  # scheme -> the name we know it by
CACHE = "RUSHES_CACHE"
ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL"),
    "hf": ("HF_ENDPOINT",),
}
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)  # Path("s3://a/b") is "s3:/a/b"
# this machine's own: the spool and its claims, frames of a sample that was looked at, what is written aside
_STAYS = re.compile(r"/iter-\d{4,}/work(/|$)|/frames/(eval/)?i\d{6}-p\d{6}-s\d{2,3}/|/\.")


def is_url(path: str | Path) -> bool:
    """Whether a path names something in a store; a Path that swallowed one of the two slashes counts."""
    return _URL.fullmatch(str(path)) is not None


def is_stored(text: str) -> bool:
    """Whether a text is a URL of a store that we know; one of the web is not."""
    match = _URL.fullmatch(text)
    return match is not None and match[1] in STORES


def working_copy(path: str | Path) -> Path:
    """The local folder or file that mirrors a URL; any other path as it is. Raises UserError for an unusable URL."""
    match = _URL.fullmatch(str(path))
    if match is None:
        return Path(path)
    scheme, rest = match[1], match[2].strip("/")
    if scheme not in STORES:
        raise UserError(f"{scheme}:// is no store that rushes knows", "there are s3://, gs:// and hf://, or a folder")
    parts = rest.split("/")
    if not rest or not all(parts) or {".", ".."} & set(parts) or re.search(r"[\x00-\x1f?#]", rest):
        raise UserError(f"{scheme}://{match[2]}: not a place in a store", f"for example {scheme}://bucket/runs/first")
    return Path(_root(), _folder(STORES[scheme]), *parts)


def url_of(path: str | Path) -> str | None:
    """The URL that a file of a working copy is published at; None for local files and for what stays here."""
    text, root = str(path), _root()
    if not text.startswith(root + os.sep) or _STAYS.search(text, len(root)):
        return None
    folder, _, rest = text[len(root) + 1 :].partition(os.sep)
    return f"{folder.partition('@')[0]}://{rest}" if rest else None


def shown(text: str) -> str:
    """A message with the URLs that people know in place of paths into the cache, but for what is only there."""
    found = re.escape(_root()) + r"/(?P<store>\w+)(@[^/]*)?(?P<rest>/\S*)"
    text = re.sub(found, lambda one: one[0] if _STAYS.search(one["rest"]) else f"{one['store']}:/{one['rest']}", text)
    return re.sub(r"\b(s3|gs|gcs|hf):/(?=[^/])", r"\1://", text)  # Path("s3://a")


def in_shell(path: str | Path) -> str:
    """A path or URL as a word of a command, to be pasted into a shell."""
    return shlex.quote(shown(str(path)))


def cache_folder() -> Path:
    """Where working copies and pieces of tars lie: RUSHES_CACHE, or ~/.cache/rushes."""
    return Path(_root()).parent


def notes_folder(path: Path) -> Path:
    """Where notes about the files in a folder of a working copy are kept: no listing of those may find them."""
    return cache_folder() / "notes" / path.relative_to(_root())


def _root() -> str:
    return _resolved(os.environ.get(CACHE) or "~/.cache/rushes")


@cache
def _resolved(cache_folder: str) -> str:
    """Without links, because paths into it are compared as text."""
    return os.path.join(os.path.realpath(os.path.expanduser(cache_folder)), "stores")


def _folder(store: str) -> str:
    """One folder a store; servers of one's own are told apart, for their buckets may have the same names."""
    found = [os.environ[name] for name in ENDPOINTS.get(store, ()) if os.environ.get(name)]
    if not found:
        return store
    return f"{store}@{re.sub(r'[^a-z0-9.:-]', '_', found[0].partition('//')[2].strip('/'))}"
