"""Signals: what is in work is finished and kept, ranks end together, nobody outlives a rank that was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import cli
from rollout.policy import Policy
from score.run import score
from shards.errors import RunFailed, Stopped
from shards.process.signals import check, stoppable, stopping
from shards.run import Run
from tests.score.test_score_run import make
from tests.support import forks, training
from train import checkpoint_files, ranks
from train.run import train

UPDATES = 3


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell may have started the tests with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- Noting a signal -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_waits_until_it_is_asked_for(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with stoppable():
        check("before anything")
        send(number)
        assert stopping() == number
        with pytest.raises(Stopped, match=f"stopped by {number.name} in shard 3") as caught:
            check("in shard 3")
    assert caught.value.exit_code == code
    assert stopping() is None
    assert signal.getsignal(number) == before


def test_the_second_interrupt_is_at_once() -> None:
    with stoppable():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert stopping() is None


def test_the_signals_of_a_batch_system_may_come_again() -> None:
    with stoppable():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            send(number)
        assert stopping() == signal.SIGTERM


def test_an_inner_stage_leaves_the_note_to_the_outer_one() -> None:
    with stoppable():
        with stoppable():
            send(signal.SIGTERM)
        assert stopping() == signal.SIGTERM
    assert stopping() is None


def test_an_ignored_interrupt_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stoppable():
        send(signal.SIGINT)
        assert stopping() is None


def test_another_thread_may_use_it_too() -> None:
    seen: list[BaseException] = []

    def work() -> None:
        try:
            with stoppable():
                check("in a thread")
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not seen


def test_a_plain_error_of_one_process_is_no_lost_rank() -> None:
    with pytest.raises(RuntimeError, match="Connection closed by peer") as caught, ranks.lost_ranks():
        raise RuntimeError("Connection closed by peer")
    assert not isinstance(caught.value, RunFailed)


# --- Training under signals ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tiny_t2v2: Path) -> Policy:
    return Policy.load(str(tiny_t2v2), device="cpu", text_length=training.TEXT_LENGTH)


@pytest.fixture(scope="module")
def rolled(tiny_t2v2: Path, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Iteration 0 sampled and scored, not trained."""
    run = training.make_run(tmp_path_factory.mktemp("signals") / "run", tiny_t2v2, {"updates_per_rollout": UPDATES})
    training.advise(training.roll(run, 0, policy))
    return run


