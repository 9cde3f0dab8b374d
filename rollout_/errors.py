"""The exceptions written for people: what was wrong, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: a sentence that names the thing and the place, and a hint that says what to do.

    The command line prints both on one line and exits with `exit_code`; no traceback is shown without `--debug`.
    """

    exit_code = 2

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem} (hint: {self.hint})" if self.hint else self.problem


class RunFailed(UserError):
    """The input was good but the run could not go on: a full disk, a failed replay, a dead worker."""

    exit_code = 1


class StillBusy(UserError):
    """Nothing is left to claim, but other workers have not finished."""

    exit_code = 75
