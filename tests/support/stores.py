"""Stores as the tests reach them: by the plain client, as other programs would, and by files that look at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec

from shards.files import Files
from shards.store.files import MirroredFiles, files_at
from shards.store.objects import Objects
from shards.store.urls import Cache


def client(url: str) -> Any:
    """fsspec's own file system for a URL; it takes whole URLs."""
    return fsspec.filesystem(url.partition("://")[0], skip_instance_cache=True, use_listings_cache=False)


def forget_clients(*schemes: str) -> None:
    """Let the next look at a store make a new connection, because what leads to it in the environment has changed."""
    for scheme in schemes or ("s3",):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


def files_of(path: str | Path) -> Files:
    """The files of what lies at a path or URL, as a process that has just begun has them."""
    return files_at(path)[0]


def eager_files(scheme: str = "s3", objects: Objects | None = None) -> MirroredFiles:
    """Files in a store that look at it whenever they are asked, not once a second."""
    return MirroredFiles(objects or Objects(scheme), Cache.current(), look_again=0.0)


def pull(url: str) -> None:
    """Bring the working copy of a run up to date."""
    files, path = files_at(url)
    files.pull(path)


def publish_new(path: str | Path, data: bytes) -> bool:
    """Publish a file of a run at a path or URL, unless it is there."""
    files, here = files_at(path)
    return files.publish_new(here, data)


def publish_replace(path: str | Path, data: bytes) -> None:
    """Publish a file of a run at a path or URL in place of what is there."""
    files, here = files_at(path)
    files.publish_replace(here, data)
