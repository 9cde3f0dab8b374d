"""Writing shards: samples go to a spool one by one, and a full spool is sealed into a shard."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards import index, tensors
from shards.errors import RunFailed, UserError
from shards.files import Buffer, publish_new, sha256_file, sweep_temporary, to_json
from shards.run import GROUP_KEY, SAMPLE_KEY, SCHEMA, Stage
from shards.store.urls import url_of
from shards.tar import END, EXTENSIONS, Damaged, Member, group_name, members, padding, wrap
from shards.tar import header as tar_header

if TYPE_CHECKING:
    import torch

    from shards.tensors import Array

LARGEST_META = 16 * 2**20  # bytes of a sample's record; a prompt of 1 MB fits many times over
HASH_BYTES = 4 * 2**20  # hashed and written while still in the processor's cache
AGAIN = "run `rushes rollout` again; it samples what is missing"


@dataclass(frozen=True)
class Sample:
    """One finished video with all that training and scoring need."""

    key: str
    """i000003-p000017-s05"""
    meta: dict[str, Any]
    """Record of the sample; must hold `schema` and `key`."""
    video: bytes
    """An mp4 file."""
    tensors: Mapping[str, Array]
    """latents [M, C, F, H, W], states int32 [M] (step number of each), and what README.md lists beside them."""


def write_sample(stage: Stage, shard: int, sample: Sample) -> bool:
    """Put a finished sample into the spool. False when it was there already or the shard is committed.

    Raises UserError for a key the plan does not have in this shard, for text that is not Unicode and for a record
    over 16 MiB; RunFailed when the disk is full. The spooled file is a tar of its own.
    """
    if not SAMPLE_KEY.fullmatch(sample.key) or sample.key not in stage.keys(shard):
        raise UserError(
            f"{sample.key!r} is not a sample of shard {shard} of {stage.path}", "plan.json lists its groups"
        )
    if sample.meta.get("key") != sample.key or sample.meta.get("schema") != SCHEMA:
        raise UserError(f"{sample.key}: its record lacks key or schema {SCHEMA}", "")
    meta = to_json(sample.meta, sample.key)
    if len(meta) > LARGEST_META:
        raise UserError(
            f"{sample.key}: its record has {len(meta)} bytes, the limit is {LARGEST_META}", "shorten the prompt"
        )
    _check_states(sample)
    if stage.is_committed(shard):
        return False
    payloads: list[list[Buffer]] = [[meta], [sample.video], tensors.encode(sample.tensors)]
    parts = (wrap(f"{sample.key}.{name}", data) for name, data in zip(EXTENSIONS, payloads, strict=True))
    won = publish_new(_sample_path(stage, shard, sample.key), [*(buffer for part in parts for buffer in part), END])
    with suppress(FileNotFoundError):
        os.unlink(_phase_path(stage, shard, sample.key))
    return won


def write_group(stage: Stage, shard: int, group: str, values: Mapping[str, Array]) -> bool:
    """Put the tensors shared by a group (prompt [L, D], negative [Ln, D], …) into the spool; as write_sample."""
    if not GROUP_KEY.fullmatch(group) or group not in stage.groups(shard):
        raise UserError(f"{group!r} is not a group of shard {shard} of {stage.path}", "plan.json lists its groups")
    return not stage.is_committed(shard) and publish_new(_group_path(stage, shard, group), tensors.encode(values))


def read_group(stage: Stage, shard: int, group: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a group from the spool, or None; a worker that continues uses the same ones. Raises Damaged."""
    path = _group_path(stage, shard, group)
    try:
        return tensors.decode(bytearray(path.read_bytes()), str(path))
    except FileNotFoundError:
        return None


def write_phase(stage: Stage, shard: int, key: str, values: Mapping[str, Array]) -> bool:
    """Keep the state of an unfinished sample after the high-noise phase; as write_sample."""
    if not SAMPLE_KEY.fullmatch(key):
        raise UserError(f"{key!r} is not a sample key", "keys look like i000003-p000017-s05")
    return not stage.is_committed(shard) and publish_new(_phase_path(stage, shard, key), tensors.encode(values))


def read_phase(stage: Stage, shard: int, key: str) -> dict[str, torch.Tensor] | None:
    """The state kept by write_phase, or None. A damaged one is removed: the sample then starts afresh."""
    path = _phase_path(stage, shard, key)
    try:
        return tensors.decode(bytearray(path.read_bytes()), str(path))
    except FileNotFoundError:
        return None
    except Damaged:
        path.unlink(missing_ok=True)
        return None


