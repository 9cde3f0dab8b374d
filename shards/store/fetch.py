"""What a setting names at a URL: the local copy of it, fetched now."""

from __future__ import annotations

from pathlib import Path

from shards.errors import UserError
from shards.files import Wanted, every
from shards.store.files import files_at
from shards.store.urls import is_stored, is_url, shown, url_of


def fetched_file(path: str | Path) -> Path:
    """The local copy of one file at a URL as the store has it now, nothing where it has none; any other path as it is.

    Raises UserError for a name that is kept for files of our own, and as Files.
    """
    if not is_url(path):
        return Path(path)
    files, here = files_at(path)
    if url_of(here) is None:
        raise UserError(f"{path}: no name in a store begins with a dot here", "give the file another name")
    files.agree(here)
    return here


def fetched(text: str | Path, wanted: Wanted = every) -> Path | None:
    """The local copy of the file at a URL, or of the wanted files of the folder there, nothing where the store has
    neither; None for what is not a URL. Raises as `fetched_file`."""
    if not is_url(text):
        return None
    here = fetched_file(text)
    if not here.is_file():
        files_at(here)[0].fetch(here, wanted)
    return here


def fetched_model(path: str, wanted: Wanted = every) -> Path | None:
    """The local copy of those files of a model folder at a URL that are wanted; None for what is not a URL.

    Raises UserError when there is nothing, and as Files.
    """
    if not is_url(path):
        return None
    files, here = files_at(path)
    files.fetch(here, wanted)
    found = (one for one in here.rglob("*") if one.is_file() and not one.name.startswith("."))
    if not any(wanted(one.relative_to(here).as_posix()) for one in found):
        raise UserError(f"{shown(str(here))}: no such model folder", "model.path names a folder in WanPipeline layout")
    return here


def local_name(text: str) -> str:
    """The local copy of the file or folder that a URL of a store names; any other text, as of the web, as it is."""
    return str(fetched(text)) if is_stored(text) else text
