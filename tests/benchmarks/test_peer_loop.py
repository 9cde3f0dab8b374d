"""The loop in one process beside rushes: its reward is that of rushes, and its page says what was measured."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from bench import peer_loop
from bench.peer_loop import Mark
from score.ocr import similarity
from shards.run import Run


@pytest.mark.parametrize("text", ["FILM", "film", "FIL", "FLIM!", "", "A LONG OTHER TEXT"])
def test_it_rewards_as_rushes_does(text: str) -> None:
    judged = similarity.judge([text], 'a sign "FILM"', None, mode="default", fold_confusables=False)
    assert peer_loop.similarity(text, "FILM") == pytest.approx(judged.reward)


def test_the_page_says_speed_and_minutes() -> None:
    marks = [Mark(0, 0.0, 12.0, 0.40, 0.41), Mark(6, 120.0, 360.0, 0.50, 0.52), Mark(12, 240.0, 720.0, 0.56, 0.55)]
    text = peer_loop.section(marks, "command", threads=2, inner=15.0)
    assert "| 6 | 2.0 | 0.500 | 6.0 | 0.520 |" in text
    assert "rushes 180, one process 60, ratio 3.00" in text
    assert "rushes 4.0, one process not reached" in text
    assert "takes 15.0 s, 240 an hour; one of the peer 59.0 s: ratio 3.93" in text


def test_a_start_of_processes_is_left_out_of_the_steady_seconds(tmp_path: Path) -> None:
    began = {0: 0.0, 1: 30.0, 2: 40.0, 3: 60.0, 4: 100.0, 5: 114.0}  # blocks of three: 30 and 40 begin one, 20 ends one
    run = Run(tmp_path)
    for number, second in began.items():
        path = run.iteration(number).plan_path
        path.parent.mkdir()
        path.touch()
        os.utime(path, (second, second))
    assert peer_loop.steady(run, 6, 3) == pytest.approx((10.0 + 14.0) / 2)
    assert math.isnan(peer_loop.steady(run, 2, 2))
