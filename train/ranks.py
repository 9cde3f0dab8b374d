"""What all ranks train on, and who of them holds the claim."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from shards.errors import StillBusy
from shards.workers.claims import BEATS, Claim, Pause, claim
from shards.workers.owners import holder, life
from train.inputs import freeze

if TYPE_CHECKING:
    from rollout.ranks.world import World
    from shards.run import Run, Stage
    from train.data import Inputs


@contextmanager
def claimed(world: World, stage: Stage, seconds: float) -> Iterator[Claim | None]:
    """Inside, this process, or rank 0 for all, holds the training of an iteration; StillBusy when another one does.

    Yields the claim on the rank that holds it.
    """
    with ExitStack() as stack:
        held = None
        with world.together():
            if world.is_first:
                held = _hold(stack, stage, seconds)
        yield held


def _hold(stack: ExitStack, stage: Stage, seconds: float) -> Claim:
    """Claim the training. What a silent machine holds is watched until it gives a sign of life or its claim is void."""
    pause = Pause(seconds / BEATS)
    while True:
        held = stack.enter_context(claim(stage, 0, "train", seconds))
        if held:
            return held
        found = holder(stage, 0, "train")
        if found and life(found, seconds) == "alive":
            raise StillBusy(f"{stage.path} is being trained by another process", "wait for it, or stop it")
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
