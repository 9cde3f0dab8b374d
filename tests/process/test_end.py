"""How ranks end: not before the others have heard them, and without taking Python apart under gloo's threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cli
from rollout.ranks.world import World
from shards.errors import Stopped, UserError
from shards.process.signals import stoppable
from tests.support import forks
from train import ranks

ROOT = Path(__file__).parents[2]
LATE = 0.5  # seconds
ENDING = """
import atexit, sys
from shards.process.torchrun import run_to_end

class Last:
    def __del__(self):
        print("taken apart", flush=True)

last = Last()
atexit.register(print, "registered")

def work():
    sys.stdout.write("written, ")
    {last}

{start}
"""


def ended(last: str, start: str = "run_to_end(work)") -> subprocess.CompletedProcess[str]:
    code = ENDING.format(last=last, start=start)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("last", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit('no room')", 1, "no room\n"),
        ("raise ValueError('odd')", 1, "ValueError: odd\n"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt\n"),
    ],
)
def test_a_rank_ends_with_all_said_and_the_interpreter_whole(last: str, code: int, said: str) -> None:
    """Unlike a process alone, for which Python does the same and then takes itself apart."""
    result = ended(last)
    assert (result.returncode, result.stdout) == (code, "written, registered\n")
    assert result.stderr.endswith(said)
    assert ended("pass", "work()").stdout == "written, registered\ntaken apart\n"


def test_a_closed_stdout_does_not_change_the_code() -> None:
    code = ENDING.format(last="sys.exit(3)", start="run_to_end(work)")
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # else the work itself would meet the closed end
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as out:
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, cwd=ROOT, env=buffered, stdout=out, check=False).returncode == 3


def test_the_command_line_ends_so_where_there_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(cli, "run_to_end", lambda work: work())
    monkeypatch.setattr(cli, "main", lambda: called.append("main"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cli.start()
    monkeypatch.setattr(cli, "run_to_end", called.append)
    cli.start()
    assert called == ["main", "main"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    called.clear()
    cli.start()
    assert called[0] is cli.main


def fail(world: World) -> None:
    with pytest.raises(UserError, match="no good"), world.together():
        raise UserError("no good")


def stop(_: World) -> None:
    with stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            ranks.check("here")


@pytest.mark.parametrize("leave", [World.close, fail, stop])
def test_no_rank_leaves_before_the_last_one_has_heard_all(leave: Callable[[World], object], tmp_path: Path) -> None:
    """The last rank is slow to take in what the others have sent it. Both read one clock, that of the machine."""

    def first() -> None:
        leave(World.joined())
        print(time.monotonic())

    def slow(self: World) -> None:
        time.sleep(LATE)
        print(time.monotonic())
        part(self)

    def last() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(World, "part", slow)
            leave(World.joined())

    part = World.part
    children = forks.ranks(tmp_path, first, last)
    forks.finish(*children)
    left, heard = (float(child.out) for child in children)
    assert left >= heard
