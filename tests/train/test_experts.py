"""Two experts in a process each: the policy of one process that trains both, whoever is killed, late or there twice."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rollout import processes
from rollout.memory.needs import Need
from rollout.policy import Policy
from shards.errors import RunFailed, StillBusy, UserError
from shards.files import read_json, sha256_file
from shards.measures import read_metrics
from shards.records.updates import read_updates
from shards.run import Run
from shards.trackers.live import tracking
from shards.workers import owners
from shards.workers.claims import claim
from tests.support import training
from train import run as train_run
from train.experts import at_once
from train.experts.at_once import second_device, train_at_once
from train.run import TrainReport, train

EXPERTS = ("high_noise", "low_noise")
COST = {"seconds", "peak_memory_bytes"}
PATIENCE = 300.0  # seconds; a loaded machine starts Python slowly


@pytest.fixture(scope="module")
def other(tiny_t2v2: Path) -> Policy:
    """The model of another process."""
    return Policy.load(str(tiny_t2v2), device="cpu", text_length=training.TEXT_LENGTH)


@pytest.fixture(scope="module")
def trained(rolled: Run, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same, trained by one process without a disturbance."""
    run = training.fork(rolled, tmp_path_factory.mktemp("experts") / "trained")
    train(run, 0, policy)
    return run


@pytest.fixture(autouse=True)
def no_helpers_left() -> Iterator[None]:
    """Helpers end with their test."""
    yield
    processes.helpers.discard(at_once=True)


def contents(run: Run, iteration: int = 0) -> dict[str, str]:
    """What training left of an iteration, by file: sha256, and of logs and checkpoints what they say. Left out are
    measured costs, the random generator of the process, which nothing draws from, and TensorBoard's logs."""
    folder = run.iteration(iteration).policy_dir
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl":
            found[name] = repr([_without_costs(update) for update in read_updates(path)])
        elif "trainer" in path.parts:
            found[name] = _state(path) if path.suffix == ".safetensors" else ""
        else:
            found[name] = sha256_file(path)
    return found


def _state(path: Path) -> str:
    tensors = load_file(path).items()
    return repr(sorted((name, value.numpy().tobytes()) for name, value in tensors if ".generator" not in name))


def _without_costs(update: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in update.items() if name not in COST}


def at_update(number: int, action: Callable[[], object]) -> Callable[..., None]:
    """A progress that does something after an update."""

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if unit == "updates" and done == number:
            action()

    return progress


# --- One process after the other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [EXPERTS, EXPERTS[::-1]], ids=["high first", "low first"])
def test_a_process_each_leaves_what_one_process_leaves(
    order: tuple[str, str], rolled: Run, trained: Run, policy: Policy, tmp_path: Path
) -> None:
    run = training.fork(rolled, tmp_path / "run")
    first, last = order
    report = train(run, 0, policy, expert=first)
    assert (report.updates, report.missing, report.fingerprint) == ({first: 2}, [last], "")
    assert not run.iteration(0).trained()
    assert [record["expert"] for record in read_metrics(run.iteration(0))] == [first, first]
    again = train(run, 0, policy, expert=first)
    assert (again.updates, again.missing) == ({first: 2}, [last])
    whole = train(run, 0, policy, expert=last)
    assert (whole.updates, whole.missing, whole.replay) == ({"high_noise": 2, "low_noise": 2}, [], 0.0)
    assert whole.fingerprint == read_json(run.iteration(0).policy_record_path)["fingerprint"]
    assert contents(run) == contents(trained)
    assert train(run, 0, policy, expert=first).skipped


def test_all_weights_in_a_process_each(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"full": True, "updates_per_rollout": 1, "replay_samples": 1}
    one = training.fork(rolled, tmp_path / "one", **settings)
    two = training.fork(rolled, tmp_path / "two", **settings)
    train(one, 0, policy)
    for expert in EXPERTS:
        train(two, 0, policy, expert=expert)
    assert contents(two) == contents(one)


