"""The script for the first minutes on a GPU, run on the CPU: every step is there, and the page is kept."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import first_gpu
from bench.gpu.found import Finding, Place

PAGE = "before\n<!-- begin gpu -->\nold\n<!-- end gpu -->\nafter\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "good"), [((1, 2, 6, 7), 4), pytest.param((1, 2, 3, 4, 5, 6, 7), 25, marks=pytest.mark.long)]
)
def test_the_small_script_finds_all_as_it_should_be(steps: tuple[int, ...], good: int, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    arguments = ["--small", "--out", str(tmp_path / "out"), "--page", str(page)]
    found = first_gpu.main([*arguments, "--steps", *map(str, steps)])
    assert [one for one in found if one.ok is False] == []
    assert {one.step for one in found} == set(steps)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- begin gpu -->\n`python bench/first_gpu.py --small")
    assert text.endswith("<!-- end gpu -->\nafter\n")
    assert "\nold\n" not in text
    assert "Not taken on a GPU" in text
    assert text.count("| yes |") >= good
    ratios = [one for one in found if " / " in one.what]
    assert [one.what.split(": ")[1] for one in ratios] == [
        "rollout / bare forwards and decodings", "updates / bare forwards and backwards",
        "rollout / WanPipeline.__call__",
    ]  # fmt: skip
    assert all(float(one.found.split(" s / ")[0]) > 0 for one in ratios)
    (peak,) = (one for one in found if "peak of" in one.what)
    assert 1 / 3 < float(peak.found.rpartition(" ")[2]) < 3


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    def fails(place: Place) -> Iterator[Finding]:
        yield Finding(2, "before", "seen", True)
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    def stands(place: Place) -> Iterator[Finding]:
        yield Finding(3, "after", "seen", True)

    told: list[list[Finding]] = []
    place = Place(tmp_path, torch.device("cpu"), small=True, minutes=1)
    found = first_gpu.run_all(place, {2: fails, 3: stands}, lambda known: told.append([*known]))
    assert [one.found for one in found] == ["seen", "RuntimeError: CUDA error: an illegal memory access", "seen"]
    assert [len(known) for known in told] == [2, 3]
    assert found[1].ok is False


def test_spent_minutes_end_a_step_and_those_after_it(tmp_path: Path) -> None:
    def stays(place: Place) -> Iterator[Finding]:
        yield Finding(1, "begun", "seen", True)
        place.in_a_process(time.sleep, 600)

    def never(place: Place) -> Iterator[Finding]:
        raise AssertionError

    place = Place(tmp_path, torch.device("cpu"), small=True, minutes=0.01)
    found = first_gpu.run_all(place, {1: stays, 2: never}, lambda known: None)
    assert [(one.step, one.what) for one in found] == [(1, "begun"), (1, "not finished"), (2, "not finished")]


def test_what_a_process_raises_or_how_it_died_is_told(tmp_path: Path) -> None:
    place = Place(tmp_path, torch.device("cpu"), small=True, minutes=1)
    assert place.in_a_process(abs, -3) == 3
    with pytest.raises(RuntimeError, match="TypeError: bad operand"):
        place.in_a_process(abs, "text")
    with pytest.raises(RuntimeError, match="ended with code 7"):
        place.in_a_process(_die)


def _die() -> None:
    os._exit(7)


def test_shapes_are_read() -> None:
    case = first_gpu.shape("a14b:480x832x81:8")
    assert (case.model, case.height, case.width, case.frames, case.layers) == ("a14b", 480, 832, 81, 8)
    assert first_gpu.shape("i2v-a14b:480x832x13").layers == 0
    with pytest.raises(argparse.ArgumentTypeError, match=r"9b:1x2x3'.*1\.3b"):
        first_gpu.shape("9b:1x2x3")


def test_without_a_device_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--small"):
        first_gpu.main(["--steps", "1"])
