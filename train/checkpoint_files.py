"""The files of a trainer checkpoint: every rank writes its own, and the first one names the whole when all are there.

torch.distributed.checkpoint calls these methods in its two rounds. In the first, the first rank makes a folder under
another name; in the second all write into it, and when all have written and synced, the first rank adds `commit.json`
and renames the folder. A rank that fails in either round makes all fail, and the name is never given.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import struct
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shards.files import Files, sha256_file, sync
from shards.records.opening import refuse_escape
from shards.records.reading import sealed
from shards.run import COMMIT
from shards.tensors import header_in_order

FILE_BYTES = 2**31  # torch holds the bytes of one file in memory beside the tensors while it writes it
_NAME = re.compile(r"^update-(\d{6})$")


@dataclass(frozen=True)
class Written:
    """What the first rank must know of a file to check it in."""

    name: str
    size: int
    sha256: str


class Writer(HuggingFaceStorageWriter):
    """Writes one checkpoint as safetensors files under the name `final`, whole or not at all."""

    def __init__(self, final: Path, update: int, keep: int, files: Files) -> None:
        super().__init__(str(final), save_distributed=True)
        self.final, self.update, self.keep, self.files = final, update, keep, files
        self.per_thread_copy_ahead = 0  # no CUDA stream: all is on the host, and a new thread would open the first GPU
        self.folder: Path | None = None  # on the first rank: the folder while it has its private name

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing: the folder is made once, for all."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first rank: make the folder and tell every rank its name and how tensors go into files."""
        refuse_escape(self.final)
        self.final.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.final.parent)
        self.folder = self.final.parent / f".writing-{uuid.uuid4().hex}"
        self.folder.mkdir()
        return [
            replace(plan, storage_data={
                "folder": str(self.folder), "shard_index": number, "fqn_to_index_mapping": _files(plan.items),
            })
            for number, plan in enumerate(plans, start=1)
        ]  # fmt: skip

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """On every rank: write, sync and hash its files. Raises OSError when the disk is full or broken."""
        self.path = Path(plan.storage_data["folder"])
        results: list[WriteResult] = super().write_data(plan, planner).wait()
        names = sorted({result.storage_data.relative_path for result in results})
        for name in names:
            put_header_in_order(self.path / name)
        files = {
            name: Written(name, (self.path / name).stat().st_size, sha256_file(self.path / name)) for name in names
        }
        future: Future[list[WriteResult]] = Future()
        future.set_result([replace(one, storage_data=files[one.storage_data.relative_path]) for one in results])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, when all have written: commit, give the folder its name, drop the oldest checkpoints."""
        assert self.folder is not None
        files = {one.storage_data.name: one.storage_data for part in results for one in part}
        record = {
            "schema": 1,
            "update": self.update,
            "ranks": len(results),
            "files": {name: files[name].size for name in sorted(files)},
            "sha256": {name: files[name].sha256 for name in sorted(files)},
            "tensors": {
                name.partition(".")[2]: list(one.size)
                for name, one in sorted(metadata.state_dict_metadata.items())
                if isinstance(one, TensorStorageMetadata)
            },
        }
        (self.folder / COMMIT).write_bytes(sealed(record, self.final))
        sync(self.folder / COMMIT)
        sync(self.folder)
        shutil.rmtree(self.final, ignore_errors=True)  # if it is there, then damaged
        os.rename(self.folder, self.final)
        sync(self.final.parent)
        self.files.put_folder(self.final, last=COMMIT)
        kept = found(self.final.parent)[-self.keep :]
        for _, old in found(self.final.parent)[: -self.keep]:
            (old / COMMIT).unlink(missing_ok=True)  # first: without it, nobody takes what is left for damaged
            shutil.rmtree(old, ignore_errors=True)
        self.files.remove(self.final.parent, keep=[path.name for _, path in kept])

    def discard(self) -> None:
        """Remove what a failed write left."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def found(directory: Path) -> list[tuple[int, Path]]:
    """Updates and folders of the checkpoints in a directory, oldest first."""
    names = [(match, path) for path in directory.glob("update-*") if (match := _NAME.match(path.name))]
    return sorted((int(match[1]), path) for match, path in names)


def put_header_in_order(path: Path) -> None:
    """Sort the header of a safetensors file, in place, and sync it, so that equal states have equal bytes."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        text = file.read(size)
        ordered = header_in_order(text).ljust(size)
        if len(ordered) == size and ordered != text:
            file.seek(8)
            file.write(ordered)
            file.flush()
            os.fsync(file.fileno())


def remove_leftovers(directory: Path) -> None:
    """Remove checkpoints that a killed process left half written."""
    for path in directory.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def _files(items: Iterable[WriteItem]) -> dict[str, int]:
    """File number (from 1) of each tensor of one rank; a file holds FILE_BYTES, or one tensor that is larger."""
    numbers: dict[str, int] = {}
    number, size = 1, 0
    for item in items:
        assert item.tensor_data is not None
        more = math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if size and size + more > FILE_BYTES:
            number, size = number + 1, 0
        numbers[item.index.fqn] = number
        size += more
    return numbers
