"""Reading shards: any sample, any state by one positioned read, every byte checked before it is used."""

from __future__ import annotations

import hashlib
import os
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from shards import index, parquet, tensors
from shards.committed_tar import open_source, open_tar
from shards.errors import REPAIR, Damaged, UserError
from shards.plan import RolloutPlan
from shards.records.kinds import Manifest, read_manifest_file
from shards.records.opening import read_plain
from shards.records.reading import short
from shards.run import Stage
from shards.tar import EXTENSIONS, SAMPLE_NAME, group_name, header

if TYPE_CHECKING:
    import pandas
    import pyarrow
    import torch
    import webdataset

    from shards.index import Row
    from shards.records.samples import SampleValues

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


def open_shard(stage: Stage, shard: int) -> Shard:
    """A committed shard. Raises UserError when there is no manifest and Damaged when the files do not belong together.

    Checked here: manifest, size of the tar, sha256 of the index. Tensors are checked by crc32 when they are read; the
    sha256 of the whole tar is what `rushes verify` computes.
    """
    return Shard(stage, shard)


class Shard:
    """One committed shard, open for random access. Reads are positioned, so threads may share it."""

    def __init__(self, stage: Stage, shard: int) -> None:
        self.stage, self.number, self.path = stage, shard, stage.shard_path(shard)
        self.manifest = read_manifest(stage, shard)
        self._table = checked_index(stage, shard, self.manifest)
        rows = self._table.to_pylist()
        index.check_rows(rows, self.manifest.tar.bytes, str(stage.index_path(shard)))
        self._rows = {row["key"]: row for row in rows}
        self._source = open_source(stage, shard, self.manifest)
        self._close = weakref.finalize(self, self._source.close)
        self._last_group: tuple[str, dict[str, torch.Tensor]] | None = None  # set at once, as threads share a shard

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; reading afterwards is an error."""
        self._close()

    @cached_property
    def keys(self) -> list[str]:
        """Sample keys in the order of the tar."""
        return list(self._rows)

    @cached_property
    def groups(self) -> list[str]:
        """Group keys in the order of the tar."""
        return list(dict.fromkeys(row["group"] for row in self._rows.values()))

    @cached_property
    def index(self) -> pandas.DataFrame:
        """The index as a table, one row per sample; README.md describes the columns."""
        return self._table.to_pandas()

    def row(self, key: str) -> Row:
        """The index row of a sample. Raises UserError when the shard has no such sample."""
        if key not in self._rows:
            raise UserError(f"{self.path} has no sample {key!r}", "`rushes inspect` lists the keys")
        return self._rows[key]

    def meta(self, key: str) -> SampleValues:
        """The record of a sample. Raises Damaged."""
        payload = self._member(f"{key}.json", self.row(key), "json")
        return index.parse_meta(memoryview(payload), key, f"{self.path}: {key}.json")

    def video(self, key: str) -> bytes:
        """The mp4 file of a sample. Raises Damaged."""
        return bytes(self._member(f"{key}.mp4", self.row(key), "mp4"))

    def trajectory(self, key: str) -> dict[str, torch.Tensor]:
        """All tensors of a sample: latents [M, C, F, H, W] and what README.md lists beside them. Raises Damaged."""
        return self._again(self._trajectory, key)

    def tensor(self, key: str, name: str) -> torch.Tensor:
        """One tensor of the trajectory of a sample, read by position and checked; the others are not read.

        Raises UserError when the sample has none of that name, and Damaged.
        """
        return self._again(self._tensor, key, name)

    def group(self, group: str) -> dict[str, torch.Tensor]:
        """Tensors shared by a group: prompt [L, D], negative [Ln, D], …. Raises UserError or Damaged.

        Those of the last group are kept, because all batches of a group ask for them: nobody may change them.
        """
        kept = self._last_group
        if kept is None or kept[0] != group:
            kept = self._last_group = group, self._group(group)
        return kept[1]

    def _group(self, group: str) -> dict[str, torch.Tensor]:
        rows = [row for row in self._rows.values() if row["group"] == group]
        if not rows:
            raise UserError(f"{self.path} has no group {group!r}", f"its groups are {', '.join(self.groups)}")
        payload = self._member(group_name(group), rows[0], "text")
        return tensors.decode(payload, f"{self.path}: {group_name(group)}")

    def latents(self, key: str, states: Sequence[int], out: torch.Tensor | None = None) -> torch.Tensor:
        """Stored latents of the given states [len(states), C, F, H, W], read by position into `out` when given.

        A state is a step number: state i is what step i starts from. Neighbours are one read. Raises UserError for a
        state that was not stored and Damaged when a checksum differs.
        """
        return self._again(self._latents, key, states, out)

    def _trajectory(self, key: str) -> dict[str, torch.Tensor]:
        row, name = self.row(key), f"{key}.traj.safetensors"
        payload = self._read(name, row["traj_offset"], row["traj_bytes"])
        self._check(name, memoryview(payload)[: row["traj_header_bytes"]], row["traj_header_crc32"])
        return tensors.decode(payload, f"{self.path}: {name}")

    def _tensor(self, key: str, name: str) -> torch.Tensor:
        row, member = self.row(key), f"{key}.traj.safetensors"
        head = memoryview(self._read(member, row["traj_offset"], row["traj_header_bytes"], row["traj_bytes"]))
        self._check(member, head, row["traj_header_crc32"])
        where = f"{self.path}: {member}"
        entries, _ = tensors.parse(head, where, row["traj_bytes"])
        if name not in entries:
            raise UserError(f"{where} has no tensor {name!r}", f"it has {', '.join(sorted(entries))}")
        entry = entries[name]
        size = entry.stop - entry.start
        piece = memoryview(bytearray(size))
        self._source.fill(piece, row["traj_offset"] + entry.start, size, key)
        alone = entry._replace(start=0, stop=size)
        tensors.check(piece, {name: alone}, where)
        return tensors.as_tensor(piece, alone)

    def _latents(self, key: str, states: Sequence[int], out: torch.Tensor | None) -> torch.Tensor:
        import torch

        row = self.row(key)
        slots = self._slots(row, states)
        shape = [len(slots), *row["latent_shape"]]
        dtype = tensors.torch_dtype(tensors.NAMES[row["latent_dtype"]])
        if out is None:
            out = torch.empty(shape, dtype=dtype)
        assert list(out.shape) == shape, f"out has shape {list(out.shape)}, needed is {shape}"
        assert out.dtype == dtype, f"out has {out.dtype}, stored is {dtype}"
        assert out.is_contiguous()
        assert out.device.type == "cpu"
        memory = out.reshape(-1).view(torch.uint8).numpy().data
        size = row["latent_bytes"]
        for first, count in _spans(slots):
            piece = memory[first * size : (first + count) * size]
            self._source.fill(piece, row["latents_offset"] + slots[first] * size, size, key)
        for position, slot in enumerate(slots):
            piece = memory[position * size : (position + 1) * size]
            self._check(f"{key}.traj.safetensors, state {states[position]}", piece, row["latent_crc32"][slot])
        return out

    def _slots(self, row: Row, states: Sequence[int]) -> list[int]:
        missing = [state for state in states if state not in row["states"]]
        if missing:
            raise UserError(f"{self.path}: {row['key']} has no state {missing}", f"stored are {row['states']}")
        return [row["states"].index(state) for state in states]

    def _member(self, name: str, row: Row, column: str) -> bytearray:
        return self._again(self._checked, name, row, column)

    def _checked(self, name: str, row: Row, column: str) -> bytearray:
        payload = self._read(name, row[f"{column}_offset"], row[f"{column}_bytes"])
        self._check(name, memoryview(payload), row[f"{column}_crc32"])
        return payload

    def _read(self, name: str, offset: int, size: int, whole: int | None = None) -> bytearray:
        """The first `size` bytes of a member, which has `whole` or no more, and whose tar header, just before it, must
        be the one we write."""
        found, payload = self._source.member(name, offset, size)
        if found != header(name, size if whole is None else whole):
            raise Damaged(f"{self.path}: the tar header of {name} is not where the index says", REPAIR)
        return payload

    def _again(self, read: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Read; what came damaged over a wire or lay damaged in the cache is forgotten and asked for once more."""
        try:
            return read(*arguments)
        except Damaged:
            if not self._source.forget():
                raise
            return read(*arguments)

    def _check(self, name: str, payload: memoryview, crc32: int) -> None:
        if zlib.crc32(payload) != crc32:
            raise Damaged(f"{self.path}: {name} is damaged (crc32)", REPAIR)


