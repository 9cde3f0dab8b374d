"""The ranks of torchrun meet: all must mean the same run, with the same settings and the same version of rushes."""

from __future__ import annotations

import hashlib
import time
import uuid

from rollout.parallel import World
from rollout.policy_inputs import find_device
from shards.claims import our_version
from shards.config import dump_config
from shards.errors import UserError
from shards.files import TEMPORARY, publish_new
from shards.run import Run
from shards.urls import url_of

PATIENCE = 30.0  # seconds in which a network file system must show a new file to all machines


def meet(run: Run) -> World:
    """Join the other ranks. Raises UserError on all of them, told by the first, unless all mean the same."""
    world = World.of(run.config, find_device(run.config.model.device))
    world.agree("version of rushes", our_version() or "unknown")
    world.agree("configuration", hashlib.sha256(dump_config(run.config).encode()).hexdigest()[:12])
    url = url_of(run.path)
    if url is None:
        _same_directory(run, world)
    else:
        world.agree("run directory", url)
    return world


def _same_directory(run: Run, world: World) -> None:
    """A file that the first rank writes must be seen by all: two machines may have a folder of that name each."""
    mark = run.path / world.broadcast(f"{TEMPORARY}ranks-{uuid.uuid4().hex}")
    try:
        with world.together():
            if world.is_first:
                publish_new(mark, b"")
        with world.together():
            deadline = time.monotonic() + PATIENCE
            while not mark.exists():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{run.path} is not the directory that rank 0 sees under this name",
                        "all ranks need one run directory, on a file system that their machines share",
                    )
                time.sleep(0.1)
    finally:
        if world.is_first:
            mark.unlink(missing_ok=True)