@pytest.fixture(scope="module")
def undisturbed(rolled: Run, policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same, trained in one go by one process."""
    run = training.fork(rolled, tmp_path_factory.mktemp("signals") / "undisturbed")
    train(run, 0, policy)
    return run


def signalled(
    folder: Path, count: int, when: Callable[..., bool], number: int, victim: int, *arguments: object
) -> list[forks.Fork]:
    """Ranks of the command line that have ended; the first one sends `number` to rank `victim` once `when` is true.

    `when` is asked at every report of progress.
    """

    @contextmanager
    def progress(label: str) -> Iterator[Callable[..., None]]:
        def report(done: int, total: int, unit: str, note: str = "") -> None:
            if when(done, unit, note):
                os.kill(int((folder / f"pid-{victim}").read_text()), number)

        yield report

    def work() -> None:
        (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
        cli.show = progress  # type: ignore[assignment]
        forks.rushes(*arguments)()

    started = forks.ranks(folder, *[work] * count)
    for rank in started:
        rank.wait()
    return started


def at_update(expert: str, update: int) -> Callable[..., bool]:
    return lambda done, unit, note: unit == "updates" and done == update and note.startswith(expert)


def lines(run: Run) -> list[tuple[str, int]]:
    """Expert and number of the updates in the metrics."""
    records = [json.loads(line) for line in (run.iteration(0).policy_dir / "metrics.jsonl").open()]
    return [(record["expert"], record["update"]) for record in records]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_training_stops_after_the_update_and_goes_on_in_the_same_bits(
    number: signal.Signals, code: int, rolled: Run, undisturbed: Run, policy: Policy, tmp_path: Path
) -> None:
    run = training.fork(rolled, tmp_path / "run", save_every=UPDATES)  # the signal alone makes it write
    when = at_update("high_noise", 2)
    [process] = signalled(tmp_path / "process", 1, when, number, 0, "train", run.path, "--iteration", 0)
    assert process.code == code
    assert process.said == (
        f"rushes: stopped by {number.name} after update 2 of the high_noise expert "
        "(hint: run the same command again; it continues from there)\n"
    )
    assert lines(run) == [("high_noise", 1), ("high_noise", 2)]
    assert [path.name for path in (run.iteration(0).policy_dir / "trainer" / "high_noise").iterdir()] == [
        "update-000002"
    ]
    seen: list[int] = []
    train(run, 0, policy, lambda done, total, unit, note="": seen.append(done) if unit == "updates" else None)
    assert seen == [3, 1, 2, 3]
    assert training.equal(training.weights(run, 0), training.weights(undisturbed, 0))
    assert training.equal(training.weights(run, 0, "ema"), training.weights(undisturbed, 0, "ema"))


def test_rollout_stops_between_samples(tiny_t2v2: Path, policy: Policy, tmp_path: Path) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v2)
    folder = tmp_path / "process"
    [process] = signalled(folder, 1, lambda done, *_: done == 2, signal.SIGTERM, 0, "rollout", run.path)
    assert process.code == 75
    # a chunk is counted when the next one is sampled, which was the last of the shard
    assert process.said.startswith("rushes: stopped by SIGTERM in shard 1 of iter-0000 (hint: run the same command")
    assert training.frame_of(training.roll(run, 0, policy)).shape[0] == 2 * training.GROUP


def test_score_stops_between_shards(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run", groups=3, groups_per_shard=1)

    def progress(done: int, total: int, unit: str, note: str = "") -> None:
        if done:
            send(signal.SIGTERM)

    with stoppable(), pytest.raises(Stopped, match=r"stopped by SIGTERM in iter-0000 score \(hint"):
        score(run, stage, progress=progress)
    report = score(run, stage)
    assert report.skipped == [0]  # the one that was in work
    assert report.done == [1, 2]
    assert not report.pending


def test_ranks_stop_together_and_outlive_no_killed_one(
    rolled: Run, undisturbed: Run, policy: Policy, tmp_path: Path
) -> None:
    """Two ranks; a signal reaches one; two again; one is killed without a word; the rest is done by one process."""
    run = training.fork(rolled, tmp_path / "run")
    command = ("train", run.path, "--iteration", 0)
    one, other = signalled(tmp_path / "first", 2, at_update("high_noise", 1), signal.SIGTERM, 1, *command)
    assert (one.code, other.code) == (75, 75)
    match = re.match(r"rushes: stopped by SIGTERM after update (\d) of the high_noise expert", one.said)
    assert match, one.said
    assert one.said.count("\n") == 1
    assert other.said == ""
    assert lines(run) == [("high_noise", number + 1) for number in range(int(match[1]))]
    one, other = signalled(tmp_path / "second", 2, at_update("low_noise", 1), signal.SIGKILL, 1, *command)
    assert (one.code, other.code) == (1, -signal.SIGKILL)
    assert "rank 0: another rank has ended or cannot be reached" in one.said
    assert "Traceback" not in one.said
    killed = (run.iteration(0).policy_dir / "metrics.jsonl").stat().st_mtime  # the kill followed the line of an update
    assert (one.folder / "said").stat().st_mtime - killed < 60
    assert not run.iteration(0).trained()
    train(run, 0, policy)
    ours, theirs = training.weights(run, 0), training.weights(undisturbed, 0)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)


def test_a_rank_that_dies_while_it_writes_is_not_taken_for_a_full_disk(rolled: Run, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run", async_checkpoints=False)

    def work() -> None:
        if os.environ["RANK"] == "1":
            checkpoint_files.Writer.write_data = training.kill_self  # type: ignore[assignment]
        forks.rushes("train", run.path, "--iteration", 0)()

    one, other = forks.ranks(tmp_path / "ranks", work, work)
    assert (one.wait(), other.wait()) == (1, -signal.SIGKILL)
    assert "rank 0: another rank has ended or cannot be reached" in one.said
    assert "could not be written" not in one.said
