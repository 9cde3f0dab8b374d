"""What is done behind the work: in order, waited for at the end, and its errors told."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from rollout import worker as rollout_work
from rollout.policy import Policy
from rollout.run import rollout
from rollout.sampler import Sampler
from shards.errors import RunFailed, UserError
from shards.process import background as background_module
from shards.process.background import Background
from shards.spool import spooled
from tests.support import training


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_pieces_are_done_in_order_and_told_to_who_settles() -> None:
    done: list[tuple[str, bool]] = []

    def told(name: str) -> None:
        done.append((name, threading.current_thread() is threading.main_thread()))

    with Background() as background:
        for name in ("a", "b"):
            background.add(lambda name=name: told(name) or name.upper(), told)  # type: ignore[misc]
        background.settle()
        assert sorted(done) == [("A", True), ("B", True), ("a", False), ("b", False)]
        background.add(lambda: told("c"))
    assert done[-1] == ("c", False)
    assert not any(name.startswith("background") for name in names())


def test_a_piece_waits_for_long_calls_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    done, seen = threading.Event(), []
    monkeypatch.setattr(background_module, "LONGEST_WAIT", 3600.0)
    with Background() as background:
        background.add(done.set, seen.append)
        assert not done.wait(0.2)
        background.collect()
        assert seen == []
        with background.long_calls():
            assert done.wait(60)
        background.settle()
        assert seen == [None]
        monkeypatch.setattr(background_module, "LONGEST_WAIT", 0.0)
        done.clear()
        background.add(done.set)
        assert done.wait(60)
        monkeypatch.setattr(background_module, "LONGEST_WAIT", 3600.0)
        done.clear()
        background.add(done.set)  # it begins at the end of the block
    assert done.is_set()


def test_an_error_is_told_as_soon_as_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_module, "LONGEST_WAIT", 0.0)

    def fail() -> None:
        raise RunFailed("disk full")

    with pytest.raises(RunFailed, match="disk full"), Background() as background:  # noqa: PT012
        background.add(fail)
        for _ in range(6000):
            background.collect()
            time.sleep(0.01)


def test_the_first_error_is_the_one_that_is_told() -> None:
    def fail() -> None:
        raise RunFailed("disk full")

    def work(error: Exception | None) -> None:
        with Background() as background:
            background.add(fail)
            if error:
                raise error

    with pytest.raises(RunFailed, match="disk full"):
        work(None)
    with pytest.raises(UserError, match="stopped"):
        work(UserError("stopped"))
    assert not any(name.startswith("background") for name in names())


def test_videos_are_written_while_the_next_chunk_is_sampled(
    tiny_t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first chunk is not written before the second one is sampled, and a stop then keeps both."""
    run = training.make_run(tmp_path / "run", tiny_t2v, groups_per_shard=2, low_steps=0, guidance_scale_2=None)
    stage, sampled = run.iteration(0), threading.Event()
    advance, write = Sampler.advance, rollout_work.write_samples
    order: list[str] = []

    def sampling(self: Sampler, *arguments: object) -> None:
        advance(self, *arguments)  # type: ignore[arg-type]
        order.append("sampled")
        if order.count("sampled") == 2:
            sampled.set()
        if order.count("sampled") == 3:
            raise UserError("the third chunk is broken")

    def writing(*arguments: object) -> bool:
        assert sampled.wait(60)
        order.append("written")
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Sampler, "advance", sampling)
    monkeypatch.setattr(rollout_work, "write_samples", writing)
    with pytest.raises(UserError, match="the third chunk is broken"):
        rollout(run, stage, Policy.of(run.config.model))
    assert order.count("written") == 2
    assert len(spooled(stage, 0)) == 3  # chunks of two and of one
    assert order.index("written") > order.index("sampled")
