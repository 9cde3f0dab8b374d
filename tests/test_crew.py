"""Several processes sample one stage and make what one process makes; a helper that dies leaves no hole."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rollout import crew, generate
from rollout.policy import Policy
from shards.errors import UserError
from shards.reader import open_shard
from shards.run import Run, Stage
from tests import training


@pytest.fixture(autouse=True)
def no_helpers_left() -> Iterator[None]:
    """Helpers end with their test."""
    yield
    crew.discard_helpers()


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


def test_two_processes_sample_what_one_samples(tiny_t2v2: Path, tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", tiny_t2v2, 1), make(tmp_path / "two", tiny_t2v2, 2)
    alone = generate.rollout(one, one.iteration(0), Policy.of(one.config.model))
    policy = Policy.of(two.config.model)
    assert crew._pool(1).submit(crew._complete, two.iteration(0)).result() is False  # the helper is up
    report = crew.rollout(two, two.iteration(0), policy)
    assert (report.done, report.skipped, report.busy) == (alone.done, 0, 0)
    again = crew.rollout(two, two.iteration(0), policy)
    assert (again.done, again.skipped) == (0, alone.done)
    assert samples(two.iteration(0)) == samples(one.iteration(0)) != {}


def test_a_helper_that_dies_leaves_no_hole(tiny_t2v2: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "run", tiny_t2v2, 2)
    helper = crew._pool(1).submit(os.getpid).result()
    os.kill(helper, signal.SIGKILL)
    report = crew.rollout(run, run.iteration(0), Policy.of(run.config.model))
    assert report.busy == 0
    assert len(run.iteration(0).shards()) == run.iteration(0).expected() > 1


def test_what_is_wrong_is_told_by_the_first_process(tiny_t2v2: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "run", tiny_t2v2, 2)
    with pytest.raises(UserError, match="iteration 3 samples with the policy"):
        crew.rollout(run, run.iteration(3), Policy.of(run.config.model))
    assert not crew._pools
