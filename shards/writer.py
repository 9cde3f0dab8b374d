"""Writing shards: a full spool is sealed into a tar, its index and its manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shards import index, parquet
from shards.errors import Damaged, RunFailed
from shards.files import Buffer, sha256_file
from shards.locks import sweep_temporary
from shards.plan import SCHEMA
from shards.records.opening import read_plain
from shards.records.reading import sealed
from shards.run import Stage
from shards.spool import group_path, mapped, spool_files, sweep
from shards.tar import END, Member, group_name, padding
from shards.tar import header as tar_header

HASH_BYTES = 4 * 2**20  # hashed and written while still in the processor's cache
AGAIN = "run `rushes rollout` again; it samples what is missing"


def seal(stage: Stage, shard: int, info: Mapping[str, object]) -> bool:
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
        _sources(stage, shard)  # before a byte is written
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
    manifest = sealed(_manifest(stage, shard, assembly, info), stage.path)
    won = stage.files.publish_new(stage.manifest_path(shard), manifest)
    sweep(stage, shard)
    return won


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
        for path, keys in _sources(self.stage, self.shard):
            buffer = mapped(path)
            rows = index.sample_rows(buffer, str(path))
            if [row["key"] for row in rows] != keys:
                raise Damaged(f"{path}: its samples are not those of its name", "")
            for row in rows:
                self._check_origin(buffer, row, path)
                self.rows.append(index.shifted(row, self.size))
            yield from self._pass(buffer[: -len(END)])
        for group in self.stage.groups(self.shard):
            path = group_path(self.stage, self.shard, group)
            buffer = mapped(path)
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
        buffer = mapped(path)
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
        record = buffer[row["json_offset"] : row["json_offset"] + row["json_bytes"]]  # checked for its row
        if json.loads(bytes(record)).get("plan_sha256", self.plan_sha256) != self.plan_sha256:
            raise RunFailed(f"{path} was sampled for another plan", f"delete {path.parent} and {AGAIN}")


def _publish_tar(stage: Stage, shard: int, assembly: _Assembly) -> None:
    path = stage.shard_path(shard)
    chunks = assembly.chunks()
    won = stage.files.publish_new(path, chunks)
    for _ in chunks:  # not consumed when the tar was there: its hash and rows are needed all the same
        pass
    if won or sha256_file(path) == assembly.digest.hexdigest():
        return
    if stage.files.one_spool:
        raise RunFailed(
            f"{path} is not what its spool {stage.work_path(shard)} makes, and no manifest vouches for it",
            f"delete {path} and {AGAIN}",
        )
    assembly.adopt(path)  # made from another spool by a machine that may have died before its manifest


def _publish_index(stage: Stage, shard: int, assembly: _Assembly) -> None:
    path = stage.index_path(shard)
    kv = {"schema": str(SCHEMA), "shard_sha256": assembly.digest.hexdigest(), "plan_sha256": assembly.plan_sha256}
    data = index.to_parquet(assembly.rows, kv)
    if stage.files.publish_new(path, data) or read_plain(path, parquet.MOST_BYTES) == data:
        return
    table, found = index.read(path)  # another version of Arrow may write the same table with other bytes
    if found != kv or table.to_pylist() != assembly.rows:
        raise RunFailed(f"{path} does not belong to {stage.shard_path(shard)}", f"delete {path} and {AGAIN}")


def _manifest(stage: Stage, shard: int, assembly: _Assembly, info: Mapping[str, object]) -> dict[str, object]:
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
        "group_size": assembly.plan.group_size,
        "keys_sha256": index.keys_sha256(keys),
        "tar": {"bytes": assembly.size, "sha256": assembly.digest.hexdigest()},
        "index": {"bytes": path.stat().st_size, "sha256": sha256_file(path)},
        "plan_sha256": assembly.plan_sha256,
        "policy": asdict(assembly.plan.policy),
        "info": info,
    }


def _sources(stage: Stage, shard: int) -> list[tuple[Path, list[str]]]:
    """The files that make up the samples of a shard, in its order, and the keys of each.

    Of two that begin with the same sample the longer one counts: a chunk that was begun sample by sample, by an older
    version, is written again as a whole. Raises FileNotFoundError where the spool lacks something.
    """
    keys = stage.keys(shard)
    by_length = sorted(spool_files(stage, shard).items(), key=lambda item: len(item[1]))
    longest = {held[0]: (path, held) for path, held in by_length}
    found, missing, place = [], [], 0
    while place < len(keys):
        path, held = longest.get(keys[place], (None, keys[place : place + 1]))
        if path:
            found.append((path, held))
        else:
            missing += held
        place += len(held)
    groups = [group_path(stage, shard, group) for group in stage.groups(shard)]
    missing += [path.name for path in groups if not path.exists()]
    if missing:
        names = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(keys) + len(groups)} parts are missing from its spool: {names}"
        )
    return found
