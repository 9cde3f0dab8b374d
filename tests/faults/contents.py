"""What a run has published, as hashes: everything that has to be the same however often it was disturbed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards import sidecar
from shards.files import read_json, sha256_file
from shards.reader import open_shard
from shards.records.updates import read_updates
from shards.run import Run, Stage

OF_THE_MOMENT = {"seconds", "host", "peak_memory_bytes", "content_sha256"}
"""Fields of records that say when and where, and the checksums that cover them."""


def contents_of(run: Run, iteration: int = 0) -> dict[str, str]:
    """A hash for each thing that an iteration has published, but for times, places and the state of optimizers."""
    stage = run.iteration(iteration)
    return dict([*_rollouts(stage), *_tables(stage), *_policy(stage)])


def checkpoints_of(run: Run, iteration: int = 0) -> dict[str, str]:
    """sha256 of every file of every checkpoint of an iteration's training."""
    folder = run.iteration(iteration).policy_dir / "trainer"
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in _files(folder)}


def unlike(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of what differs, or is in one of both only."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _rollouts(stage: Stage) -> Iterator[tuple[str, str]]:
    for number in stage.shards():
        with open_shard(stage, number) as shard:
            for key in shard.keys:
                yield f"{key}.json", _hash(_lasting(shard.meta(key)))
                yield f"{key}.mp4", hashlib.sha256(shard.video(key)).hexdigest()
                yield from _tensors(key, shard.trajectory(key))
            for group in shard.groups:
                yield from _tensors(group, shard.group(group))


def _tensors(name: str, tensors: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for part, value in tensors.items():
        yield f"{name}.{part}", hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()


def _tables(stage: Stage) -> Iterator[tuple[str, str]]:
    for scorer in sidecar.scorers(stage):
        yield scorer, _hash(sidecar.read_scores(stage, scorer).to_json(double_precision=15))
    for name in sidecar.specifications(stage):
        yield f"advantages {name}", _hash(sidecar.read_advantages(stage, name).to_json(double_precision=15))


def _policy(stage: Stage) -> Iterator[tuple[str, str]]:
    if not stage.policy_record_path.exists():
        return
    yield "policy.json", _hash(_lasting(read_json(stage.policy_record_path)))
    for path in _files(stage.policy_dir):
        name = path.relative_to(stage.policy_dir).as_posix()
        if path.suffix == ".safetensors" and not name.startswith("trainer/"):
            yield name, sha256_file(path)
    for line in read_updates(stage.metrics_path):
        yield f"{line['expert']}, update {line['update']}", _hash(_lasting(line))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _lasting(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in OF_THE_MOMENT}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
