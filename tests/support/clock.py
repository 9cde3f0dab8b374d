"""A clock that tests move by hand, and the one of the file system, which they wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


class Clock:
    """Stands for the module `time` of those who watch others; a sleep moves it at once, and `meanwhile` happens.

    What is concluded from it does not hang on how busy the machine is.
    """

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now = 1000.0
        self.meanwhile = meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


def tick(path: Path) -> None:
    """Wait until a file that is changed now gets another time than `path` has: such clocks stand still for some ms."""
    probe = path.with_name(f"{path.name}.tick")
    probe.touch()
    while probe.stat().st_mtime_ns <= path.stat().st_mtime_ns:
        time.sleep(0.001)
        probe.touch()
    probe.unlink()
