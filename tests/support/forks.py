"""Processes forked from the test's own: with torch in memory already, workers and ranks start at once."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch.utils.tensorboard  # noqa: F401

import rollout.policy.sharding  # noqa: F401 (like the next ones: what children use, they have then)
import score.run  # noqa: F401
import train.run  # noqa: F401
from rollout.processes import helpers
from score.process import processes
from tests.support.ports import free_port

PATIENCE = 900.0  # seconds after which a child hangs; less than the half hour that a rank waits for another one
POOLS = (helpers, processes)
Work = Callable[[], object]
_inherited: list[Any] = []
_living: list[Fork] = []


class Fork:
    """A child that does one thing; what it says goes to the files `out` and `said` (stderr) of its folder."""

    def __init__(self, folder: Path, work: Work, **environment: str) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.code: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _be_child(folder, work, environment)
        _living.append(self)

    @property
    def out(self) -> str:
        """What it wrote to stdout."""
        return (self.folder / "out").read_text()

    @property
    def said(self) -> str:
        """What it wrote to stderr."""
        return (self.folder / "said").read_text()

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code, or minus the number of the signal that killed it. Fails, and kills it, when it hangs."""
        deadline = time.monotonic() + PATIENCE
        while self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.code = os.waitstatus_to_exitcode(status)
                _living.remove(self)
            elif time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"{self.folder} does not end: {self.said}")
            else:
                time.sleep(0.005)
        return self.code

    def end(self) -> None:
        """Kill it."""
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        _living.remove(self)


def end_all() -> None:
    """Kill every child that nobody waited for."""
    while _living:
        _living[-1].end()


def ranks(folder: Path, *work: Work) -> list[Fork]:
    """Ranks of one world, started as `srun` starts them: with an environment, and without an agent that watches."""
    size, port = str(len(work)), str(free_port())
    world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Fork(folder / f"rank-{rank}", one, RANK=str(rank), LOCAL_RANK=str(rank), **world)
        for rank, one in enumerate(work)
    ]


def finish(*children: Fork) -> str:
    """Wait for children that must end well; what all of them wrote."""
    codes = [child.wait() for child in children]
    assert codes == [0] * len(children), "\n".join(child.said[-4000:] for child in children)
    return "".join(child.out + child.said for child in children)


def rushes(*arguments: object) -> Work:
    """The command line with these arguments."""

    def work() -> None:
        import cli

        sys.argv = ["rushes", *map(str, arguments)]
        cli.main()

    return work


def _be_child(folder: Path, work: Work, environment: dict[str, str]) -> NoReturn:
    code = 99
    try:
        for number, name in ((1, "out"), (2, "said")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        os.environ.update(environment)
        _forget()
        work()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            for pool in POOLS:
                pool.discard()  # as `atexit` does; what else that does is for the test's process alone
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _forget() -> None:
    """Processes and threads of the test's process are not at the service of its children."""
    for pool in POOLS:
        _inherited.append(pool.executors)  # kept alive: its end would wake the threads of the test's process
        pool.executors = {}
