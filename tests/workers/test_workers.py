"""Workers on one run: killed, late, waiting, without claims, as ranks of torchrun; always the same files."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cli
from rollout import worker as rollout_work
from rollout.policy import Policy
from rollout.policy.ulysses import shared_tokens
from rollout.ranks.world import World
from rollout.run import rollout
from score.run import score
from shards import files, sidecar
from shards.errors import NothingLeft, RunFailed, StillBusy, UserError
from shards.process.progress import Progress
from shards.reader import open_shard
from shards.run import Run, Stage
from shards.spool import spooled
from shards.verify.shards import verify
from shards.workers import claims
from shards.workers.assignment import Assignment
from shards.workers.claims import claim
from shards.workers.owners import claims_of
from tests.rollout.test_rollout import contents, differences
from tests.support.forks import Fork, finish, ranks, rushes
from tests.support.tiny_models import TEXT_LENGTH
from tests.support.workers import same_tables, small_run

PATIENCE = 300.0  # seconds; a loaded machine starts Python slowly


@pytest.fixture(scope="module")
def policy(tiny_t2v2: Path) -> Policy:
    return Policy.load(tiny_t2v2, device="cpu", text_length=TEXT_LENGTH)


@pytest.fixture(scope="module")
def alone(tiny_t2v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """An iteration that one process sampled and scored in peace."""
    run = small_run(tmp_path_factory.mktemp("alone") / "run", tiny_t2v2)
    cli.app(["loop", str(run.path), "--iterations", "1"], standalone_mode=False)
    return run.iteration(0)


def same(one: Stage, other: Stage) -> None:
    """The same videos, trajectories, scores and advantages, bit for bit, and nothing left behind."""
    assert verify(one.run_path) == []
    assert differences(contents(one), contents(other)) == []
    assert not (one.path / "work").exists()
    same_tables(one, other)


def signalled(number: int, *arguments: object) -> Callable[[], None]:
    """The command line with these arguments, which gets a signal when its first sample is in the spool."""

    def work() -> None:
        write = rollout_work.write_samples

        def written(*sample: Any) -> bool:
            done = write(*sample)
            os.kill(os.getpid(), number)
            return done

        rollout_work.write_samples = written
        rushes(*arguments)()

    return work


def test_another_worker_goes_on_with_the_spool_of_a_killed_one(
    alone: Stage, policy: Policy, tiny_t2v2: Path, tmp_path: Path
) -> None:
    run = small_run(tmp_path / "run", tiny_t2v2)
    stage = run.iteration(0)
    worker = Fork(tmp_path / "worker", signalled(signal.SIGKILL, "rollout", run.path, "--worker", "1/3"))
    assert worker.wait() == -signal.SIGKILL
    assert [len(spooled(stage, shard)) for shard in range(6)] == [0, 1, 0, 0, 0, 0]
    assert len(claims_of(stage)) == 1
    report = rollout(run, stage, policy, worker=(0, 3))
    assert (report.done, report.skipped, report.busy) == (11, 1, 0)
    score(run, stage)
    same(stage, alone)


def test_without_claims_two_workers_at_once_make_the_same(alone: Stage, tiny_t2v2: Path, tmp_path: Path) -> None:
    """First writer wins: claims save double work and nothing else."""
    run = small_run(tmp_path / "run", tiny_t2v2, "workers.claim_seconds=0.0")
    for stage in ("rollout", "score"):
        command = rushes(stage, run.path, "--iteration", "0")
        finish(*[Fork(tmp_path / f"{stage}-{number}", command) for number in range(2)])
    same(run.iteration(0), alone)


def test_a_late_worker_says_so(
    alone: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(alone.run_path)
    for stage in ("rollout", "score"):
        cli.app([stage, path, "--iteration", "0"], standalone_mode=False)  # by hand: nothing to do, and all is well
        monkeypatch.setattr(sys, "argv", ["rushes", stage, path, "--iteration", "0", "--worker", "1/4"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 3
        assert f"rushes: iter-0000 {stage}: nothing is left for this worker" in capsys.readouterr().err
        with monkeypatch.context() as patch:
            patch.setenv("SLURM_ARRAY_TASK_ID", "7")
            patch.setenv("SLURM_ARRAY_TASK_MIN", "4")
            patch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
            assert Assignment.of("", False) == Assignment((3, 4), wait=False, late=True)
            with pytest.raises(NothingLeft):
                cli.app([stage, path, "--iteration", "0"], standalone_mode=False)


@pytest.mark.parametrize(
    ("tasks", "step", "parts"), [((3, 7), 4, [0, 1]), ((0, 2, 4), 2, [0, 1, 2]), ((1, 2, 9), 1, [0, 1, 2])]
)
def test_an_array_may_have_gaps(
    tasks: tuple[int, ...], step: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", str(tasks[0]))
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", str(step))
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", str(len(tasks)))
    for task, part in zip(tasks, parts, strict=True):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        assert Assignment.of("", False).part == (part, len(tasks))


@pytest.mark.parametrize(
    ("worker", "variables", "problem"),
    [
        ("0/0", {}, "--worker 0/0: there are no 0 workers"),
        ("-1/2", {}, "--worker -1/2: -1 is not between 0 and 1"),
        ("", {"ID": "x"}, "SLURM_ARRAY_TASK_ID = 'x' in the environment is not a number"),
        ("", {"ID": "1", "COUNT": "-1"}, "SLURM_ARRAY_TASK_COUNT = '-1' in the environment is not a number"),
    ],
)
def test_a_share_that_makes_no_sense_is_named(
    worker: str, variables: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(UserError) as caught:
        Assignment.of(worker, False)
    assert caught.value.problem == problem


@pytest.mark.parametrize(("variables", "late"), [({"ID": ""}, False), ({"ID": "3", "COUNT": "0", "STEP": ""}, True)])
def test_variables_without_a_value_are_not_set(
    variables: dict[str, str], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that sets them by hand may leave them empty."""
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert Assignment.of("", False) == Assignment((0, 1), wait=False, late=late)


