"""Ranks that agree and end together: who holds the claim, what all train on, and what becomes of a rank that is lost.

All stop after the same update, and none outlives a rank that died without a word.
"""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import distributed

from rollout.ranks.world import World
from shards.errors import RunFailed, StillBusy
from shards.process.signals import stopped, stopping
from shards.run import EXPERT_NAMES
from shards.workers.claims import BEATS, Claim, Pause, claim
from shards.workers.owners import holder, life
from train.inputs import freeze

if TYPE_CHECKING:
    from shards.run import Run, Stage
    from train.data import Inputs

LOST = re.compile(r"gloo|nccl|connection (closed|reset)|socket|broken pipe|timed out", re.IGNORECASE)
"""What torch says, in a RuntimeError without a kind of its own, when the other end of a collective is gone."""


@contextmanager
def claimed(world: World, stage: Stage, seconds: float, experts: Sequence[int] = (0,)) -> Iterator[list[Claim]]:
    """Inside, this process, or rank 0 for all, holds the training of these experts of an iteration; StillBusy when
    another one holds one of them.

    Yields the claims on the rank that holds them.
    """
    with ExitStack() as stack:
        held: list[Claim] = []
        with world.together():
            if world.is_first:
                held = [_hold(stack, stage, expert, seconds) for expert in experts]
        yield held


def _hold(stack: ExitStack, stage: Stage, expert: int, seconds: float) -> Claim:
    """Claim the training of an expert. What a silent machine holds is watched until it gives a sign of life or its
    claim is void."""
    pause = Pause(seconds / BEATS)
    while True:
        held = stack.enter_context(claim(stage, expert, "train", seconds))
        if held:
            return held
        found = holder(stage, expert, "train")
        if found and life(found, seconds) == "alive":
            problem = f"{stage.path}: its {EXPERT_NAMES[expert]} expert is being trained by another process"
            raise StillBusy(problem, "wait for it, or stop it")
        pause()


def agree_on_inputs(world: World, run: Run, stage: Stage, advantage: str) -> Inputs:
    """The frozen inputs of an iteration, decided by rank 0 and read by all; UserError when they are not the same."""
    inputs = None
    with world.together():
        if world.is_first:
            inputs = freeze(run, stage, advantage)
    with world.together():
        inputs = inputs or freeze(run, stage, advantage)
    rows = repr(sorted(inputs.advantages.items()))
    world.agree("set of advantages", f"{inputs.specification} {hashlib.sha256(rows.encode()).hexdigest()}")
    return inputs


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
            "the rank that ended first says why; run the same command again, it continues from the last checkpoint",
        ) from error


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the other end of a collective is gone."""
    return isinstance(error, RuntimeError) and _many() and bool(LOST.search(str(error)))


def _many() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