def spooled(stage: Stage, shard: int) -> set[str]:
    """Keys of the samples that are finished and wait in the spool."""
    with suppress(FileNotFoundError):
        names = (entry.rpartition(".") for entry in os.listdir(stage.work_path(shard)))
        return {key for key, _, extension in names if extension == "tar" and SAMPLE_KEY.fullmatch(key)}
    return set()


def seal(stage: Stage, shard: int, info: dict[str, Any]) -> bool:
    """Assemble the shard from its full spool: tar, index, and last the manifest, which alone makes it exist.

    `info` (versions, host, seconds, …) is kept in the manifest. False when the shard was committed already. The spool
    is swept after the commit and whenever a manifest is found. Killed at any point, the next call does the rest, and
    since names, order and times are fixed, any worker assembles the same bytes from the same spool.
    Raises RunFailed when samples are missing, damaged or of another plan, and when the disk is full.
    """
    for directory in {
        stage.shard_path(shard).parent,
        stage.index_path(shard).parent,
        stage.manifest_path(shard).parent,
    }:
        sweep_temporary(directory)
    if stage.is_committed(shard):
        sweep(stage, shard)
        return False
    try:
        _check_complete(stage, shard)
        assembly = _Assembly(stage, shard)
        _publish_tar(stage, shard, assembly)
    except FileNotFoundError as error:
        if not stage.is_committed(shard):
            raise RunFailed(f"shard {shard} of {stage.path} is not complete: {error}", AGAIN) from error
        sweep(stage, shard)  # another worker committed the shard and swept the spool while we were reading it
        return False
    except Damaged as error:
        raise RunFailed(error.problem, f"delete that file and {AGAIN}") from error
    _publish_index(stage, shard, assembly)
    won = publish_new(stage.manifest_path(shard), to_json(_manifest(stage, shard, assembly, info), stage.path))
    sweep(stage, shard)
    return won


def sweep(stage: Stage, shard: int) -> None:
    """Empty the spool of a committed shard, what slow workers brought late included."""
    assert stage.is_committed(shard)
    work = stage.work_path(shard)
    sweep_temporary(work)
    with suppress(FileNotFoundError):
        for name in os.listdir(work):
            if name.endswith((".tar", ".safetensors")) and not name.startswith("."):
                (work / name).unlink(missing_ok=True)
    with suppress(OSError):  # a slow worker may still write there
        work.rmdir()
        work.parent.rmdir()


@dataclass
class _Assembly:
    """A shard in the making: yields the tar's bytes once and knows hash, size and index rows afterwards."""

    stage: Stage
    shard: int
    rows: list[index.Row] = field(default_factory=list)
    size: int = 0

    def __post_init__(self) -> None:
        plan = self.stage.plan()
        assert plan is not None
        self.plan = plan
        self.plan_sha256 = self.stage.plan_sha256()
        self.digest = hashlib.sha256()

    def chunks(self) -> Iterator[Buffer]:
        """All bytes of the tar in order: samples as the plan lists them, then the tensors of the groups."""
        for key in self.stage.keys(self.shard):
            path = _sample_path(self.stage, self.shard, key)
            buffer = _map(path)
            row = index.sample_row(buffer, list(members(buffer, str(path))), str(path))
            self._check_origin(buffer, row, path)
            self.rows.append(index.shifted(row, self.size))
            yield from self._pass(buffer[: -len(END)])
        for group in self.stage.groups(self.shard):
            path = _group_path(self.stage, self.shard, group)
            buffer = _map(path)
            columns = index.group_columns(buffer, Member(path.name, 0, len(buffer)), str(path))
            yield from self._pass(memoryview(tar_header(group_name(group), len(buffer))))
            for row in self.rows:
                if row["group"] == group:
                    row |= index.shifted(columns, self.size)
            yield from self._pass(buffer)
            yield from self._pass(memoryview(padding(len(buffer))))
        yield from self._pass(memoryview(END))

    def adopt(self, path: Path) -> None:
        """Take a tar that another machine has put to the store in place of ours. Raises Damaged and RunFailed."""
        buffer = _map(path)
        self.rows, self.size = index.scan(buffer, str(path)), len(buffer)
        self.digest = hashlib.sha256(buffer)
        for row in self.rows:
            self._check_origin(buffer, row, path)
        if [row["key"] for row in self.rows] != self.stage.keys(self.shard):
            raise RunFailed(f"{path}: its samples are not those of plan.json", f"delete {path} and {AGAIN}")

    def _pass(self, data: memoryview) -> Iterator[memoryview]:
        for start in range(0, len(data), HASH_BYTES):
            piece = data[start : start + HASH_BYTES]
            self.digest.update(piece)
            self.size += len(piece)
            yield piece

    def _check_origin(self, buffer: memoryview, row: index.Row, path: Path) -> None:
        record = buffer[row["json_offset"] : row["json_offset"] + row["json_bytes"]]
        origin = index.parse_meta(record, row["key"], str(path)).get("plan_sha256", self.plan_sha256)
        if origin != self.plan_sha256:
            raise RunFailed(f"{path} was sampled for another plan", f"delete {path.parent} and {AGAIN}")


