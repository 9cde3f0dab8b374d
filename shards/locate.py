"""What a path given on the command line stands for: a run, one stage of it, or a single shard."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.run import Run, Stage
from shards.store import mirror
from shards.store.urls import is_url, shown, url_of, working_copy


@dataclass(frozen=True)
class Place:
    """Stages a path stands for; `run` when it is a whole run, `shard` one shard, `tar` a tar outside any run."""

    stages: tuple[Stage, ...] = ()
    shard: int | None = None
    tar: Path | None = None
    run: Path | None = None


def locate(path: str | Path) -> Place:
    """Find out what `path` is. Raises UserError when it is neither a run, nor a stage, nor a shard."""
    path = _here(path) if is_url(path) else Path(path)
    if not os.path.lexists(path) and not (path.suffix == ".tar" and url_of(path) and mirror.exists(path)):
        raise UserError(f"{shown(str(path))} does not exist", "give a run, an iteration of it, or a shard")
    if path.suffix == ".tar":
        return _shard(path)
    absolute = path.resolve()
    stage = _stage(absolute)
    if stage is not None and stage.path.is_dir():
        return Place((stage,))
    run = Run(path)
    stages = [run.iteration(number) for number in run.iterations()]
    stages += [run.evaluation(number) for number in run.evaluations()]
    if not stages and not run.config_path.exists():
        raise UserError(f"{path} is neither a run, nor a stage, nor a shard", "give a folder that holds run.toml")
    return Place(tuple(stages), run=run.path)


def _here(url: str | Path) -> Path:
    """The working copy of a run, stage or shard at a URL, up to date."""
    path = working_copy(url)
    if path.suffix != ".tar":
        mirror.pull(path)
        mirror.settle(path)
    elif place := _shard(path).stages:
        mirror.pull(place[0].path)
    else:
        mirror.look(path)
    return path


def _shard(path: Path) -> Place:
    match = re.fullmatch(r"shard-(\d{6})\.tar", path.name)
    absolute = Path(os.path.abspath(path))  # not resolved: a link in place of a shard is a fault, not a detour
    stage = _stage(absolute.parent.parent) if absolute.parent.name == "rollout" else None
    return Place((stage,), int(match[1])) if match and stage else Place(tar=path)


def _stage(path: Path) -> Stage | None:
    match = re.fullmatch(r"iter-(\d{4,})", path.name)
    if not match:
        return None
    if path.parent.name == "eval":
        return Run(path.parent.parent).evaluation(int(match[1]))
    return Run(path.parent).iteration(int(match[1]))
