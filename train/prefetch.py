"""Reading ahead: while a chunk is computed on, a thread reads the next one from its shard."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from train.data import Stored
from train.order import Unit


class Ahead:
    """Reads units, one ahead of whoever asks for them; what is read does not depend on that.

    The thread reads files and draws noise from seeds: it changes no generator and touches no device.
    """

    def __init__(self, read: Callable[[Unit], Stored]) -> None:
        self.read = read
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")  # its thread begins with the first unit
        self._following: Unit | None = None
        self._next: tuple[Unit, Future[Stored]] | None = None

    def take(self, unit: Unit, following: Unit | None = None) -> Stored:
        """What is stored of a unit; it waits only for what is left of reading it, if the call before named it as
        `following` and `begin` was called since.

        Raises what reading this unit raised, in whichever thread.
        """
        before, self._next, self._following = self._next, None, following
        return before[1].result() if before and before[0] == unit else self.read(unit)

    def begin(self) -> None:
        """Begin to read the unit that the last call of `take` named as following.

        At best before a backward pass, which seldom needs the GIL; a forward needs it after each operation and would
        wait for this thread.
        """
        following, self._following = self._following, None
        if following is not None:
            self._next = following, self._pool.submit(self.read, following)

    def close(self) -> None:
        """End the thread, as soon as it has read what it is at; nobody will learn of an error in that."""
        self._next = self._following = None
        self._pool.shutdown(cancel_futures=True)
