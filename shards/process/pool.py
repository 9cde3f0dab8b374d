"""Processes that stay alive with their models from stage to stage, and end with their parent."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from shards.process.fork_server import context_of_helpers


class Pool:
    """Processes of one kind. They start when they are first asked for, and each of them calls `begin` once.

    They have the environment of this process, and of its memory nothing (`shards.process.fork_server`).
    """

    def __init__(self, begin: Callable[..., None]) -> None:
        self.begin = begin
        self.executors: dict[int, ProcessPoolExecutor] = {}
        atexit.register(self.discard)

    def of(self, count: int, *arguments: Any) -> ProcessPoolExecutor:
        """That many processes, those of the last call where all of them live; new ones get `begin(*arguments)`."""
        if count in self.executors and _has_dead(self.executors[count]):
            self.discard()
        if count not in self.executors:
            first = (dict(os.environ), self.begin, *arguments)
            self.executors[count] = ProcessPoolExecutor(count, context_of_helpers(), _start, first)
        return self.executors[count]

    def discard(self, *, at_once: bool = False) -> None:
        """Stop all processes, whatever they do; the next call of `of` starts new ones.

        Work that takes signals (`stoppable`) comes to a good end first, unless `at_once`.
        """
        while self.executors:
            executor = self.executors.popitem()[1]
            for one in _processes(executor):  # `shutdown` lets them finish, and Python would wait for that at its end
                (one.kill if at_once else one.terminate)()
            executor.shutdown(wait=False, cancel_futures=True)


def _has_dead(executor: ProcessPoolExecutor) -> bool:
    """Whether one of its processes has ended.

    Not by `is_alive`: the kernel tells of an end once, and until the executor's thread, if that was told, has written
    it down, the dead one is said to live. Nor by its sentinel alone: children that it left behind keep that open.
    """
    processes = _processes(executor)
    return bool(wait([one.sentinel for one in processes], timeout=0)) or not all(one.is_alive() for one in processes)


def _processes(executor: ProcessPoolExecutor) -> list[BaseProcess]:
    """Those that it has started; none when it is broken."""
    return list((executor._processes or {}).values())


def _start(environment: dict[str, str], begin: Callable[..., None], *arguments: Any) -> None:
    """The parent says when to end, by SIGTERM or by its own end; the other signals that ask for an end are its own.

    A command waits for its processes at its end, so theirs must be quick, as in `cli.main`.
    """
    for one in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    atexit.register(gc.freeze)
    begin(*arguments)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent must not leave processes behind that wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
