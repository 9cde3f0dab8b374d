"""What killed writers leave: private files and folders with half a file in them, found and swept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shards import spool
from shards.locks import TEMPORARY, is_abandoned
from shards.run import EXPERT_NAMES
from shards.workers import owners

if TYPE_CHECKING:
    from shards.run import Run, Stage

WRITING = ".writing-"  # begins the name of a folder that gets its own name when it is whole
_clean: set[Path] = set()  # stages that are trained and were swept by this process: nobody writes there any more


def leftovers(stage: Stage) -> Iterator[Path]:
    """Private files of a stage whose writers are dead, and private folders that nobody can be writing any more.

    A living writer holds a lock on its file. Only training makes such folders, and it holds a claim on the stage.
    """
    for path in _private(stage.path):
        if path.is_dir() and not path.is_symlink():
            if not _in_training(stage):
                yield path
        elif is_abandoned(path):
            yield path


def sweep_run(run: Run) -> int:
    """Remove the leftovers of all stages of a run, those that are finished too; returns how many.

    The spool of a shard that is committed goes as well. Folders go where the policy is there, so that nobody trains;
    in a stage that is still to be trained the training itself removes them.
    """
    stages = [run.iteration(number) for number in run.iterations()]
    stages += [run.evaluation(number) for number in run.evaluations()]
    removed = 0
    for stage in (stage for stage in stages if stage.path not in _clean):
        ended = stage.policy_record_path.exists()
        for path in [*leftovers(stage)]:
            if not path.is_dir():
                removed += is_abandoned(path, remove=True)
            elif ended:
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
        for shard in _spools(stage):
            if stage.manifest_path(shard).exists():
                spool.sweep(stage, shard)
                removed += 1
        if ended:
            _clean.add(stage.path)
    return removed


def _private(folder: Path) -> Iterator[Path]:
    """Names that writers give to what is not finished, in a folder and below; no link is followed."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith((TEMPORARY, WRITING)):
                yield Path(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                yield from _private(Path(entry.path))


def _in_training(stage: Stage) -> bool:
    """Whether somebody may be training a stage: its policy is not there, and a claim on an expert
    of it is not known to be void."""
    if stage.policy_record_path.exists():
        return False
    claims = (owners.holder(stage, expert, "train") for expert in range(len(EXPERT_NAMES)))
    return any(found is not None and owners.life(found) in ("alive", "silent") for found in claims)


def _spools(stage: Stage) -> list[int]:
    """Numbers of the shards that have a spool."""
    names = os.listdir(stage.path / "work") if (stage.path / "work").is_dir() else []
    numbers = [name.removeprefix("shard-") for name in names if (stage.path / "work" / name).is_dir()]
    return sorted(int(number) for number in numbers if len(number) == 6 and number.isdigit())
