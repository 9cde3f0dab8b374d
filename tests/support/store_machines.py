"""A run in a store on several machines: one dies in training, another takes over, a third only looks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.policy import Policy
from shards import sidecar
from shards.files import read_json
from shards.reader import open_shard
from shards.run import Run, Stage
from tests.support.training import equal, kill_self, killed, weights
from train.run import train
from train.trainer import ExpertTrainer

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "train": {"updates_per_rollout": 2, "async_checkpoints": False},
    "score": {"rewards": {"contrast": 1.0}, "min_spread": 0.0},
}


def die_in_second_update(run: Run, policy: Policy) -> None:
    """Begin to train iteration 0 in a process that is killed there, as of kill -9."""
    update = ExpertTrainer.update

    def dying(self: ExpertTrainer, *arguments: Any) -> Any:
        return kill_self() if self.state.updates == 1 else update(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertTrainer, "update", dying)
        killed(lambda: train(run, 0, policy))


def take_over(run: Run, policy: Policy) -> None:
    """Train iteration 0 on; the first update of the first expert must not be done again."""
    updates: list[int] = []
    update = ExpertTrainer.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertTrainer, "update", lambda self, *a: updates.append(self.state.updates) or update(self, *a))
        train(run, 0, policy)
    assert updates == [1, 0, 1]


def assert_same(run: Run, local: Run, iteration: int) -> None:
    """Weights, averages, fingerprint, scores, latents and videos of an iteration are those of another run."""
    ours, theirs = run.iteration(iteration), local.iteration(iteration)
    assert equal(weights(run, iteration), weights(local, iteration))
    assert equal(weights(run, iteration, "ema"), weights(local, iteration, "ema"))
    assert _fingerprint(ours) == _fingerprint(theirs)
    for scorer in sidecar.scorers(theirs):
        assert sidecar.read_scores(ours, scorer).equals(sidecar.read_scores(theirs, scorer))
    for shard in theirs.shards():
        with open_shard(ours, shard) as one, open_shard(theirs, shard) as other:
            assert one.keys == other.keys
            for key in one.keys:
                assert torch.equal(one.trajectory(key)["latents"], other.trajectory(key)["latents"])
                assert one.video(key) == other.video(key)


def look(url: str, keys: list[str], **environment: str) -> str:
    """Inspect a run without torch, which must have these samples, and prove every byte; what `inspect` said."""
    everything = {**os.environ, **environment}
    code = "import sys, atexit, cli; atexit.register(lambda: print('torch' in sys.modules)); cli.main()"
    command = [sys.executable, "-c", code, "inspect", url, "--format", "jsonl", "--columns", "key,reward"]
    seen = subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, check=True)
    *rows, has_torch = seen.stdout.splitlines()
    assert [json.loads(row)["key"] for row in rows] == keys
    assert has_torch == "False"
    command = [sys.executable, "cli.py", "verify", url]
    proven = subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, check=True)
    assert proven.stderr == f"{url}: everything published is whole\n"
    return seen.stderr


def _fingerprint(stage: Stage) -> str:
    return str(read_json(stage.policy_dir / "policy.json")["fingerprint"])
