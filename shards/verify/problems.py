"""What `rushes verify` says of a fault, and how one fault does not keep it from looking for the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVarTuple

from shards.errors import UserError

Arguments = TypeVarTuple("Arguments")
Kind = Literal["damaged", "incomplete", "leftover", "unvouched"]
LEFTOVER = "delete it, or run any stage of this run, which sweeps"


@dataclass(frozen=True)
class Problem:
    """One fault. `damaged` is an error; `incomplete` is work that can be done; `leftover` wastes space and no more;
    `unvouched` are files without a checksum: of older versions, or of a record that is damaged."""

    kind: Kind
    problem: str
    """What is wrong, with the file and the member it is wrong in."""
    hint: str

    def __str__(self) -> str:
        """As a line for people."""
        return f"{self.kind}: {self.problem} (hint: {self.hint})"


def attempt(check: Callable[[*Arguments], object], *arguments: *Arguments) -> list[Problem]:
    """The fault that a check raised, if any."""
    return result(check, *arguments)[1]


def result(check: Callable[[*Arguments], object], *arguments: *Arguments) -> tuple[Any, list[Problem]]:
    """What a check returns, and the fault it raised."""
    try:
        return check(*arguments), []
    except UserError as error:
        return None, [of_error(error)]
    except OSError as error:
        where = error.filename or ", ".join(map(str, arguments))
        return None, [Problem("damaged", f"{where}: cannot be read: {error.strerror}", "look at its permissions")]


def of_error(error: UserError) -> Problem:
    """What was raised as a fault."""
    return Problem("damaged", error.problem, error.hint)
