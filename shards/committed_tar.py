"""Where the bytes of a committed tar come from: the file on this machine, or ranged reads of the object in a store."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from shards import index
from shards.errors import REPAIR, Damaged, RunFailed
from shards.files import Ranges, aside
from shards.records.kinds import Manifest
from shards.records.opening import open_file
from shards.run import Stage
from shards.tar import BLOCK

OPEN = 64  # tars that stay open in a process: it may have 1,024 files, and other things need theirs


class Source(Protocol):
    """Reads by position; threads may share it. What is read is not verified here."""

    def member(self, name: str, offset: int, size: int) -> tuple[bytes, bytearray]:
        """The tar header of a member and its payload, which lies at `offset`. Raises Damaged where the tar is cut."""
        ...

    def fill(self, buffer: memoryview, offset: int, unit: int, name: str) -> None:
        """Fill a buffer from `offset`; it holds pieces of `unit` bytes that will be asked for again one by one."""
        ...

    def forget(self) -> bool:
        """Drop what was kept of the tar; False when nothing is kept, so that asking again would not help."""
        ...

    def close(self) -> None:
        """Release what is open."""
        ...


class LocalTar:
    """A tar on this machine. The OPEN tars that were read last stay open, all others are opened anew to be read.

    Raises Damaged, here and whenever it is opened, as open_tar does.
    """

    def __init__(self, stage: Stage, shard: int, manifest: Manifest) -> None:
        self.path = stage.shard_path(shard)
        self.open = partial(open_tar, stage, shard, manifest)
        self.closed = False
        _files.of(self)

    def member(self, name: str, offset: int, size: int) -> tuple[bytes, bytearray]:
        """As Source."""
        header, payload = bytearray(BLOCK), bytearray(size)
        self.fill(memoryview(header), offset - BLOCK, BLOCK, name)
        self.fill(memoryview(payload), offset, size, name)
        return bytes(header), payload

    def fill(self, buffer: memoryview, offset: int, unit: int, name: str) -> None:
        """As Source."""
        file = _files.of(self)
        while buffer:
            try:
                count = os.preadv(file.handle, [buffer], offset)
            except OSError as error:
                raise RunFailed(f"{self.path}: cannot be read: {error.strerror}", "look at the disk") from error
            if not count:
                raise Damaged(f"{self.path}: cut inside {name}", REPAIR)
            buffer, offset = buffer[count:], offset + count

    def forget(self) -> bool:
        """As Source."""
        return False

    def close(self) -> None:
        """As Source."""
        _files.forget(self)


class _File:
    """An open file, which is closed as soon as nobody holds this any more: neither the list of files nor a reader."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        weakref.finalize(self, os.close, handle)


class _Files:
    """The files that are open, the one that was used last at the end."""

    def __init__(self) -> None:
        self.files: OrderedDict[LocalTar, _File] = OrderedDict()
        # its owner may come a second time: within `of` a shard may be collected as garbage, which closes its tar
        self.guard = threading.RLock()

    def of(self, tar: LocalTar) -> _File:
        """The open file of a tar, to be held as long as it is read. Raises Damaged as open_tar does."""
        with self.guard:
            if tar.closed:
                raise ValueError(f"{tar.path} was closed")
            file = self.files.pop(tar, None) or _File(tar.open())
            self.files[tar] = file
            while len(self.files) > OPEN:
                self.files.popitem(last=False)
        return file

    def forget(self, tar: LocalTar) -> None:
        """Close the file of a tar when its readers are done."""
        with self.guard:
            tar.closed = True
            self.files.pop(tar, None)

    def renew_guard(self) -> None:
        """In a forked process nobody would ever free what another thread held."""
        self.guard = threading.RLock()


_files = _Files()
os.register_at_fork(after_in_child=_files.renew_guard)


class RemoteTar:
    """A tar in a store, read by ranges. Pieces are kept in the cache under the tar's sha256, each in a file of its own;
    whoever reads verifies them by the checksums of the index, so a damaged piece is noticed, forgotten and asked for
    again."""

    def __init__(self, ranges: Ranges, sha256: str) -> None:
        self.read, self.folder = ranges.read, ranges.pieces / sha256

    def member(self, name: str, offset: int, size: int) -> tuple[bytes, bytearray]:
        """As Source; header and payload come in one request."""
        both = bytearray(BLOCK + size)
        self.fill(memoryview(both), offset - BLOCK, len(both), name)
        return bytes(both[:BLOCK]), both[BLOCK:]

    def fill(self, buffer: memoryview, offset: int, unit: int, name: str) -> None:
        """As Source; what is missing comes in one request."""
        pieces = [(offset + at, buffer[at : at + unit]) for at in range(0, len(buffer), unit)]
        missing = [(at, piece) for at, piece in pieces if not self._recall(at, piece)]
        if not missing:
            return
        first, last = missing[0][0], missing[-1][0] + len(missing[-1][1])
        data = self.read(first, last)
        for at, piece in missing:
            piece[:] = data[at - first : at - first + len(piece)]
            self._keep(at, piece)

    def forget(self) -> bool:
        """As Source."""
        with suppress(FileNotFoundError):
            for name in os.listdir(self.folder):
                Path(self.folder, name).unlink(missing_ok=True)
        return True

    def close(self) -> None:
        """As Source."""

    def _path(self, offset: int, size: int) -> Path:
        return self.folder / f"{offset}+{size}"

    def _recall(self, offset: int, piece: memoryview) -> bool:
        with suppress(FileNotFoundError), open(self._path(offset, len(piece)), "rb") as file:
            return file.readinto(piece) == len(piece)
        return False

    def _keep(self, offset: int, piece: memoryview) -> None:
        path = self._path(offset, len(piece))
        with suppress(RunFailed, OSError), aside(path) as (temporary, _):  # a full disk must not stop a reader
            temporary.write_bytes(piece)
            os.replace(temporary, path)


def open_source(stage: Stage, shard: int, manifest: Manifest) -> Source:
    """The tar of a shard, from this machine where it is here. Raises Damaged when it is not what was committed."""
    ranges = stage.files.open_range(stage.shard_path(shard), manifest.tar.bytes)
    return LocalTar(stage, shard, manifest) if ranges is None else RemoteTar(ranges, manifest.tar.sha256)


def open_tar(stage: Stage, shard: int, manifest: Manifest) -> int:
    """File descriptor of a shard's tar. Raises Damaged when it is missing, a link, or not of the committed size."""
    path = stage.shard_path(shard)
    handle = _open_tar_file(path)
    found = os.fstat(handle)
    if found.st_size != manifest.tar.bytes:
        os.close(handle)
        raise Damaged(f"{path}: has {found.st_size} bytes, committed were {manifest.tar.bytes}", REPAIR)
    return handle


def scan_tar(path: Path) -> list[index.Row]:
    """The rows of a tar, all its checksums verified. Raises Damaged."""
    return index.scan(map_plain(path), str(path))


def map_plain(path: Path) -> memoryview:
    """The bytes of a file that is not a link. Raises Damaged."""
    handle = _open_tar_file(path)
    try:
        if not os.fstat(handle).st_size:
            raise Damaged(f"{path}: is empty", REPAIR)
        return memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(handle)


def _open_tar_file(path: Path) -> int:
    """A tar must not be a link, even to another file of the run: it would be one shard under two names."""
    if path.is_symlink():
        raise Damaged(f"{path}: cannot be opened as a plain file: it is a link", REPAIR)
    try:
        return open_file(path, REPAIR)
    except FileNotFoundError as error:
        raise Damaged(f"{path}: cannot be opened as a plain file: {error.strerror}", REPAIR) from error