def read_manifest(stage: Stage, shard: int) -> Manifest:
    """The commit record of a shard. Raises UserError when there is none, Damaged when it is not one of this shard."""
    path = stage.manifest_path(shard)
    if not stage.is_committed(shard):
        raise UserError(f"shard {shard} of {stage.path} is not there", "`rushes rollout` samples what is missing")
    try:
        manifest = read_manifest_file(path)
    except UserError as error:
        raise Damaged(error.problem, REPAIR) from error
    if (manifest.stage, manifest.shard) != (stage.name, shard):
        raise Damaged(f"{path}: this is the record of shard {manifest.shard} of {short(manifest.stage)}", REPAIR)
    return manifest


def checked_index(stage: Stage, shard: int, manifest: Manifest) -> pyarrow.Table:
    """The index of a shard. Raises Damaged unless it is the one that `manifest` committed."""
    path = stage.index_path(shard)
    try:
        data = read_plain(path, parquet.MOST_BYTES, REPAIR)
    except FileNotFoundError as error:
        raise Damaged(f"{path}: the index cannot be read: {error.strerror}", REPAIR) from error
    if hashlib.sha256(data).hexdigest() != manifest.index.sha256:
        raise Damaged(f"{path}: the index is not the one that was committed (sha256)", REPAIR)
    table, kv = index.read(path, data, rows=manifest.samples)
    if kv.get("shard_sha256") != manifest.tar.sha256:
        raise Damaged(f"{path}: the index belongs to another tar", REPAIR)
    return table


