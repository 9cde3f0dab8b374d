"""Which part of a stage a command takes: of --worker, of an array task of SLURM, of a rank of torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass

from shards.errors import NothingLeft, UserError
from shards.process.torchrun import rank, world_size

ARRAY = "SLURM_ARRAY_TASK_"


@dataclass(frozen=True)
class Assignment:
    """What part of the shards this process begins with, and what it does at the end."""

    part: tuple[int, int]
    """(i, n): its number, and how many there are."""
    wait: bool
    """Stay until others have finished."""
    late: bool
    """One of several workers that come and go: it says by its exit code that it came too late."""

    @classmethod
    def of(cls, worker: str, wait: bool) -> Assignment:
        """From --worker, else the array task of SLURM; each of them may be several ranks of torchrun.

        Those wait for each other, and end with 0: torchrun takes any other code for the failure of all. Raises
        UserError for a --worker that is not I/N with I below N.
        """
        part, count = _worker(worker)
        ranks = world_size()
        given = bool(worker or os.environ.get(f"{ARRAY}ID"))
        return cls((part * ranks + rank(), count * ranks), wait or ranks > 1, given and ranks == 1)

    def end(self, idle: bool, what: str) -> None:
        """Raise NothingLeft for a worker that found everything done."""
        if self.late and idle:
            raise NothingLeft(f"{what}: nothing is left for this worker", "everything is done")


ALL = Assignment((0, 1), wait=False, late=False)


def _worker(text: str) -> tuple[int, int]:
    """The part of the work to take: --worker, else the array task of SLURM, else all of it."""
    if not text and os.environ.get(f"{ARRAY}ID"):
        first, step, count = _variable("MIN", 0), max(1, _variable("STEP", 1)), max(1, _variable("COUNT", 1))
        # the numbers of an array may have gaps: where two tasks come to one part, claims keep them apart
        text = f"{(_variable('ID', 0) - first) // step % count}/{count}"
    try:
        part, count = (int(piece) for piece in (text or "0/1").split("/"))
    except ValueError:
        raise UserError(f"--worker {text}: not of the form I/N", "for example --worker 0/4") from None
    if count < 1:
        raise UserError(f"--worker {text}: there are no {count} workers", "for example --worker 0/4")
    if not 0 <= part < count:
        raise UserError(f"--worker {text}: {part} is not between 0 and {count - 1}", "workers count from 0")
    return part, count


def _variable(name: str, default: int) -> int:
    """A number that SLURM says of an array; `default` where it is not set."""
    text = os.environ.get(f"{ARRAY}{name}", "")
    if text and not text.isdecimal():
        raise UserError(
            f"{ARRAY}{name} = {text!r} in the environment is not a number", "unset it, or give --worker I/N"
        )
    return int(text or default)
