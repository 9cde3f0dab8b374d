"""A whole run in a store: the numbers are those of a local disk, and a machine that dies is replaced by another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout.policy import Policy
from rollout.run import rollout
from score.run import score
from shards.config import ModelConfig, WorkersConfig
from shards.measures import read_metrics
from shards.records.updates import read_updates, update_line
from shards.run import Run
from shards.store.objects import Objects
from shards.store.urls import working_copy
from tests.support.s3_server import KEYS, Fault, Proxy, proxied, served
from tests.support.store_machines import SETTINGS, assert_same, die_in_second_update, look, take_over
from tests.support.stores import client, forget_clients
from tests.support.training import make_run
from train.run import train

URL = "s3://bucket/runs/whole"


@pytest.fixture(scope="module")
def s3(tiny_t2v2: Path) -> Iterator[Proxy]:
    """A server with the tiny model in its bucket."""
    with served() as port, proxied(port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": proxy.url}.items():
            patch.setenv(name, value)
        forget_clients()
        client(URL).mkdir("bucket")
        client(URL).put(str(tiny_t2v2), "bucket/tiny", recursive=True)
        yield proxy
        forget_clients()


def sampled_and_scored(run: Run, iteration: int, policy: Policy) -> None:
    rollout(run, run.iteration(iteration), policy)
    score(run, run.iteration(iteration))


@pytest.mark.long  # tests/store/test_store_hub.py has an iteration on two machines
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
    die_in_second_update(created, policy)

    # the second machine has nothing but the URL
    monkeypatch.setenv("RUSHES_CACHE", str(tmp_path / "second"))
    s3.faults += [Fault("cut", "GET", "safetensors"), Fault("503", "GET", r"\.tar"), Fault("short", "GET", r"\.tar")]
    run = Run.open(URL)
    policy = Policy.of(run.config.model)
    take_over(run, policy)
    assert len(read_updates(run.iteration(0).policy_dir / "metrics.jsonl")) == 4
    sampled_and_scored(run, 1, policy)
    train(run, 1, policy)
    assert all(fault.seen == fault.times for fault in s3.faults)

    for k in (0, 1):
        assert_same(run, local, k)

    # a third one looks, without torch, and proves every byte
    look(URL, [key for k in (0, 1) for key in _keys(run, k)], RUSHES_CACHE=str(tmp_path / "third"))
    assert not list(working_copy(URL).glob("*.tmp-*"))


@pytest.mark.long  # both halves are tested apart: tests/train/test_experts.py, and the test above
def test_two_machines_train_an_expert_each(
    s3: Proxy, tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_run(tmp_path / "local", tiny_t2v2, **SETTINGS)
    policy = Policy.of(local.config.model)
    sampled_and_scored(local, 0, policy)
    train(local, 0, policy)

    url = "s3://bucket/runs/apart"
    monkeypatch.setenv("RUSHES_CACHE", str(tmp_path / "first"))
    first = Run.create(url, local.config.model_copy(update={"model": _model(local.config.model)}))
    policy = Policy.of(first.config.model)
    sampled_and_scored(first, 0, policy)
    # what this machine has of the other expert is of an update that another machine makes again
    die_in_second_update(first, policy)
    assert train(first, 0, policy, expert="high_noise").missing == ["low_noise"]
    stale = first.iteration(0).expert_metrics_path("low_noise")
    stale.write_text(update_line({"iteration": 0, "expert": "low_noise", "update": 1, "total_updates": 1, "loss": 9.0}))

    monkeypatch.setenv("RUSHES_CACHE", str(tmp_path / "second"))
    second = Run.open(url)
    policy = Policy.of(second.config.model)
    assert train(second, 0, policy, expert="low_noise").updates == {"high_noise": 2, "low_noise": 2}
    second.iteration(0).fetched_policy()  # as the next iteration does: this machine has only what it trained
    assert_same(second, local, 0)
    names = Objects("s3").listing(f"{url}/iter-0000/policy")
    assert not {name for name in names if name.endswith("_noise.json") or "_noise.jsonl" in name}

    monkeypatch.setenv("RUSHES_CACHE", str(tmp_path / "first"))
    again = Run.open(url)
    assert train(again, 0, policy).skipped
    assert [(row["expert"], row["update"]) for row in read_metrics(again.iteration(0))] == [
        ("high_noise", 1), ("high_noise", 2), ("low_noise", 1), ("low_noise", 2)]  # fmt: skip
    assert all(row["loss"] < 9.0 for row in read_metrics(again.iteration(0)))


def _model(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"path": "s3://bucket/tiny"})


def _keys(run: Run, iteration: int) -> list[str]:
    stage = run.iteration(iteration)
    return [key for shard in stage.shards() for key in stage.keys(shard)]
