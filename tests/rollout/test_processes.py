"""Several processes sample one stage and make what one process makes; a helper that dies leaves no hole."""

from __future__ import annotations

import concurrent.futures
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout import processes
from rollout import run as rollout_run
from rollout.policy import Policy
from rollout.ranks.device import device_of_worker
from shards.errors import UserError
from shards.files import read_json
from shards.reader import open_shard
from shards.run import Run, Stage
from tests.support import training

PATIENCE = 300.0  # seconds; a loaded machine starts Python slowly


@pytest.fixture(autouse=True)
def no_helpers_left() -> Iterator[None]:
    """Helpers end with their test."""
    yield
    processes.helpers.discard()


def make(path: Path, model: Path, workers: int) -> Run:
    """A run of three shards."""
    return training.make_run(path, model, workers=workers, groups_per_shard=1, prompts_per_iteration=3)


def samples(stage: Stage) -> dict[str, tuple[bytes, dict[str, list[float]]]]:
    """Video and trajectory of every sample of a stage."""
    found = {}
    for number in stage.shards():
        with open_shard(stage, number) as shard:
            for key in shard.keys:
                tensors = shard.trajectory(key)
                found[key] = shard.video(key), {name: one.float().flatten().tolist() for name, one in tensors.items()}
    return found


def samplers(stage: Stage) -> dict[int, str]:
    """Which worker sealed each shard."""
    return {shard: read_json(stage.manifest_path(shard))["info"]["worker"] for shard in stage.shards()}


def test_two_processes_sample_what_one_samples(
    tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The helper begins when the first process has its first shard, which ends when the two others are sampled."""
    one, two = make(tmp_path / "one", tiny_t2v2, 1), make(tmp_path / "two", tiny_t2v2, 2)
    alone = rollout_run.rollout(one, one.iteration(0), Policy.of(one.config.model))
    policy, stage = Policy.of(two.config.model), two.iteration(0)
    monkeypatch.setattr(processes, "MOMENT", PATIENCE)  # a busy machine may bring the helper's report late
    seen: list[tuple[int, int, str]] = []
    waiting: list[Callable[[], None]] = []
    start = processes.start_helpers

    class Late:
        def submit(self, *work: Any) -> Future[Any]:
            late: Future[Any] = Future()
            waiting.append(lambda: start(1).submit(*work).add_done_callback(lambda one: late.set_result(one.result())))
            return late

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        while waiting:
            waiting.pop()()
        deadline = time.monotonic() + PATIENCE
        while not seen and len(stage.shards()) < 2:
            assert time.monotonic() < deadline, "the helper samples nothing"
            time.sleep(0.02)
        seen.append((done, total, note))

    monkeypatch.setattr(processes, "start_helpers", lambda count: Late())
    report = processes.rollout(two, stage, policy, progress)
    assert samplers(stage) == {0: "0/2", 1: "1/2", 2: "1/2"}
    assert seen[0] == (0, alone.done, "shard 0")
    assert (report.done, report.skipped, report.busy) == (alone.done, 0, 0)
    again = processes.rollout(two, stage, policy)
    assert (again.done, again.skipped) == (0, alone.done)
    assert samples(stage) == samples(one.iteration(0)) != {}


def kill_helpers() -> None:
    """As a machine that is out of memory does."""
    for executor in processes.helpers.executors.values():
        for child in list(executor._processes.values()):
            child.kill()


def test_helpers_that_die_leave_no_hole(tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One between two stages, and the one that takes its place in the middle of the next stage."""
    run = make(tmp_path / "run", tiny_t2v2, 2)
    monkeypatch.setattr(processes, "MOMENT", PATIENCE)  # a busy machine may be late to tell of a death
    with pytest.raises(BrokenProcessPool):
        processes.start_helpers(1).submit(signal.raise_signal, signal.SIGKILL).result()
    report = processes.rollout(
        run, run.iteration(0), Policy.of(run.config.model), lambda done, total, unit, note="": kill_helpers()
    )
    assert report.busy == 0
    assert samplers(run.iteration(0)) == dict.fromkeys(range(3), "0/2")
    assert not processes.helpers.executors


def test_a_helper_that_dies_while_the_next_gets_its_part_leaves_no_hole(
    tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, the first one as soon as it has its part."""
    run, submit = make(tmp_path / "run", tiny_t2v2, 3), ProcessPoolExecutor.submit

    def deadly(executor: ProcessPoolExecutor, *job: Any) -> Future[int]:
        future = submit(executor, *job)
        kill_helpers()
        concurrent.futures.wait([future])
        return future

    monkeypatch.setattr(ProcessPoolExecutor, "submit", deadly)
    report = processes.rollout(run, run.iteration(0), Policy.of(run.config.model))
    assert (report.done, report.busy) == (9, 0)
    assert samplers(run.iteration(0)) == dict.fromkeys(range(3), "0/3")
    assert not processes.helpers.executors


def test_what_is_wrong_is_told_by_the_first_process(tiny_t2v2: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "run", tiny_t2v2, 2)
    with pytest.raises(UserError, match="iteration 3 samples with the policy"):
        processes.rollout(run, run.iteration(3), Policy.of(run.config.model))
    assert not processes.helpers.executors


def test_each_process_has_a_gpu_of_its_own_or_none_starts(
    tiny_t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device_of_worker("cpu", 3, 8) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert [device_of_worker("auto", index, 2) for index in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(UserError, match="this machine has 2") as found:
        device_of_worker("cuda", 0, 3)
    assert "rollout.workers = 2" in found.value.hint
    with pytest.raises(UserError, match="cuda:1 is one GPU"):
        device_of_worker("cuda:1", 0, 2)
    run = make(tmp_path / "run", tiny_t2v, workers=3)
    config = run.config.model_copy(update={"model": run.config.model.model_copy(update={"device": "cuda"})})
    monkeypatch.setattr(run, "config", config)
    with pytest.raises(UserError, match="workers = 3"):
        processes.rollout(run, run.iteration(0))
    assert not run.iteration(0).path.exists()  # refused before anything is written
