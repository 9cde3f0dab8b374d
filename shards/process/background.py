"""What can wait, done in a thread: encoding and writing what was made, while the next is made."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
LONGEST_WAIT = 1.0
"""Seconds that a piece of work waits for `long_calls`, at most."""


class Background:
    """One thread that does pieces of work in the order in which they are handed over.

    A model of many short operations needs the GIL after each of them, and waits while this thread holds it. So a piece
    of work waits until its owner is in few long operations, which it marks with `long_calls`, but no longer than
    LONGEST_WAIT.

    The end of a `with` block waits for all of them. Where an error ends the block, that one is raised, and those of the
    thread are not.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")  # its thread begins with the first piece
        self._begun: deque[tuple[Future[Any], Callable[[Any], object] | None]] = deque()
        self._long_calls = threading.Event()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            self._long_calls.set()
            self._pool.shutdown()

    def add(self, work: Callable[[], T], then: Callable[[T], object] | None = None) -> None:
        """Have a piece of work done; `then` gets what came of it, in the thread that calls `settle` or `collect`."""
        latest = time.monotonic() + LONGEST_WAIT

        def done() -> T:
            self._long_calls.wait(max(0.0, latest - time.monotonic()))
            return work()

        self._begun.append((self._pool.submit(done), then))

    @contextmanager
    def long_calls(self) -> Iterator[None]:
        """Inside, pieces of work begin at once: its operations are long and seldom need the GIL."""
        self._long_calls.set()
        try:
            yield
        finally:
            self._long_calls.clear()

    def settle(self) -> None:
        """Wait until everything is done. Raises what a piece of work raised, the first of them; later ones are done all
        the same."""
        with self.long_calls():
            while self._begun:
                self._take()

    def collect(self) -> None:
        """Take what is done, and wait for nothing. Raises as `settle`."""
        while self._begun and self._begun[0][0].done():
            self._take()

    def _take(self) -> None:
        future, then = self._begun.popleft()
        found = future.result()
        if then:
            then(found)