def _publish_tar(stage: Stage, shard: int, assembly: _Assembly) -> None:
    path = stage.shard_path(shard)
    chunks = assembly.chunks()
    won = publish_new(path, chunks)
    for _ in chunks:  # not consumed when the tar was there: its hash and rows are needed all the same
        pass
    if won or sha256_file(path) == assembly.digest.hexdigest():
        return
    if url_of(path):  # of another machine, which has other spools; it may have died before its manifest
        assembly.adopt(path)
    else:
        raise RunFailed(
            f"{path} is not what its spool {stage.work_path(shard)} makes, and no manifest vouches for it",
            f"delete {path} and {AGAIN}",
        )


def _publish_index(stage: Stage, shard: int, assembly: _Assembly) -> None:
    path = stage.index_path(shard)
    kv = {"schema": str(SCHEMA), "shard_sha256": assembly.digest.hexdigest(), "plan_sha256": assembly.plan_sha256}
    data = index.to_parquet(assembly.rows, kv)
    if publish_new(path, data) or path.read_bytes() == data:
        return
    table, found = index.read(path)  # another version of Arrow may write the same table with other bytes
    if found != kv or table.to_pylist() != assembly.rows:
        raise RunFailed(f"{path} does not belong to {stage.shard_path(shard)}", f"delete {path} and {AGAIN}")


def _manifest(stage: Stage, shard: int, assembly: _Assembly, info: dict[str, Any]) -> dict[str, Any]:
    keys = [row["key"] for row in assembly.rows]
    path = stage.index_path(shard)
    return {
        "schema": SCHEMA,
        "stage": stage.name,
        "kind": stage.kind,
        "iteration": stage.iteration,
        "shard": shard,
        "samples": len(keys),
        "groups": stage.groups(shard),
        "group_size": assembly.plan["group_size"],
        "keys_sha256": index.keys_sha256(keys),
        "tar": {"bytes": assembly.size, "sha256": assembly.digest.hexdigest()},
        "index": {"bytes": path.stat().st_size, "sha256": sha256_file(path)},
        "plan_sha256": assembly.plan_sha256,
        "policy": assembly.plan.get("policy"),
        "info": info,
    }


def _check_complete(stage: Stage, shard: int) -> None:
    """Raises FileNotFoundError before any byte is written when the spool lacks something."""
    wanted = [_sample_path(stage, shard, key) for key in stage.keys(shard)]
    wanted += [_group_path(stage, shard, group) for group in stage.groups(shard)]
    missing = [path.name for path in wanted if not path.exists()]
    if missing:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise FileNotFoundError(f"{len(missing)} of {len(wanted)} files are missing from its spool: {names}")


def _check_states(sample: Sample) -> None:
    latents, states = sample.tensors.get("latents"), sample.tensors.get("states")
    fits = latents is not None and states is not None and tuple(states.shape) == tuple(latents.shape[:1])
    if not fits or not str(getattr(states, "dtype", "")).endswith("int32"):
        raise UserError(f"{sample.key}: its tensors lack latents [M, …] or states int32 [M]", "")


def _map(path: Path) -> memoryview:
    """The bytes of a spooled file. Left open: the view keeps the mapping, and the mapping goes with the view."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _sample_path(stage: Stage, shard: int, key: str) -> Path:
    return stage.work_path(shard) / f"{key}.tar"


def _group_path(stage: Stage, shard: int, group: str) -> Path:
    return stage.work_path(shard) / f"{group}.text.safetensors"


def _phase_path(stage: Stage, shard: int, key: str) -> Path:
    return stage.work_path(shard) / f"{key}.high.safetensors"