def test_ranks_are_workers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of an array task; they wait for each other, and none of them fails for being late."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert Assignment.of("", False) == Assignment((1, 2), wait=True, late=False)
    assert Assignment.of("2/3", False) == Assignment((5, 6), wait=True, late=False)


@pytest.mark.parametrize("what", ["rollout", "score"])
def test_a_worker_waits_for_others_or_says_that_they_work(
    what: str, alone: Stage, policy: Policy, tiny_t2v2: Path, tmp_path: Path
) -> None:
    run = small_run(tmp_path / "run", tiny_t2v2)
    stage = run.iteration(0)
    if what == "score":
        rollout(run, stage, policy)

    def work(wait: bool) -> int:
        """Shards that others hold at the end."""
        if what == "rollout":
            return rollout(run, stage, policy, wait=wait).busy
        return len(score(run, stage, wait=wait).pending)

    with claim(stage, 2, what):
        assert work(wait=False) == 1
        left: list[int] = []
        waiting = threading.Thread(target=lambda: left.append(work(wait=True)))
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
    waiting.join(PATIENCE)
    assert left == [0]
    score(run, stage)
    same(stage, alone)


def test_nobody_waits_for_rollouts_that_nobody_makes(policy: Policy, tiny_t2v2: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", tiny_t2v2, "workers.claim_seconds=1.0")
    stage = run.iteration(0)
    with claim(stage, 5, "rollout"):
        rollout(run, stage, policy)
    with pytest.raises(StillBusy, match=r"shard 5 is not sampled, and nobody samples"):
        score(run, stage, wait=True)
    assert len(sidecar.scorers(stage)) == 2


def test_a_stopped_worker_ends_with_75_and_leaves_no_claim(tiny_t2v2: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", tiny_t2v2)
    stage = run.iteration(0)
    worker = Fork(tmp_path / "worker", signalled(signal.SIGTERM, "rollout", run.path, "--worker", "0/2"))
    assert worker.wait() == 75
    assert "rushes: stopped by SIGTERM" in worker.said
    assert claims_of(stage) == []


@pytest.mark.parametrize("what", ["rollout", "score"])
def test_progress_is_that_of_the_stage(
    what: str, policy: Policy, tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first worker has its first shard in hand, the second one does all the others."""
    run = small_run(tmp_path / "run", tiny_t2v2)
    stage = run.iteration(0)
    monkeypatch.setattr("shards.workers.worker.LOOK_EVERY", 0.0)
    if what == "score":
        rollout(run, stage, policy)
    seen: list[tuple[int, int]] = []

    def work(progress: Progress | None, worker: tuple[int, int]) -> None:
        if what == "rollout":
            rollout(run, stage, policy, progress, worker)
        else:
            score(run, stage, progress=progress, worker=worker)

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        seen.append((done, total))
        if len(seen) == 1:
            work(None, (1, 2))

    work(progress, (0, 2))
    assert seen[0][0] < 3
    assert seen[-1] == (12, 12)
    assert sorted(seen) == seen


@pytest.mark.slow
def test_ranks_make_what_one_process_makes(alone: Stage, tiny_t2v2: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", tiny_t2v2)
    talk = finish(*ranks(tmp_path / "loop", *[rushes("loop", run.path, "--iterations", 1)] * 2))
    same(run.iteration(0), alone)
    assert run.iteration(0).trained()
    for result in ("videos sampled", "shards scored", "; policy "):
        assert sum(result in line for line in talk.splitlines()) == 1, talk  # one rank speaks for all
    assert "12/12 videos" in talk
    workers = {manifest(run.iteration(0), shard)["info"].get("worker") for shard in range(6)}
    assert workers <= {"0/2", "1/2"}
    again = finish(*ranks(tmp_path / "eval", *[rushes("eval", run.path, "--iteration", 0)] * 2))
    rows = [line for line in again.splitlines() if line.split()[:1] in (["iteration"], ["0"])]
    assert len(rows) == 2


def manifest(stage: Stage, shard: int) -> dict[str, Any]:
    """The manifest of a shard."""
    return files.read_json(stage.manifest_path(shard))


def refused(folder: Path, *runs: Path) -> str:
    """A rank on each of these run directories, of which none may work: what they said to the user."""
    started = ranks(folder, *[rushes("rollout", run) for run in runs])
    assert {rank.wait() for rank in started} == {2}
    return "\n".join(line for rank in started for line in rank.said.splitlines() if line.startswith("rushes: "))


@pytest.mark.slow
def test_ranks_that_do_not_mean_the_same_run_are_ended(
    tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = small_run(tmp_path / "run", tiny_t2v2), Run(tmp_path / "copy")
    shutil.copytree(one.path, other.path)
    monkeypatch.setattr("rollout.ranks.agreement.PATIENCE", 1.0)
    said = refused(tmp_path / "first", one.path, other.path)
    assert said == (
        f"rushes: rank 1 of 2: {other.path} is not the run directory that rank 0 has as {one.path} (hint: all ranks "
        "need the same run directory, on a file system that all machines share)"
    )
    third = small_run(tmp_path / "third", tiny_t2v2, "rollout.eta=0.5")
    said = refused(tmp_path / "second", one.path, third.path)
    assert said.startswith("rushes: rank 1 has another configuration than rank 0: ")
    assert len(said.splitlines()) == 1
    for run in (one, other, third):
        assert [path.name for path in run.path.iterdir()] == ["run.toml"]


def test_a_stage_of_another_version_is_refused(
    alone: Stage, policy: Policy, monkeypatch: pytest.MonkeyPatch, tiny_t2v2: Path, tmp_path: Path
) -> None:
    run = small_run(tmp_path / "run", tiny_t2v2)
    stage = run.iteration(0)
    with claim(stage, 3, "rollout"):
        rollout(run, stage, policy)
    monkeypatch.setattr("rollout.run.our_version", lambda: "99.0")
    with pytest.raises(UserError, match=r"was begun by rushes .*, this is 99\.0"):
        rollout(run, stage, policy)
    assert stage.shards() == [0, 1, 2, 4, 5]


def test_a_full_quota_is_named_and_nothing_is_left(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, tiny_t2v2: Path, tmp_path: Path
) -> None:
    run = small_run(tmp_path / "run", tiny_t2v2)
    stage = run.iteration(0)
    writev = os.writev

    def full(handle: int, buffers: Any) -> int:
        if any(spooled(stage, shard) for shard in range(6)):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return writev(handle, buffers)

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        with pytest.raises(RunFailed, match="disk full"):
            rollout(run, stage, policy)
    assert not list(run.path.rglob(".tmp-*"))
    assert claims_of(stage) == []
    assert stage.shards() == []
    with monkeypatch.context() as patch:
        patch.setattr(claims, "open_creating", no_room)
        with pytest.raises(RunFailed, match=r"claim-0001: cannot be written: Disk quota exceeded"):
            rollout(run, stage, policy)


def no_room(*arguments: object) -> int:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


@pytest.mark.slow
def test_ranks_that_share_the_tokens_of_a_video_make_the_same(alone: Stage, tiny_t2v2: Path, tmp_path: Path) -> None:
    """All of a loop: rollouts under Ulysses, then a training without it, with the same policy in memory."""
    run = small_run(tmp_path / "run", tiny_t2v2, "rollout.ulysses=2")
    finish(*ranks(tmp_path / "loop", *[rushes("loop", run.path, "--iterations", 1)] * 2))
    for number in alone.shards():
        one, other = open_shard(run.iteration(0), number), open_shard(alone, number)
        assert one.keys == other.keys
        for key in one.keys:
            assert one.meta(key)["noise_seeds"] == other.meta(key)["noise_seeds"]
            for name, tensor in one.trajectory(key).items():  # half as many rows in a matrix may round otherwise
                torch.testing.assert_close(tensor, other.trajectory(key)[name], rtol=1e-5, atol=1e-5)
    assert {manifest(run.iteration(0), shard)["info"]["worker"] for shard in range(6)} == {"0/1"}
    assert run.iteration(0).trained()


def test_degrees_that_do_not_divide_are_named(policy: Policy, tiny_t2v2: Path, tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", tiny_t2v2, "rollout.ulysses=3")
    with pytest.raises(UserError, match=r"rollout\.ulysses = 3: 1 ranks cannot be divided so") as error:
        rollout(run, run.iteration(0), policy)
    assert "torchrun" in error.value.hint
    with pytest.raises(UserError, match=r"rollout\.ulysses = 3: does not divide the 2 heads and \d+ tokens"):
        shared_tokens(policy, (16, 16, 5), World(0, 3, 3)).__enter__()