def webdataset_pipeline(stage: Stage, shards: Sequence[int] | None = None) -> webdataset.DataPipeline:
    """A stock WebDataset pipeline over committed shards, in order: one dict per sample.

    Keys: `__key__`, `json` (dict), `mp4` (uint8 frames [T, H, W, 3]), `traj.safetensors` (dict of tensors). The files
    are opened here and not by name through webdataset, so that no URL scheme and no shell is ever reached, and the
    values are decoded here and not by `.decode()`, so that nothing is ever unpickled: a member of any other type is an
    error. Raises Damaged for a damaged shard or member, and UserError where webdataset is not installed.
    """
    try:
        import webdataset
    except ImportError:
        hint = "pip install webdataset; the other readers of shards do not need it"
        raise UserError("a WebDataset pipeline needs the package webdataset, which is not installed", hint) from None

    numbers = stage.shards() if shards is None else shards
    return webdataset.DataPipeline(
        partial(_open_tars, stage, numbers),
        webdataset.tariterators.tar_file_expander,
        webdataset.tariterators.group_by_keys,
        webdataset.map(partial(decode_sample, plan=stage.plan())),
    )


def decode_sample(sample: dict[str, Any], plan: RolloutPlan | None = None) -> dict[str, object]:
    """Decode the raw members of one WebDataset sample of a shard. Raises Damaged."""
    from shards.video import decode_mp4

    key, where = sample["__key__"], f"{sample.get('__url__', 'shard')}: {sample['__key__']}"
    found = tuple(name for name in sample if not name.startswith("__"))
    if found != EXTENSIONS or not SAMPLE_NAME.fullmatch(f"{key}.json"):
        raise Damaged(f"{where}: has members {', '.join(found)} instead of {', '.join(EXTENSIONS)}", REPAIR)
    return {
        "__key__": key,
        "json": index.parse_meta(memoryview(sample["json"]), key, where),
        "mp4": decode_mp4(sample["mp4"], where, plan.video if plan else None),
        "traj.safetensors": tensors.decode(bytearray(sample["traj.safetensors"]), where),
    }


def _open_tars(stage: Stage, shards: Sequence[int]) -> Iterator[dict[str, object]]:
    for shard in shards:
        stage.files.look(stage.shard_path(shard))
        with os.fdopen(open_tar(stage, shard, read_manifest(stage, shard)), "rb") as stream:
            yield {"url": str(stage.shard_path(shard)), "stream": stream}


def _spans(slots: list[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive slots as (first position, length)."""
    first = 0
    for position in range(1, len(slots) + 1):
        if position == len(slots) or slots[position] != slots[position - 1] + 1:
            yield first, position - first
            first = position
