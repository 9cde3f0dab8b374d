"""What a mutation is: a piece of source that stands once in a file, what is put in its place, and who must notice."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

Change = tuple[str, str, str] | tuple[str, str, str, str]
"""What is wrong, the source as it is, what is put in its place, and its tests where they are not those of the list."""


@dataclass(frozen=True)
class Mutation:
    """One change of one file."""

    path: str
    """Of the file, from the root of the repository."""
    wrong: str
    """What is wrong with it, in words."""
    before: str
    """Source that stands in the file exactly once."""
    after: str
    tests: tuple[str, ...]
    """Files or node ids of pytest, one of which has to fail."""

    def __str__(self) -> str:
        return f"{self.path}: {self.wrong}"

    def applied(self) -> str:
        """The source of the file with the change. ValueError where the text to be changed does not stand there once."""
        source = (ROOT / self.path).read_text(encoding="utf-8")
        found = source.count(self.before)
        if found != 1:
            raise ValueError(f"{self}: {self.before!r} occurs {found} times; bring the mutation up to date")
        changed = source.replace(self.before, self.after)
        compile(changed, self.path, "exec")
        return changed


def mutations(path: str, tests: str, changes: Iterable[Change]) -> list[Mutation]:
    """The mutations of one file; `tests` are the test files, separated by spaces."""
    return [Mutation(path, *change[:3], _names(change[3] if len(change) > 3 else tests)) for change in changes]


def _names(tests: str) -> tuple[str, ...]:
    """One name of a test each, which may have spaces in its brackets."""
    return tuple(re.split(r" (?=tests/)", tests))
