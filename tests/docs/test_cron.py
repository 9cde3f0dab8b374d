"""examples/cron: started again and again, at most one at a time, and quiet unless something is wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "cron" / "rushes.sh"
PATIENCE = 300.0  # seconds; a busy machine starts processes slowly
RUSHES = """#!/usr/bin/env bash
echo "$@" >> "$2/calls"
echo "working" >&2
trap 'exit 75' TERM
while [ ! -e "$2/code" ]; do sleep 0.05; done
exit "$(cat "$2/code")"
"""

pytestmark = pytest.mark.skipif(shutil.which("flock") is None, reason="util-linux (flock) is not installed")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory, and beside it a `rushes` that works until it is told its exit code."""
    for name in ("bin", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "rushes").write_text(RUSHES)
    (tmp_path / "bin" / "rushes").chmod(0o755)
    return tmp_path / "run"


def cron(run: Path, *more: str) -> subprocess.Popen[str]:
    """Start the script as cron does."""
    environment = {"PATH": f"{run.parent / 'bin'}:{os.environ['PATH']}"}
    pipe = subprocess.PIPE
    return subprocess.Popen([SCRIPT, run, "5", *more], env=environment, stdout=pipe, stderr=pipe, text=True)


def calls(run: Path, count: int) -> list[str]:
    """The commands given so far, once there are as many."""
    deadline = time.monotonic() + PATIENCE
    while not (run / "calls").exists() or len((run / "calls").read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return (run / "calls").read_text().splitlines()


def finish(run: Path, code: int) -> None:
    """Have `rushes` end with a code, which it finds whole or not at all."""
    (run / "aside").write_text(str(code))
    (run / "aside").rename(run / "code")


def test_a_second_one_ends_at_once_and_the_next_goes_on(run: Path) -> None:
    first = cron(run)
    assert calls(run, 1) == [f"loop {run} --iterations 5"]
    second = cron(run)
    assert second.communicate(timeout=PATIENCE) == ("", "")
    assert second.returncode == 0
    assert first.poll() is None
    first.kill()  # the script alone: what it started still works, and still holds the lock
    first.wait()
    assert cron(run).wait(PATIENCE) == 0
    assert len(calls(run, 1)) == 1
    finish(run, 0)
    deadline = time.monotonic() + PATIENCE
    while len(calls(run, 1)) < 2:
        assert cron(run).wait(PATIENCE) == 0
        assert time.monotonic() < deadline
    assert (run / "cron.log").read_text() == "working\n" * len(calls(run, 1))


@pytest.mark.parametrize(("code", "shown"), [(75, 0), (1, 1), (2, 2)])
def test_only_failures_are_told(code: int, shown: int, run: Path) -> None:
    finish(run, code)
    assert cron(run).wait(PATIENCE) == shown


def test_after_its_hours_it_is_asked_to_end(run: Path) -> None:
    hours = 0.0002
    until = time.monotonic() + PATIENCE
    while not (run / "calls").exists() and time.monotonic() < until:  # a busy machine may not begin in so short a time
        assert cron(run, f"{hours:.4f}").wait(PATIENCE) == 0
        hours *= 2
    assert calls(run, 1) == [f"loop {run} --iterations 5"]
