"""A run of one shard that has every kind of file a run can have; each is made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shards.files import canonical_sha256, sha256_file
from shards.records.reading import CHECKSUM, sealed
from shards.records.updates import update_line
from shards.run import Stage
from shards.sidecar import read_advantages, write_advantages, write_scores
from tests.support.shard_fixtures import advantage_frame, committed_stage, score_frame

SCORER, SPECIFICATION = "ocr-12345678", "aaaaaaaa"
WEIGHTS = "high_noise/pytorch_lora_weights.safetensors"
OWNER: dict[str, Any] = {
    "owner": "ab", "host": "elsewhere", "boot": "x", "pid": 1, "worker": "0/1", "every": 5.0, "locked": False,
    "version": "0.1.0",
}  # fmt: skip


def make(path: Path) -> Stage:
    """The run; its only stage is iteration 0, sampled, scored and trained."""
    stage = committed_stage(path, groups=1, group_size=2)
    write_scores(stage, 0, SCORER, score_frame(stage, 0), {"scorer": "ocr"})
    write_advantages(stage, 0, SPECIFICATION, advantage_frame(stage, 0), {"specification": "{}"})
    plan = stage.plan()
    assert plan is not None
    for folder in ("", "ema/"):
        put(stage.policy_dir / f"{folder}{WEIGHTS}", f"weights {folder}".encode())
    checkpoint = stage.trainer_dir("high_noise") / "update-000001"
    put(checkpoint / "part.safetensors", b"state of the trainer")
    stage.metrics_path.write_text(update_line(update(1)))
    reward = float(read_advantages(stage, SPECIFICATION)["reward"].mean())
    base = plan.policy.base
    own, average = (
        {"base": base, "adapters": {WEIGHTS: sha256_file(stage.policy_dir / f"{folder}{WEIGHTS}")}}
        for folder in ("", "ema/")
    )
    policy = {"schema": 1, "iteration": 0, "fingerprint": canonical_sha256(own), **own}
    policy["average"] = {"fingerprint": canonical_sha256(average), "adapters": average["adapters"]}
    part = checkpoint / "part.safetensors"
    commit = {"schema": 1, "update": 1, "ranks": 1, "tensors": {"updates": [1]}}
    commit |= {"files": {part.name: part.stat().st_size}, "sha256": {part.name: sha256_file(part)}}
    frozen = {"schema": 1, "iteration": 0, "plan_sha256": stage.plan_sha256(), "policy": plan.policy.fingerprint}
    frozen |= {"shards": {"0": sha256_file(stage.shard_path(0))}, "advantage": SPECIFICATION, "order_seed": 0}
    write(stage.policy_record_path, policy)
    write(checkpoint / "commit.json", commit)
    write(stage.train_plan_path, frozen | {"train": {"learning_rate": 1e-4}})
    write(stage.summary_path(SPECIFICATION), {"schema": 1, "specification": {}, "samples": 2, "mean_reward": reward})
    write(path / "model.json", {"schema": 1, "base": base, "path": "models/wan"})
    return stage


def update(number: int) -> dict[str, Any]:
    """The metrics of one update."""
    return {"iteration": 0, "expert": "high_noise", "update": number, "total_updates": number, "loss": 0.5}


def records(stage: Stage) -> dict[str, Path]:
    """The JSON records of the run, by their kind."""
    return {
        "manifest": stage.manifest_path(0), "plan": stage.plan_path, "frozen": stage.train_plan_path,
        "policy": stage.policy_record_path, "summary": stage.summary_path(SPECIFICATION),
        "commit": stage.trainer_dir("high_noise") / "update-000001" / "commit.json",
        "model": stage.run_path / "model.json", "metrics": stage.metrics_path,
    }  # fmt: skip


def others(stage: Stage) -> dict[str, Path]:
    """The other files that are read, by their kind."""
    return {
        "tar": stage.shard_path(0), "index": stage.index_path(0), "scores": stage.score_path(SCORER, 0),
        "advantages": stage.advantage_path(SPECIFICATION, 0), "weights": stage.policy_dir / WEIGHTS,
    }  # fmt: skip


def write(path: Path, record: dict[str, Any]) -> None:
    """A record with the checksum of its content, as a careful forger would write it."""
    content = {name: value for name, value in record.items() if name != CHECKSUM}
    put(path, sealed(content, path))


def put(path: Path, data: bytes) -> None:
    """A file, in place of what was there; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def rewrite(path: Path, /, **changes: Any) -> None:
    """Some fields of a record changed, its checksum made anew."""
    write(path, json.loads(path.read_text(encoding="utf-8")) | changes)
