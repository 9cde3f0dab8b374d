"""The ranks of torchrun meet: all must mean the same run, with the same settings and the same software."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.ranks.device import find_device
from rollout.ranks.world import World
from shards.errors import UserError
from shards.files import publish_new
from shards.locks import TEMPORARY
from shards.process.versions import version_of

if TYPE_CHECKING:
    import torch

    from shards.config import RunConfig
    from shards.run import Run

SOFTWARE = ("rushes", "torch", "diffusers", "peft", "safetensors")
PATIENCE = 10.0  # seconds in which a shared file system must show a new file to all machines

_met: set[tuple[Path, str]] = set()  # runs and settings that all ranks have agreed on


def agree_on_run(run: Run, device: torch.device | None = None) -> World:
    """Join the other ranks, laid out as the run says. Raises UserError on all of them, told by the first, unless all
    have the same software, settings and run directory.

    `device` is where they compute, where another one than model.device. A stage may ask again for what its command has
    asked before: then nothing is compared a second time.
    """
    ranks, settings = World.joined(), ""
    with ranks.together():
        settings = settings_text(run.config)
        device = device or find_device(run.config.model.device)
    if ranks.size > 1 and not all(ranks.gather((run.path, settings) in _met)):
        ranks.agree("software", "\n".join(f"{name} {version_of(name) or 'of a checkout'}" for name in SOFTWARE))
        ranks.agree("configuration", settings)
        _agree_on_directory(run, ranks)
        _met.add((run.path, settings))
    return World.of(run.config, device)


def settings_text(config: RunConfig) -> str:
    """A configuration as lines `section.key = value`."""
    sections = config.model_dump(mode="json")
    return "\n".join(
        f"{section}.{key} = {json.dumps(value, sort_keys=True)}"
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
    )


def _agree_on_directory(run: Run, ranks: World) -> None:
    """A file that the first rank writes must be seen by all, where two machines may have a folder of that name each."""
    path, name_for_all = run.path, run.files.common_name(run.path)
    ranks.agree("run directory", name_for_all or "a folder")
    if name_for_all:
        return
    name, first = ranks.broadcast((f"{TEMPORARY}ranks-{uuid.uuid4().hex}", str(path)))
    try:
        with ranks.together():
            if ranks.is_first:
                publish_new(path / name, b"")
        with ranks.together():
            _wait_for(path / name, first)
    finally:
        if ranks.is_first:
            (path / name).unlink(missing_ok=True)


def _wait_for(mark: Path, first: str) -> None:
    """UserError when a file does not appear in time; `first` is what the first rank calls its folder."""
    limit = time.monotonic() + PATIENCE
    while not mark.exists():
        if time.monotonic() > limit:
            raise UserError(
                f"{mark.parent} is not the run directory that rank 0 has as {first}",
                "all ranks need the same run directory, on a file system that all machines share",
            )
        time.sleep(0.1)
