"""The spool: finished samples, the tensors of their groups and unfinished states that wait for their shard."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shards import tensors
from shards.errors import Damaged, UserError
from shards.files import Buffer, to_json
from shards.index import LARGEST_META
from shards.locks import sweep_temporary
from shards.plan import GROUP_KEY, SAMPLE_KEY, SCHEMA
from shards.records.opening import open_file, read_plain
from shards.run import Stage
from shards.tar import END, EXTENSIONS, LARGEST, wrap

AGAIN = "delete it; `rushes rollout` samples it again"

if TYPE_CHECKING:
    import torch

    from shards.tensors import Array


@dataclass(frozen=True)
class Sample:
    """One finished video with all that training and scoring need."""

    key: str
    """i000003-p000017-s05"""
    meta: dict[str, object]
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
    return stage.files.publish_new(
        sample_path(stage, shard, sample.key), [*(buffer for part in parts for buffer in part), END]
    )


def write_group(stage: Stage, shard: int, group: str, values: Mapping[str, Array]) -> bool:
    """Put the tensors shared by a group (prompt [L, D], negative [Ln, D], …) into the spool; as write_sample."""
    if not GROUP_KEY.fullmatch(group) or group not in stage.groups(shard):
        raise UserError(f"{group!r} is not a group of shard {shard} of {stage.path}", "plan.json lists its groups")
    return not stage.is_committed(shard) and stage.files.publish_new(
        group_path(stage, shard, group), tensors.encode(values)
    )


def read_group(stage: Stage, shard: int, group: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a group from the spool, or None; a worker that continues uses the same ones. Raises Damaged."""
    path = group_path(stage, shard, group)
    try:
        return tensors.decode(bytearray(read_plain(path, LARGEST, AGAIN)), str(path))
    except FileNotFoundError:
        return None


def write_phase(stage: Stage, shard: int, key: str, values: Mapping[str, Array]) -> bool:
    """Keep the state of unfinished samples after the high-noise phase, by the key of the first; as write_sample."""
    if not SAMPLE_KEY.fullmatch(key):
        raise UserError(f"{key!r} is not a sample key", "keys look like i000003-p000017-s05")
    return not stage.is_committed(shard) and stage.files.publish_new(
        _phase_path(stage, shard, key), tensors.encode(values)
    )


def read_phase(stage: Stage, shard: int, key: str) -> dict[str, torch.Tensor] | None:
    """The state kept by write_phase, or None. A damaged one is removed: the samples then start afresh."""
    path = _phase_path(stage, shard, key)
    try:
        return tensors.decode(bytearray(read_plain(path, LARGEST, AGAIN)), str(path))
    except FileNotFoundError:
        return None
    except Damaged:
        path.unlink(missing_ok=True)
        return None


def remove_phase(stage: Stage, shard: int, key: str) -> None:
    """Remove the state kept by write_phase, once its samples are finished."""
    _phase_path(stage, shard, key).unlink(missing_ok=True)


def spooled(stage: Stage, shard: int) -> set[str]:
    """Keys of the samples that are finished and wait in the spool."""
    with suppress(FileNotFoundError):
        names = (entry.rpartition(".") for entry in os.listdir(stage.work_path(shard)))
        return {key for key, _, extension in names if extension == "tar" and SAMPLE_KEY.fullmatch(key)}
    return set()


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


def _check_states(sample: Sample) -> None:
    latents, states = sample.tensors.get("latents"), sample.tensors.get("states")
    fits = latents is not None and states is not None and tuple(states.shape) == tuple(latents.shape[:1])
    if not fits or not str(getattr(states, "dtype", "")).endswith("int32"):
        raise UserError(f"{sample.key}: its tensors lack latents [M, …] or states int32 [M]", "")


def mapped(path: Path) -> memoryview:
    """The bytes of a spooled file. Raises FileNotFoundError and Damaged.

    Left open: the view keeps the mapping, and the mapping goes with the view.
    """
    with os.fdopen(open_file(path, AGAIN), "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def sample_path(stage: Stage, shard: int, key: str) -> Path:
    """Where a finished sample waits: a tar of its own."""
    return stage.work_path(shard) / f"{key}.tar"


def group_path(stage: Stage, shard: int, group: str) -> Path:
    """Where the tensors of a group wait."""
    return stage.work_path(shard) / f"{group}.text.safetensors"


def _phase_path(stage: Stage, shard: int, key: str) -> Path:
    return stage.work_path(shard) / f"{key}.high.safetensors"
