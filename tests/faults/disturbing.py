"""The faults that a stage is put to: each disturbs one call of a stage, and says how the call ended."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.forks import Fork, Work, rushes
from tests.support.s3_server import Fault, Proxy

STORE_FAULTS = ("503", "reset", "lost", "cut", "short", "flip")


@dataclass
class Call:
    """One call of a stage that is going to be disturbed."""

    run: str
    """Path or URL of the run."""
    stage: str
    folder: Path
    """For what its processes write."""
    seconds: float
    """How long the stage takes when nothing disturbs it."""
    draw: random.Random
    proxy: Proxy | None = None
    """What the store is reached through, if the run is in one."""

    def start(self, name: str = "one", around: Callable[[Work], Work] = lambda work: work) -> Fork:
        """A process that does the stage."""
        return Fork(self.folder / name, around(rushes(self.stage, self.run, "--iteration", "0")))

    def sleep(self) -> None:
        """Wait for some moment of the stage."""
        time.sleep(self.draw.random() * self.seconds)


def how(fork: Fork) -> str:
    """How a process ended, in words."""
    code = fork.wait()
    if "Traceback" in fork.said:
        return "a traceback"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    said = [line for line in fork.said.splitlines() if line.startswith("rushes: ")]
    return "done" if code == 0 else f"exit code {code} and {'a sentence' if said else 'NOTHING'}"


def kill(call: Call) -> str:
    """SIGKILL at some moment."""
    return _signalled(call, signal.SIGKILL)


def term(call: Call) -> str:
    """SIGTERM at some moment, as a batch system sends it."""
    return _signalled(call, signal.SIGTERM)


def race(call: Call) -> str:
    """Two processes do the same stage at once."""
    both = call.start("one"), call.start("two")
    return " | ".join(sorted(how(one) for one in both))


def freeze(call: Call) -> str:
    """A process stands still at some moment, another one does the stage, and then the first goes on."""
    one = call.start("one")
    call.sleep()
    if _send(one, signal.SIGSTOP):
        other = call.start("two")
        try:
            ended = how(other)
        finally:
            _send(one, signal.SIGCONT)
        return f"{how(one)} | {ended}"
    return how(one)


def disk(call: Call) -> str:
    """No file may grow beyond some size: a write fails as on a full disk."""
    size = int(2 ** call.draw.uniform(12, 17))  # room for what the process says

    def around(work: Work) -> Work:
        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            work()

        return limited

    return how(call.start("one", around))


def clock(call: Call) -> str:
    """The clock of the machine jumps by up to ten years, forth and back, while a stage works."""
    draw = random.Random(call.draw.random())

    def around(work: Work) -> Work:
        def jumping() -> None:
            real, offset = time.time, [0.0]

            def now() -> float:
                if draw.random() < 0.2:
                    offset[0] = draw.uniform(-1, 1) * 10 ** draw.uniform(0, 8.5)
                return real() + offset[0]

            time.time = now
            time.time_ns = lambda: int(now() * 1e9)
            work()

        return jumping

    return how(call.start("one", around))


def readonly(call: Call) -> str:
    """The file system of the run becomes read-only, before the stage or in its midst."""
    place = str(Path(call.run).parent)
    with contextlib.ExitStack() as stack:
        stack.callback(_remount, place, "rw")
        if call.draw.random() < 0.5:
            _remount(place, "ro")
            return how(call.start())
        one = call.start()
        call.sleep()
        while one.code is None and not _remount(place, "ro"):  # refused while a file is open for writing
            _ended(one)
        return how(one)


def store(call: Call) -> str:
    """Requests to the store fail, are cut, answered late or damaged on the way."""
    assert call.proxy is not None
    for _ in range(call.draw.randint(1, 4)):
        kind, method = call.draw.choice(STORE_FAULTS), call.draw.choice(("GET", "PUT", "HEAD"))
        if (kind, method) in {("cut", "HEAD"), ("short", "HEAD"), ("flip", "HEAD"), ("flip", "PUT")}:
            kind = "reset"
        fault = Fault(kind, method, times=call.draw.randint(1, 2))
        call.proxy.faults.append(fault)
    try:
        return how(call.start())
    finally:
        call.proxy.faults.clear()


KINDS: dict[str, Callable[[Call], str]] = {
    "kill": kill, "term": term, "race": race, "freeze": freeze, "disk": disk, "readonly": readonly, "clock": clock,
    "store": store,
}  # fmt: skip


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[bool]:
    """A file system of its own in memory at a folder; False where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _signalled(call: Call, number: int) -> str:
    one = call.start()
    call.sleep()
    _send(one, number)
    return how(one)


def _send(fork: Fork, number: int) -> bool:
    """Send a signal to a process; False when it has ended."""
    if _ended(fork):
        return False
    fork.send(number)
    return True


def _ended(fork: Fork) -> bool:
    if os.waitid(os.P_PID, fork.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    fork.wait()
    return True


def _remount(place: str, mode: str) -> bool:
    command: list[Any] = ["mount", "-o", f"remount,{mode}", place]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
