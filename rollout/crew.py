"""Rollout by several processes of one machine, which stay alive with their models from stage to stage of a loop."""

from __future__ import annotations

import atexit
import concurrent.futures
import multiprocessing
import os
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import torch

from rollout import generate
from rollout.generate import RolloutReport
from rollout.policy import Policy
from shards.progress import Progress
from shards.run import Kind, Run, Stage
from shards.signals import leave_to_parent
from shards.world import world_size

Part = tuple[int, int]

MOMENT = 1.0  # seconds to wait for the report of a helper whose work is published


def rollout(
    run: Run,
    stage: Stage,
    policy: Policy | None = None,
    progress: Progress | None = None,
    worker: Part = (0, 1),
    wait: bool = False,
) -> RolloutReport:
    """As `generate.rollout`, by `rollout.workers` processes: this one, and helpers that take shards like any worker.

    A helper that is late or dies costs nothing but time: this process samples what nobody has claimed. The ranks of
    torchrun are workers themselves and have no helpers.
    """
    count = run.config.rollout.workers
    if count == 1 or world_size() > 1 or _complete(stage):
        return generate.rollout(run, stage, policy, progress, worker, wait)
    began = time.monotonic()
    first, parts = worker[0] * count, worker[1] * count
    job = (str(run.path), run.sets, stage.kind, stage.iteration)
    try:
        futures = [_pool(count - 1).submit(_sample, *job, (first + i, parts)) for i in range(1, count)]
        ours = generate.rollout(run, stage, policy, progress, (first, parts))
        # a helper that still loads its model finds out for itself that nothing is left
        done = ours.done + _join(futures, MOMENT if _complete(stage) else None)
        rest = generate.rollout(run, stage, policy, progress, (first, parts), wait)
    except BaseException:
        discard_helpers()
        raise
    skipped = max(0, rest.skipped - done)
    return replace(rest, done=done + rest.done, skipped=skipped, seconds=time.monotonic() - began)


def _complete(stage: Stage) -> bool:
    plan = stage.plan()
    return plan is not None and len(stage.shards()) == len(plan["shards"])


def _join(futures: list[Future[int]], seconds: float | None) -> int:
    """Wait for the helpers, not longer than that; the number of videos they sampled.

    When one died, its shard is free again, and new helpers start with the next stage.
    """
    try:
        return sum(future.result() for future in concurrent.futures.wait(futures, seconds).done)
    except BrokenProcessPool:
        discard_helpers()
        return 0


_pools: dict[int, ProcessPoolExecutor] = {}


def _pool(helpers: int) -> ProcessPoolExecutor:
    if helpers not in _pools:
        context = multiprocessing.get_context("spawn")
        threads = torch.get_num_threads()  # another number could give other bits
        _pools[helpers] = ProcessPoolExecutor(helpers, context, _begin, (threads,))
    return _pools[helpers]


@atexit.register
def discard_helpers() -> None:
    """Stop all helpers; the next rollout starts new ones."""
    while _pools:
        _pools.popitem()[1].shutdown(wait=False, cancel_futures=True)


def _begin(threads: int) -> None:
    leave_to_parent()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent must not leave helpers behind that wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_loaded: dict[str, Policy] = {}


def _sample(path: str, sets: tuple[str, ...], kind: Kind, iteration: int, part: Part) -> int:
    """One helper's part of a stage, with a model that is loaded once; the number of videos it sampled."""
    run = Run.open(path, sets)
    stage = run.iteration(iteration) if kind == "rollout" else run.evaluation(iteration)
    if _complete(stage):
        return 0
    if path not in _loaded:
        _loaded.clear()
        _loaded[path] = Policy.of(run.config.model)
    return generate.rollout(run, stage, _loaded[path], None, part).done
