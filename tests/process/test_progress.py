"""What a stage says while it works, on a terminal of 80 columns and in a log."""

from __future__ import annotations

import pytest

from shards.process import progress
from shards.process.progress import Bar, Lines, in_place
from tests.support.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that moves by its own sleep alone."""
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_count_rate_and_time_left_come_before_the_note(clock: Clock) -> None:
    bar = Bar("eval/iter-0012 rollout")
    clock.sleep(40)
    bar(100, 2048, "videos", "shard 12, i000012-p000034-s03: high-noise steps done")
    fixed = "eval/iter-0012 rollout 100/2048 videos, 2.50/s, 12:59 left"
    assert bar.line(80) == f"{fixed} ────────────"
    assert bar.line(90) == f"{fixed} ──────────── shard 12, i00001…"
    assert bar.line(200) == f"{fixed} ──────────── shard 12, i000012-p000034-s03: high-noise steps done"
    for width in range(20, 61):  # nothing but the counts, as far as they go
        assert len(bar.line(width)) <= width - 1
        assert bar.line(width)[: width - 2] == fixed[: width - 2]
    clock.sleep(59)
    assert "12:00 left" in bar.line(80)


def test_a_slow_unit_has_its_seconds_and_a_new_unit_its_own_rate(clock: Clock) -> None:
    bar = Bar("train")
    clock.sleep(100)
    bar(10, 10, "transitions")
    clock.sleep(20)
    bar(1, 4, "updates")
    assert bar.line(80).startswith("train 1/4 updates, 20 s each, 1:00 left ━━━")
    clock.sleep(3 * 20)
    bar(4, 4, "updates")
    assert bar.line(80) == "train 4/4 updates, 20 s each ━━━━━━━━━━━━"


def test_before_anything_is_known_there_is_the_stage(clock: Clock) -> None:
    bar = Bar("iter-0000 score")
    assert bar.line(80) == "iter-0000 score"
    bar(0, 8, "videos", "loading ocr")
    assert bar.line(80) == "iter-0000 score 0/8 videos ──────────── loading ocr"


def test_lines_of_a_log_come_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines("score")
    lines(0, 8, "videos", "loading ocr")
    for done in range(1, 9):
        clock.sleep(10)
        lines(done, 8, "videos")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "score: 0/8 videos; loading ocr",
        "score: 2/8 videos, 0.10/s, 1:00 left",
        "score: 4/8 videos, 0.10/s, 0:40 left",
        "score: 6/8 videos, 0.10/s, 0:20 left",
        "score: 8/8 videos, 0.10/s",
    ]


def test_a_watched_text_replaces_what_was_there() -> None:
    text = in_place("one\ntwo", 5.0)
    assert text.startswith("\x1b[Hone\x1b[K\ntwo\x1b[K\n")
    assert "again every 5 s" in text
    assert text.endswith("\x1b[J")
