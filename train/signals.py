"""Ranks that end together: all stop after the same update, and none outlives a rank that died without a word."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from rollout.ranks.world import World
from shards.errors import RunFailed
from shards.process.signals import stopped, stopping

LOST = re.compile(r"gloo|nccl|connection (closed|reset)|socket|broken pipe|timed out", re.IGNORECASE)
"""What torch says, in a RuntimeError without a kind of its own, when the other end of a collective is gone."""


def check(when: str) -> None:
    """Raise Stopped on all ranks when a signal has reached one of them; all ranks must call this at the same place."""
    found = agreed()
    if found:
        World.joined().part()
        raise stopped(found, when)


def agreed() -> signal.Signals | None:
    """The signal that has reached any rank, the same answer on all of them; one small all-reduce.

    SIGTERM wins over Ctrl-C, so that all ranks end with the same code.
    """
    number = int(stopping() or 0)
    if _many():
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        flag = torch.tensor([number], device=device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        number = int(flag.item())
    return signal.Signals(number) if number else None


@contextmanager
def lost_ranks() -> Iterator[None]:
    """Turn the error of a collective whose other end is gone into RunFailed, in words."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise RunFailed(
            f"rank {distributed.get_rank()}: another rank has ended or cannot be reached ({first[:160]})",
            "the rank that ended first says why; run the same command again, it goes on from the last checkpoint",
        ) from error


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the other end of a collective is gone."""
    return isinstance(error, RuntimeError) and _many() and bool(LOST.search(str(error)))


def _many() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
