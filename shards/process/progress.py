"""What a stage says while it works: one line with rate and time left on a terminal, lines now and then in a log."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from shards.process.torchrun import is_first

LINE_EVERY = 15.0  # seconds between two lines in a log
BAR = 12  # columns
LEAST_NOTE = 8  # columns below which a note says nothing


class Progress(Protocol):
    """How a stage reports: `done` of `total` units, and a few words on what is in hand."""

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None: ...


@contextmanager
def show(label: str) -> Iterator[Progress]:
    """Give a stage its reporter: one line that is drawn again when stderr is a terminal, lines otherwise.

    Of several ranks only the first one shows anything.
    """
    if not is_first():
        yield lambda done, total, unit, note="": None
        return
    if not sys.stderr.isatty():
        yield Lines(label)
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console, bar = Console(stderr=True), Bar(label)

    def drawn() -> Text:
        return Text(bar.line(console.width), no_wrap=True, overflow="crop")

    with Live(console=console, get_renderable=drawn, transient=True, refresh_per_second=2):
        yield bar


@dataclass
class Pace:
    """How fast a stage goes, by what it reports. A new unit begins a new count: updates do not wait for a replay."""

    began: float = field(default_factory=lambda: time.monotonic())
    unit: str = ""
    last: float = field(default_factory=lambda: time.monotonic())

    def look(self, done: int, unit: str) -> float:
        """Units a second since the work on this unit began; 0 while that is not known."""
        now = time.monotonic()
        if self.unit and unit != self.unit:
            self.began = self.last
        self.unit, self.last = unit, now
        return done / (now - self.began) if done and now > self.began else 0.0


class Bar:
    """Progress as one line of a terminal, which says what was reported last, and how much time is left by now."""

    def __init__(self, label: str) -> None:
        self.label, self.pace = label, Pace()
        self.done, self.total, self.unit, self.note, self.rate = 0, 0, "", "", 0.0

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        """As Progress."""
        self.rate = self.pace.look(done, unit)
        self.done, self.total, self.unit, self.note = done, total, unit, note

    def line(self, width: int) -> str:
        """Count, rate and time left in `width` columns, then a bar and a note as far as they fit.

        The last column stays free, because some terminals begin a new line there.
        """
        if not self.total:
            return self.label[: max(0, width - 1)]
        since = time.monotonic() - self.pace.last
        counts = f"{self.label} {self.done}/{self.total} {self.unit}"
        text = f"{counts}{speed(self.rate)}{left(self.done, self.total, self.rate, since)}"
        if width - len(text) > BAR + 2:
            full = BAR * min(self.done, self.total) // self.total
            text = f"{text} {'━' * full}{'─' * (BAR - full)}"
        room = width - len(text) - 2
        if self.note and room >= min(LEAST_NOTE, len(self.note)):
            text += f" {self.note if len(self.note) <= room else self.note[: room - 1] + '…'}"
        return text if len(text) < width else text[: max(0, width - 2)] + "…"


def speed(rate: float) -> str:
    """`, 2.50/s`, or the seconds of one unit where they are many; empty for 0."""
    if rate <= 0:
        return ""
    return f", {rate:.2f}/s" if rate >= 0.1 else f", {1 / rate:.0f} s each"


def left(done: int, total: int, rate: float, since: float = 0.0) -> str:
    """`, 3:05 left` at this rate, `since` seconds after the last report; empty where it is not known or all is done."""
    if rate <= 0 or done >= total:
        return ""
    minutes, seconds = divmod(round(max(0.0, (total - done) / rate - since)), 60)
    hours, minutes = divmod(minutes, 60)
    return f", {hours}:{minutes:02}:{seconds:02} left" if hours else f", {minutes}:{seconds:02} left"


class Lines:
    """Progress as lines of a log: at the start of the work, every quarter of a minute, and at its end."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.start = time.monotonic()
        self.last = -LINE_EVERY
        self.pace = Pace()

    def __call__(self, done: int, total: int, unit: str, note: str = "") -> None:
        """Print a line when the last one is old enough or the work is done."""
        rate = self.pace.look(done, unit)
        elapsed = time.monotonic() - self.start
        if elapsed - self.last < LINE_EVERY and done < total:
            return
        self.last = elapsed
        text = f"{self.label}: {done}/{total} {unit}{speed(rate)}{left(done, total, rate)}{'; ' + note if note else ''}"
        print(text, file=sys.stderr, flush=True)


def in_place(text: str, pause: float) -> str:
    """A text that takes the place of all that a terminal shows, with the time of day below it, for `--watch`."""
    clock = f"{time.strftime('%H:%M:%S')}, again every {pause:g} s; Ctrl-C ends it"
    lines = "".join(f"{line}\x1b[K\n" for line in [*text.splitlines(), "", clock])  # each cut off where it ends
    return f"\x1b[H{lines}\x1b[J"


def terminal_width() -> int:
    """Columns of the terminal on stdout; 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 80


def counted(count: int, name: str) -> str:
    """A number with its noun: `1 shard`, `2 shards`."""
    return f"{count} {name}{'s' * (count != 1)}"
