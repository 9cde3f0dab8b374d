"""What a stage says while it works: a bar with rate and time left on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from shards.process.torchrun import is_first

LINE_EVERY = 15.0  # seconds between two lines in a log


class Progress(Protocol):
    """How a stage reports: `done` of `total` units, and a few words on what is in hand."""

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None: ...


@contextmanager
def show(label: str) -> Iterator[Progress]:
    """Give a stage its reporter: a rich progress bar when stderr is a terminal, lines otherwise.

    Of several ranks only the first one shows anything.
    """
    if not is_first():
        yield lambda done, total, unit, note="": None
        return
    if not sys.stderr.isatty():
        yield Lines(label)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    words = TextColumn("{task.fields[unit]}  {task.fields[rate]}  {task.fields[note]}")
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), words, TimeElapsedColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None, unit="", rate="", note="")
        start = time.monotonic()

        def report(done: int, total: int, unit: str, note: str = "") -> None:
            rate = f"{done / max(time.monotonic() - start, 1e-9):.2f}/s" if done else ""
            bars.update(task, completed=done, total=total, unit=unit, rate=rate, note=note)

        yield report


class Lines:
    """Progress as lines of a log: at the start of the work, every quarter of a minute, and at its end."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.start = time.monotonic()
        self.last = -LINE_EVERY

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Print a line when the last one is old enough or the work is done."""
        elapsed = time.monotonic() - self.start
        if elapsed - self.last < LINE_EVERY and done < total:
            return
        self.last = elapsed
        rate = done / elapsed if elapsed > 0 else 0.0
        speed = f", {rate:.2f}/s" if done else ""
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
        text = f"{self.label}: {done}/{total} {unit}{speed}{left}{'; ' + note if note else ''}"
        print(text, file=sys.stderr, flush=True)


def counted(count: int, name: str) -> str:
    """A number with its noun: `1 shard`, `2 shards`."""
    return f"{count} {name}{'s' * (count != 1)}"
