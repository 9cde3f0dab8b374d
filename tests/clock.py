"""A clock that tests move by hand: what is concluded from it does not hang on how busy the machine is."""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """Stands for the module `time` of those who watch others; a sleep moves it at once, and `meanwhile` happens."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.now = 1000.0
        self.meanwhile = meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()
