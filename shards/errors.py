"""The exceptions written for people: what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what a full disk or a used-up quota gives
ANEW = "restore it from a copy, or delete the iteration's train/ and policy/ folders to train it anew"
REPAIR = "restore the shard from a copy, or delete its tar, index and manifest and run `rushes rollout` again"


class UserError(Exception):
    """Bad input: a sentence that names the thing and the place, and a hint that says what to do.

    The command line prints both on one line and exits with `exit_code`; no traceback is shown without `--debug`.
    """

    exit_code = 2
    told = False
    """True on a rank that must end quietly because another one says the same."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem} (hint: {self.hint})" if self.hint else self.problem


class RunFailed(UserError):
    """The input was good but the run could not continue: a full disk, a failed replay, a dead worker."""

    exit_code = 1


class StillBusy(UserError):
    """Nothing is left to claim, but other workers have not finished."""

    exit_code = 75


class NothingLeft(UserError):
    """A worker came too late: everything is done, and it did nothing."""

    exit_code = 3


class Stopped(UserError):
    """A signal asked for the end; what was in work is finished and kept, and the same command continues from there."""

    exit_code = 75

    def __init__(self, problem: str, hint: str = "", exit_code: int = 75) -> None:
        super().__init__(problem, hint)
        self.exit_code = exit_code


class Damaged(UserError):
    """A file of a run does not hold what was written into it."""


def nearest(name: str, names: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `names` that somebody meant by `name`: the most alike, from 0 to 1; None below that likeness."""
    found = difflib.get_close_matches(name, list(names), 1, likeness)
    return found[0] if found else None
