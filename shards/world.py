"""Which process of how many this is, as torchrun tells it in the environment; one alone without torchrun."""

from __future__ import annotations

import os

from shards.errors import UserError


def rank() -> int:
    """Number of this process among all, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process among those of its machine, from 0: which of the machine's devices is its own."""
    return _number("LOCAL_RANK", 0)


def is_first() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"{name} = {text!r} in the environment is no number", "start the program with torchrun")
    return int(text)
