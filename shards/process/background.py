"""What can wait, done in a thread: encoding and writing what was made, while the next is made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """One thread that does pieces of work in the order in which they are handed over.

    The end of a `with` block waits for all of them. Where an error ends the block, that one is raised, and those of the
    thread are not.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="background")  # its thread begins with the first piece
        self._begun: deque[tuple[Future[Any], Callable[[Any], object] | None]] = deque()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            self._pool.shutdown()

    def add(self, work: Callable[[], T], then: Callable[[T], object] | None = None) -> None:
        """Have a piece of work done; `then` gets what came of it, in the thread that calls `settle`."""
        self._begun.append((self._pool.submit(work), then))

    def settle(self) -> None:
        """Wait until everything is done. Raises what a piece of work raised, the first of them; later ones are done all
        the same."""
        while self._begun:
            future, then = self._begun.popleft()
            found = future.result()
            if then:
                then(found)
