"""Digests of the files an option names: the same model in another folder is the same judge, another model is not."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from shards.errors import UserError

WHOLE = 2 * 2**30  # bytes; larger files are hashed in samples, since a checkpoint may take a minute to read
BLOCK, BLOCKS = 2**20, 256


def digest(root: str | Path, files: Iterable[str | Path]) -> str:
    """sha256, in hexadecimal, over name (relative to `root`) and content of every file. Raises UserError."""
    found = hashlib.sha256()
    for path in sorted(map(Path, files)):
        try:
            status = path.stat()
            content = _content(path, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}", "scores are kept by its content") from None
        name = path.relative_to(root) if path.is_relative_to(root) else path.name
        found.update(f"{name} {content}\n".encode())
    return found.hexdigest()


def digest_folder(folder: str | Path, suffixes: Iterable[str]) -> str:
    """As `digest`, over the files right in `folder` whose names end so. Raises UserError for a folder without any."""
    place, endings = Path(folder), tuple(suffixes)
    files = [path for path in place.iterdir() if path.name.endswith(endings)] if place.is_dir() else []
    if not files:
        raise UserError(f"{place}: no folder with files that end in {', '.join(endings)}", "give the folder of a model")
    return digest(place, files)


@functools.lru_cache(maxsize=256)
def _content(path: Path, size: int, _modified: int) -> str:
    """sha256 of a file, or for one above WHOLE bytes of its size and BLOCKS blocks spread over it, both ends included.

    Remembered as long as size and time of change stay the same.
    """
    with path.open("rb") as file:
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sampled = hashlib.sha256(str(size).encode())
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            sampled.update(file.read(BLOCK))
        return sampled.hexdigest()
