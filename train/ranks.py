"""What all ranks must have in common before they train together, and who of them holds the claim."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from shards.claims import BEATS, Claim, Pause, claim, holder, life
from shards.errors import StillBusy, UserError
from shards.files import publish_replace, read_json
from train.freeze import freeze

if TYPE_CHECKING:
    from rollout.parallel import World
    from shards.config import RunConfig
    from shards.run import Run, Stage
    from train.data import Inputs

SOFTWARE = ("rushes", "torch", "diffusers", "peft", "safetensors")
PATIENCE = 10.0  # seconds that a shared file system may take to show a new file to all


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


def agree_on_run(world: World, run: Run, stage: Stage) -> None:
    """UserError on all ranks when one has other settings, other software, or another run directory."""
    if world.size == 1:
        return
    world.agree("configuration", settings_text(run.config))
    world.agree("software", "\n".join(f"{name} {_version(name)}" for name in SOFTWARE))
    path = stage.train_dir / "ranks.json"
    token = world.broadcast(uuid.uuid4().hex)
    with world.together():
        if world.is_first:
            publish_replace(path, json.dumps({"schema": 1, "token": token}).encode())
    first = world.broadcast(str(run.path))
    with world.together():
        if not _shows(stage, token):
            raise UserError(
                f"{run.path} is not the run directory that rank 0 has as {first}",
                "all ranks need the same run directory, on a file system that all machines share",
            )


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


def settings_text(config: RunConfig) -> str:
    """A configuration as lines `section.key = value`."""
    sections = config.model_dump(mode="json")
    return "\n".join(
        f"{section}.{key} = {json.dumps(value, sort_keys=True)}"
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
    )


def _shows(stage: Stage, token: str) -> bool:
    """Whether the run directory of this rank shows, soon enough, what rank 0 has written into its own."""
    path, limit = stage.train_dir / "ranks.json", time.monotonic() + PATIENCE
    while True:
        if path.exists() and read_json(path).get("token") == token:
            return True
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return "of a checkout"
