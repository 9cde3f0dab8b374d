"""Signals that ask for an end (SIGTERM and SIGUSR1 of batch systems, Ctrl-C): what is in work is finished first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from shards.errors import Stopped
from shards.process.torchrun import is_first

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED = 130  # what a shell reports for Ctrl-C

_noted: list[signal.Signals] = []


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, the first of these signals is only noted, for `stopping` to tell; a second Ctrl-C interrupts at once.

    Whoever works inside asks `check` between two pieces of work. Only the main thread can take signals; in another one
    this does nothing. A Ctrl-C that the caller ignores (a job in the background of a shell) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in SIGNALS}
    taken = [one for one in SIGNALS if before[one] is not signal.SIG_IGN]
    for one in taken:
        signal.signal(one, _note)
    try:
        yield
    finally:
        for one in taken:
            signal.signal(one, before[one])
        if _note not in before.values():
            _noted.clear()


def stopping() -> signal.Signals | None:
    """The first signal that asked for the end, or None."""
    return _noted[0] if _noted else None


def check(when: str) -> None:
    """Raise Stopped when a signal asked for the end; `when`: "before iter-0002 train", "in shard 3"."""
    found = stopping()
    if found:
        raise stopped(found, when)


def stopped(found: signal.Signals, when: str) -> Stopped:
    """The end that `found` asks for, to be raised: exit code 130 for Ctrl-C, else 75, which asks for a restart."""
    code = INTERRUPTED if found == signal.SIGINT else Stopped.exit_code
    end = Stopped(f"stopped by {found.name} {when}", "run the same command again; it continues from there", code)
    end.told = not is_first()
    return end


def _note(number: int, frame: FrameType | None) -> None:
    found = signal.Signals(number)
    if found == signal.SIGINT and found in _noted:
        signal.default_int_handler(number, frame)
    if found == signal.SIGINT and sys.stderr.isatty() and is_first():
        # os.write: print may not be entered twice, and the signal may have come in the middle of one
        os.write(2, b"\nrushes: stopping as soon as what is in work is finished; Ctrl-C again stops at once\n")
    _noted.append(found)
