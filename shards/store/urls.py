"""Runs and models at URLs: where in the local cache the working copy of each lies, and back. Imports no store.

Code outside of this folder uses what names things: `shown`, `in_shell`, `full_path`, `named_here`, `beside`,
`last_name`.
"""

from __future__ import annotations

import os
import posixpath
import re
import shlex
from dataclasses import dataclass
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

_IN_RUN = re.compile(r"(/eval)?/iter-\d{4,}/.*|/[^/]+$")  # what follows the URL of the run in that of one of its files


def run_of(url: str) -> str:
    """The URL of the run that has a file."""
    return _IN_RUN.sub("", url)


def is_url(path: str | Path) -> bool:
    """Whether a path names something in a store; a Path that swallowed one of the two slashes counts."""
    return _URL.fullmatch(str(path)) is not None


def is_stored(text: str) -> bool:
    """Whether a text is a URL of a store that we know; one of the web is not."""
    match = _URL.fullmatch(text)
    return match is not None and match[1] in STORES


@dataclass(frozen=True)
class Cache:
    """The folder of all that is kept of stores on this machine; working copies lie in its folder `stores`."""

    top: Path
    """Without links, because paths into it are compared as text."""

    @classmethod
    def current(cls) -> Cache:
        """RUSHES_CACHE, or ~/.cache/rushes."""
        return cls(Path(os.path.realpath(os.path.expanduser(os.environ.get(CACHE) or "~/.cache/rushes"))))

    @property
    def root(self) -> str:
        """The folder of working copies, one folder in it for each store."""
        return os.path.join(self.top, "stores")

    def working_copy(self, path: str | Path) -> Path:
        """The local folder or file that mirrors a URL; any other path as it is. UserError for an unusable URL."""
        match = _URL.fullmatch(str(path))
        if match is None:
            return Path(path)
        scheme, rest = match[1], match[2].strip("/")
        if scheme not in STORES:
            raise UserError(
                f"{scheme}:// is not a store that rushes knows", "there are s3://, gs:// and hf://, or a folder"
            )
        parts = rest.split("/")
        if not rest or not all(parts) or {".", ".."} & set(parts) or re.search(r"[\x00-\x1f?#]", rest):
            raise UserError(
                f"{scheme}://{match[2]}: not a place in a store", f"for example {scheme}://bucket/runs/first"
            )
        return Path(self.root, _folder(STORES[scheme]), *parts)

    def url_of(self, path: str | Path) -> str | None:
        """The URL that a file of a working copy is published at; None for local files and for what stays here."""
        text, root = str(path), self.root
        if not text.startswith(root + os.sep) or _STAYS.search(text, len(root)):
            return None
        folder, _, rest = text[len(root) + 1 :].partition(os.sep)
        return f"{folder.partition('@')[0]}://{rest}" if rest else None

    def notes_folder(self, path: Path) -> Path:
        """Where notes about the files in a folder of a working copy are kept: no listing of those may find them."""
        return self.top / "notes" / path.relative_to(self.root)

    def shown(self, text: str) -> str:
        """A message with the URLs that people know in place of paths into the cache, but for what is only there."""
        found = re.escape(self.root) + r"/(?P<store>\w+)(@[^/]*)?(?P<rest>/\S*)"
        text = re.sub(
            found, lambda one: one[0] if _STAYS.search(one["rest"]) else f"{one['store']}:/{one['rest']}", text
        )
        return re.sub(r"\b(s3|gs|gcs|hf):/(?=[^/])", r"\1://", text)  # Path("s3://a")


def working_copy(path: str | Path) -> Path:
    """As Cache.working_copy, in the current cache."""
    return Cache.current().working_copy(path)


def url_of(path: str | Path) -> str | None:
    """As Cache.url_of, in the current cache."""
    return Cache.current().url_of(path)


# --- What code outside of this folder calls --------------------------------------------------------------------------


def shown(text: str) -> str:
    """As Cache.shown, in the current cache."""
    return Cache.current().shown(text)


def in_shell(path: str | Path) -> str:
    """A path or URL as a word of a command, to be pasted into a shell."""
    return shlex.quote(shown(str(path)))


def full_path(text: str) -> str:
    """A relative path in full where something of that name is in the current directory; any other text as it is."""
    return os.path.abspath(text) if text and text[0] not in "/~" and not is_url(text) and os.path.exists(text) else text


def named_here(text: str) -> Path | None:
    """The path on this machine that a setting names; None for a URL, which nobody looks up before it is needed."""
    return None if is_url(text) else Path(text).expanduser()


def beside(file: Path, name: str) -> str:
    """Where a file lies that another one names: at a URL, or on this machine; a relative name counts from that file.

    Raises UserError for an unusable URL.
    """
    folder = url_of(file.parent)
    if is_url(name):
        return url_of(working_copy(name)) or name
    if folder is None or name.startswith("/"):
        return str((file.parent / name).resolve())
    scheme, _, rest = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}"


def last_name(path: str) -> str | None:
    """The last part of the name of a folder at a URL or on this machine; None for a hub id."""
    is_path = is_url(path) or Path(path).expanduser().is_dir() or path.startswith((".", "~", "/"))
    return Path(path).expanduser().resolve().name if is_path else None


def _folder(store: str) -> str:
    """One folder a store; servers of one's own are distinguished, because their buckets may have the same names."""
    found = [os.environ[name] for name in ENDPOINTS.get(store, ()) if os.environ.get(name)]
    if not found:
        return store
    return f"{store}@{re.sub(r'[^a-z0-9.:-]', '_', found[0].partition('//')[2].strip('/'))}"