def test_the_optimizers_go_on_in_the_next_iteration(trained: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(trained, tmp_path / "run")
    training.advise(training.roll(run, 1, policy))
    two = training.fork(run, tmp_path / "two")
    train(run, 1, policy)
    for expert in reversed(EXPERTS):
        train(two, 1, policy, expert=expert)
    assert [record["total_updates"] for record in read_metrics(two.iteration(1))] == [3, 4, 3, 4]
    assert contents(two, 1) == contents(run, 1)


def test_one_process_goes_on_where_two_were_and_two_where_one_was(
    rolled: Run, trained: Run, policy: Policy, tmp_path: Path
) -> None:
    run = training.fork(rolled, tmp_path / "run")
    train(run, 0, policy, expert="low_noise")
    training.killed(lambda: train(run, 0, policy, at_update(1, training.kill_self), expert="high_noise"))
    assert train(run, 0, policy).updates == {"high_noise": 2, "low_noise": 2}
    assert contents(run) == contents(trained)
    assert len(tensorboard(run)) == 1
    other_way = training.fork(rolled, tmp_path / "other way")
    training.killed(lambda: train(other_way, 0, policy, at_update(1, training.kill_self)))
    for expert in EXPERTS:
        train(other_way, 0, policy, expert=expert)
    assert contents(other_way) == contents(trained)
    assert sorted(path.suffix for path in tensorboard(other_way)) == [".high_noise", ".low_noise"]


def tensorboard(run: Run) -> list[Path]:
    """What TensorBoard reads of iteration 0."""
    return sorted((run.iteration(0).policy_dir / "tensorboard").iterdir())


# --- Killed, and there twice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["update", "publish", "forget_records"])
def test_a_process_that_is_killed_is_replaced(
    where: str, rolled: Run, trained: Run, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training.fork(rolled, tmp_path / "run")
    train(run, 0, policy, expert="high_noise")
    with monkeypatch.context() as patch:
        if where != "update":
            patch.setattr(train_run, where, training.kill_self)
        progress = at_update(1, training.kill_self) if where == "update" else None
        training.killed(lambda: train(run, 0, policy, progress, expert="low_noise"))
    assert run.iteration(0).trained() == (where == "forget_records")
    train(run, 0, policy, expert="low_noise")
    found = {name: value for name, value in contents(run).items() if where != "forget_records" or name not in RECORDS}
    assert found == contents(trained)
    assert read_metrics(run.iteration(0)) == read_updates(run.iteration(0).metrics_path)


RECORDS = {f"{expert}.json" for expert in EXPERTS}


def test_the_same_expert_is_trained_once(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    with claim(run.iteration(0), 1, "train"):
        for expert in ("low_noise", ""):
            with pytest.raises(StillBusy, match="its low_noise expert is being trained by another process"):
                train(run, 0, policy, expert=expert)
        assert train(run, 0, policy, expert="high_noise").missing == ["low_noise"]


@pytest.mark.parametrize("when", ["write_record before", "write_record after", "publish before"])
def test_two_that_end_together_publish_one_policy(
    when: str, rolled: Run, trained: Run, policy: Policy, other: Policy, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The other expert's process comes to its end at the worst moments of this one."""
    run = training.fork(rolled, tmp_path / "run")
    name, _, place = when.partition(" ")
    if name == "publish":  # both have said that they are trained, and are about to publish
        train(run, 0, other, expert="low_noise")
    real = getattr(train_run, name)

    def together(*arguments: Any, **named: Any) -> Any:
        monkeypatch.undo()
        result = real(*arguments, **named) if place == "after" else None
        train(run, 0, other, expert="low_noise")
        return result if place == "after" else real(*arguments, **named)

    monkeypatch.setattr(train_run, name, together)
    report = train(run, 0, policy, expert="high_noise")
    assert report.fingerprint == read_json(trained.iteration(0).policy_record_path)["fingerprint"]
    assert contents(run) == contents(trained)


def test_the_record_of_another_training_is_refused(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run")
    train(run, 0, policy, expert="high_noise")
    anew = training.fork(run, tmp_path / "anew", learning_rate=2e-3)
    shutil.rmtree(anew.iteration(0).train_dir)
    with pytest.raises(RunFailed, match=r"high_noise\.json is of another training than .*plan\.json"):
        train(anew, 0, policy, expert="low_noise")


def test_an_expert_that_is_not_there_is_refused(rolled: Run, policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--expert middle: .* has no such expert") as caught:
        train(rolled, 0, policy, expert="middle")
    assert caught.value.hint == "it has high_noise and low_noise"
    assert not rolled.iteration(0).policy_dir.exists()


# --- At once ---------------------------------------------------------------------------------------------------------


TRACKER = """class Lines:
    def __init__(self, project):
        pass

    def log(self, values, step):
        with open(FILE, "a") as file:
            file.writelines(f"{name}:{step}\\n" for name in values if name.endswith("/loss"))
"""


def test_a_helper_trains_the_other_expert(rolled: Run, trained: Run, policy: Policy, tmp_path: Path) -> None:
    """Its updates reach the trackers of this process, once each."""
    run = training.fork(rolled, tmp_path / "run", experts_at_once=True)
    seen: list[int] = []

    def wait() -> None:
        """Until the helper has the low-noise expert; it may have published by then what it can."""
        deadline = time.monotonic() + PATIENCE
        while not seen and not run.iteration(0).expert_record_path("low_noise").exists():
            held = owners.holder(run.iteration(0), 1, "train")
            seen.extend([held.owner.pid] if held and held.owner else [])
            assert time.monotonic() < deadline, "the helper does not come"
            time.sleep(0.01)

    tracker = tmp_path / "lines.py"
    tracker.write_text(TRACKER.replace("FILE", repr(str(tmp_path / "lines.txt"))), encoding="utf-8")
    tracked = Run.open(run.path, [f"track.to=['{tracker}:Lines']"])
    with tracking(tracked):
        report = train_at_once(tracked, 0, policy, at_update(1, wait))
    assert os.getpid() not in seen
    assert sorted((tmp_path / "lines.txt").read_text().split()) == [
        "high_noise/loss:1", "high_noise/loss:2", "low_noise/loss:1", "low_noise/loss:2"
    ]  # fmt: skip
    assert report.updates == {"high_noise": 2, "low_noise": 2}
    assert contents(run) == contents(trained)
    assert train_at_once(run, 0, policy).skipped


class Ended:
    """Helpers that come to that end with whatever they are given."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def submit(self, *_: Any) -> Future[TrainReport]:
        future: Future[TrainReport] = Future()
        future.set_exception(self.error)
        return future


@pytest.mark.parametrize("error", [BrokenProcessPool("killed"), MemoryError()], ids=["killed", "out of memory"])
def test_a_helper_that_dies_costs_nothing_but_time(
    error: Exception, rolled: Run, trained: Run, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training.fork(rolled, tmp_path / "run", experts_at_once=True)
    monkeypatch.setattr(at_once, "start_helpers", lambda count: Ended(error))
    report = train_at_once(run, 0, policy)
    assert report.updates == {"high_noise": 2, "low_noise": 2}
    assert contents(run) == contents(trained)


def test_what_ends_a_helper_is_told(
    rolled: Run, policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds its expert, and fails when this process has trained its own."""
    run = training.fork(rolled, tmp_path / "run", experts_at_once=True)
    nan = RunFailed("low_noise expert, update 1: the gradient norm is nan")
    monkeypatch.setattr(at_once, "start_helpers", lambda count: Ended(nan))
    with claim(run.iteration(0), 1, "train"), pytest.raises(RunFailed, match="the gradient norm is nan"):
        train_at_once(run, 0, policy)
    assert not run.iteration(0).trained()


def test_where_two_processes_train(rolled: Run, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at_once, "train_need", lambda _: Need("train", device=2000, host=1000, parts={}, reserved=2000))

    def device(workers: int, wanted: bool | str, cores: int = 2, memory: int | None = None) -> str | None:
        config = rolled.config
        settings = {
            "rollout": config.rollout.model_copy(update={"workers": workers}),
            "train": config.train.model_copy(update={"experts_at_once": wanted}),
        }
        run = Run(rolled.path)
        run.__dict__["config"] = config.model_copy(update=settings)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        monkeypatch.setattr(at_once, "available_memory_bytes", lambda: memory)
        return second_device(run, policy)

    assert device(2, "auto") == "cpu"
    assert device(2, "auto", memory=3001) == "cpu"
    assert device(2, "auto", memory=3000) is None
    assert device(2, "auto", cores=1) is None
    assert device(1, "auto") is None
    assert device(1, True, cores=1, memory=3000) == "cpu"
    assert device(2, False) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert device(2, True) is None
