"""The spool: finished samples, the tensors of their groups and unfinished states that wait for their shard."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
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

_SAMPLES_NAME = re.compile(rf"(?P<first>{SAMPLE_KEY.pattern})(--(?P<last>{SAMPLE_KEY.pattern}))?\.tar")
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


def write_samples(stage: Stage, shard: int, *samples: Sample) -> bool:
    """Put finished samples, neighbours in their shard, into the spool as one tar: all of them or none.

    False when that file was there already or the shard is committed. Raises UserError for keys the plan does not have
    in this shard one after the other, for text that is not Unicode and for a record over 16 MiB; RunFailed when the
    disk is full.
    """
    keys, there = [sample.key for sample in samples], stage.keys(shard)
    for sample in samples:
        if not SAMPLE_KEY.fullmatch(sample.key) or sample.key not in there:
            raise UserError(
                f"{sample.key!r} is not a sample of shard {shard} of {stage.path}", "plan.json lists its groups"
            )
    start = there.index(keys[0])
    if keys != there[start : start + len(keys)]:
        raise UserError(
            f"{', '.join(keys)} are not neighbours in shard {shard} of {stage.path}", "write them one by one"
        )
    parts = [part for sample in samples for part in _members(sample)]
    if stage.is_committed(shard):
        return False
    return stage.files.publish_new(_samples_path(stage, shard, keys), [*parts, END])


def write_group(stage: Stage, shard: int, group: str, values: Mapping[str, Array]) -> bool:
    """Put the tensors shared by a group (prompt [L, D], negative [Ln, D], …) into the spool; as write_samples."""
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
    """Keep the state of unfinished samples after the high-noise phase, by the key of the first; as write_samples."""
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


def spool_files(stage: Stage, shard: int) -> dict[Path, list[str]]:
    """The files of finished samples in the spool, by name, and the keys that each of them holds."""
    work, found = stage.work_path(shard), {}
    with suppress(FileNotFoundError):
        names = [match for match in map(_SAMPLES_NAME.fullmatch, sorted(os.listdir(work))) if match]
        keys = stage.keys(shard) if names else []
        for match in names:
            first, last = match["first"], match["last"] or match["first"]
            if first in keys and last in keys:
                found[work / match.string] = keys[keys.index(first) : keys.index(last) + 1]
    return found


def spooled(stage: Stage, shard: int) -> set[str]:
    """Keys of the samples that are finished and wait in the spool."""
    return {key for keys in spool_files(stage, shard).values() for key in keys}


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


def _members(sample: Sample) -> Iterator[Buffer]:
    """The members of a sample in a tar, as buffers to write."""
    if sample.meta.get("key") != sample.key or sample.meta.get("schema") != SCHEMA:
        raise UserError(f"{sample.key}: its record lacks key or schema {SCHEMA}", "")
    meta = to_json(sample.meta, sample.key)
    if len(meta) > LARGEST_META:
        raise UserError(
            f"{sample.key}: its record has {len(meta)} bytes, the limit is {LARGEST_META}", "shorten the prompt"
        )
    _check_states(sample)
    payloads: list[list[Buffer]] = [[meta], [sample.video], tensors.encode(sample.tensors)]
    for extension, payload in zip(EXTENSIONS, payloads, strict=True):
        yield from wrap(f"{sample.key}.{extension}", payload)


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


def group_path(stage: Stage, shard: int, group: str) -> Path:
    """Where the tensors of a group wait."""
    return stage.work_path(shard) / f"{group}.text.safetensors"


def _samples_path(stage: Stage, shard: int, keys: Sequence[str]) -> Path:
    """Where finished samples wait, neighbours in their shard: a tar that is named after the first and the last."""
    return stage.work_path(shard) / ("--".join(dict.fromkeys((keys[0], keys[-1]))) + ".tar")


def _phase_path(stage: Stage, shard: int, key: str) -> Path:
    return stage.work_path(shard) / f"{key}.high.safetensors"
