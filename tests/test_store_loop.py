"""A whole run in a store: the numbers are those of a local disk, and a machine that dies is replaced by another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.generate import rollout
from rollout.policy import Policy
from score.run import score
from shards import mirror, sidecar, store
from shards.config import ModelConfig, WorkersConfig
from shards.files import read_json, read_json_lines
from shards.reader import open_shard
from shards.run import Run
from shards.urls import working_copy
from tests.s3_server import KEYS, Fault, Proxy, proxied, served
from tests.training import equal, kill_self, killed, make_run, weights
from train.run import train
from train.update import ExpertTrainer

ROOT = Path(__file__).parents[1]
URL = "s3://bucket/runs/whole"
SETTINGS: dict[str, Any] = {
    "train": {"updates_per_rollout": 2, "async_checkpoints": False},
    "score": {"rewards": {"contrast": 1.0}, "min_spread": 0.0},
}


@pytest.fixture(scope="module")
def s3(tiny_t2v2: Path) -> Iterator[Proxy]:
    """A server with the tiny model in its bucket."""
    with served() as port, proxied(port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": proxy.url}.items():
            patch.setenv(name, value)
        store._open.cache_clear()
        store._store(URL).mkdir("bucket")
        store._store(URL).put(str(tiny_t2v2), "bucket/tiny", recursive=True)
        yield proxy
        store._open.cache_clear()


def sampled_and_scored(run: Run, iteration: int, policy: Policy) -> None:
    rollout(run, run.iteration(iteration), policy)
    score(run, run.iteration(iteration))


def test_two_iterations_on_two_machines_equal_a_local_run(
    s3: Proxy, tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_run(tmp_path / "local", tiny_t2v2, **SETTINGS)
    policy = Policy.of(local.config.model)
    for k in (0, 1):
        sampled_and_scored(local, k, policy)
        train(local, k, policy)

    # the first machine samples, scores, and dies in its second update
    monkeypatch.setenv("RUSHES_CACHE", str(tmp_path / "first"))
    s3.faults += [Fault("503", "PUT", r"\.tar"), Fault("reset", "PUT", "manifest"), Fault("lost", "PUT", "score")]
    own = {"model": _model(local.config.model), "workers": WorkersConfig(claim_seconds=4.0)}
    created = Run.create(URL, local.config.model_copy(update=own))
    policy = Policy.of(created.config.model)
    sampled_and_scored(created, 0, policy)
    update = ExpertTrainer.update

    def dying(self: ExpertTrainer, *arguments: Any) -> Any:
        return kill_self() if self.state.updates == 1 else update(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertTrainer, "update", dying)
        killed(lambda: train(created, 0, policy))

    # the second machine has nothing but the URL
    monkeypatch.setenv("RUSHES_CACHE", str(tmp_path / "second"))
    s3.faults += [Fault("cut", "GET", "safetensors"), Fault("503", "GET", r"\.tar"), Fault("short", "GET", r"\.tar")]
    run = Run.open(URL)
    policy = Policy.of(run.config.model)
    updates: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(ExpertTrainer, "update", lambda self, *a: updates.append(self.state.updates) or update(self, *a))
        train(run, 0, policy)
    assert updates == [1, 0, 1]  # the first update of the first expert was not done again
    assert len(read_json_lines(run.iteration(0).policy_dir / "metrics.jsonl")) == 4
    sampled_and_scored(run, 1, policy)
    train(run, 1, policy)
    assert all(fault.seen == fault.times for fault in s3.faults)

    for k in (0, 1):
        ours, theirs = run.iteration(k), local.iteration(k)
        assert equal(weights(run, k), weights(local, k))
        assert equal(weights(run, k, "ema"), weights(local, k, "ema"))
        assert _fingerprint(run, k) == _fingerprint(local, k)
        for scorer in sidecar.scorers(theirs):
            assert sidecar.read_scores(ours, scorer).equals(sidecar.read_scores(theirs, scorer))
        for shard in theirs.shards():
            with open_shard(ours, shard) as one, open_shard(theirs, shard) as other:
                assert one.keys == other.keys
                for key in one.keys:
                    assert torch.equal(one.trajectory(key)["latents"], other.trajectory(key)["latents"])
                    assert one.video(key) == other.video(key)

    # a third one looks, without torch, and proves every byte
    environment = {**os.environ, "RUSHES_CACHE": str(tmp_path / "third")}
    code = "import sys, atexit, cli; atexit.register(lambda: print('torch' in sys.modules)); cli.main()"
    command = [sys.executable, "-c", code, "inspect", URL, "--format", "jsonl", "--columns", "key,reward"]
    seen = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    *rows, has_torch = seen.stdout.splitlines()
    assert [json.loads(row)["key"] for row in rows] == [key for k in (0, 1) for key in _keys(run, k)]
    assert has_torch == "False"
    command = [sys.executable, "cli.py", "verify", URL]
    proven = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert proven.stderr == f"{URL}: everything published is whole\n"
    assert not list(working_copy(URL).glob("*.tmp-*"))
    mirror._looked.clear()


def _model(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"path": "s3://bucket/tiny"})


def _fingerprint(run: Run, iteration: int) -> str:
    return str(read_json(run.iteration(iteration).policy_dir / "policy.json")["fingerprint"])


def _keys(run: Run, iteration: int) -> list[str]:
    stage = run.iteration(iteration)
    return [key for shard in stage.shards() for key in stage.keys(shard)]
