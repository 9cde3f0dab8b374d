"""What a path given on the command line stands for: a run, one stage of it, or a single shard."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.files import Files
from shards.run import Run, Stage
from shards.store.files import files_at
from shards.store.urls import shown


@dataclass(frozen=True)
class Place:
    """Stages a path stands for; `run` when it is a whole run, `shard` one shard, `tar` a tar outside any run."""

    stages: tuple[Stage, ...] = ()
    shard: int | None = None
    tar: Path | None = None
    run: Run | None = None


def locate(path: str | Path, files: Files | None = None) -> Place:
    """Find out what `path` is, by these files or those that are there. What lies at a URL is brought up to date.

    Raises UserError when it is neither a run, nor a stage, nor a shard.
    """
    chosen, path = files_at(path)
    files = files or chosen
    _refresh(path, files)
    if not os.path.lexists(path) and not (path.suffix == ".tar" and files.exists(path)):
        raise UserError(f"{shown(str(path))} does not exist", "give a run, an iteration of it, or a shard")
    if path.suffix == ".tar":
        return _shard(path, files)
    absolute = path.resolve()
    stage = _stage(absolute, files)
    if stage is not None and stage.path.is_dir():
        return Place((stage,))
    run = Run(path, files=files)
    stages = [run.iteration(number) for number in run.iterations()]
    stages += [run.evaluation(number) for number in run.evaluations()]
    if not stages and not run.config_path.exists():
        raise UserError(f"{path} is neither a run, nor a stage, nor a shard", "give a folder that holds run.toml")
    return Place(tuple(stages), run=run)


def _refresh(path: Path, files: Files) -> None:
    """See what others have published of a run, stage or shard."""
    if path.suffix != ".tar":
        files.refresh(path)
        files.settle(path)
    elif place := _shard(path, files).stages:
        files.refresh(place[0].path)
    else:
        files.look(path)


def _shard(path: Path, files: Files) -> Place:
    match = re.fullmatch(r"shard-(\d{6})\.tar", path.name)
    absolute = Path(os.path.abspath(path))  # not resolved: a link in place of a shard is a fault, not a detour
    stage = _stage(absolute.parent.parent, files) if absolute.parent.name == "rollout" else None
    return Place((stage,), int(match[1])) if match and stage else Place(tar=path)


def _stage(path: Path, files: Files) -> Stage | None:
    match = re.fullmatch(r"iter-(\d{4,})", path.name)
    if not match:
        return None
    if path.parent.name == "eval":
        return Run(path.parent.parent, files=files).evaluation(int(match[1]))
    return Run(path.parent, files=files).iteration(int(match[1]))
