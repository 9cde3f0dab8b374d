"""Rollout by several processes of one machine, which stay alive with their models from stage to stage of a loop."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import torch

from rollout import run as rollout_run
from rollout.policy import Policy
from rollout.ranks.device import device_of_worker
from rollout.run import RolloutReport
from shards.plan import Kind
from shards.process.machine import take_place
from shards.process.pool import Pool
from shards.process.progress import Progress
from shards.process.torchrun import world_size
from shards.run import Run, Stage
from shards.run_toml import Setting
from shards.workers.worker import Part

MOMENT = 1.0  # seconds to wait for the report of a helper whose work is published

Counts = tuple[int, int]  # videos sampled, and those of them that are not finite

helpers = Pool(torch.set_num_threads)


def rollout(
    run: Run,
    stage: Stage,
    policy: Policy | None = None,
    progress: Progress | None = None,
    worker: Part = (0, 1),
    wait: bool = False,
    tell: Callable[[str], None] | None = None,
) -> RolloutReport:
    """As `run.rollout`, by `rollout.workers` processes: this one, and helpers that take shards like any worker.

    A helper that is late or dies costs nothing but time: this process samples what nobody has claimed. The ranks of
    torchrun are workers themselves and have no helpers. On GPUs each process has one of its own, this one the first;
    UserError where there are fewer.
    """
    count = run.config.rollout.workers
    take_place(worker, count)
    if count == 1 or world_size() > 1 or stage.is_complete():
        return rollout_run.rollout(run, stage, policy, progress, worker, wait, tell)
    devices = [device_of_worker(run.config.model.device, index, count) for index in range(count)]
    began = time.monotonic()
    first, parts = worker[0] * count, worker[1] * count
    try:
        futures = _hand_out(run, stage, [(first + i, parts) for i in range(1, count)], devices[1:])
        ours = rollout_run.rollout(run, stage, policy, progress, (first, parts), tell=tell)
        # a helper that still loads its model finds out for itself that nothing is left
        theirs, broken = _join(futures, MOMENT if stage.is_complete() else None)
        done, broken = ours.done + theirs, ours.broken + broken
        rest = rollout_run.rollout(run, stage, policy, progress, (first, parts), wait)
    except BaseException:
        helpers.discard()
        raise
    skipped = max(0, rest.skipped - done)
    done, broken = done + rest.done, broken + rest.broken
    return replace(rest, done=done, skipped=skipped, seconds=time.monotonic() - began, broken=broken)


def _hand_out(run: Run, stage: Stage, parts: list[Part], devices: list[str]) -> list[Future[Counts]]:
    """Give each helper its part and its device.

    When one has ended since the last stage, new ones take the place of all. When one ends while this gives out work,
    nobody gets any: new helpers start with the next stage.
    """
    executor = start_helpers(len(parts))
    job = (str(run.path), run.sets, stage.kind, stage.iteration)
    try:
        return [executor.submit(_sample, *job, part, device) for part, device in zip(parts, devices, strict=True)]
    except BrokenProcessPool:
        helpers.discard()
        return []


def start_helpers(count: int) -> ProcessPoolExecutor:
    """So many helpers, with our number of threads: another one could give other bits."""
    return helpers.of(count, torch.get_num_threads())


def _join(futures: list[Future[Counts]], seconds: float | None) -> Counts:
    """Wait for the helpers, not longer than that; the numbers of videos they sampled.

    When one died, its shard is free again, and new helpers start with the next stage.
    """
    try:
        counts = [future.result() for future in concurrent.futures.wait(futures, seconds).done]
    except BrokenProcessPool:
        helpers.discard()
        return 0, 0
    return sum(done for done, _ in counts), sum(broken for _, broken in counts)


_loaded: dict[str, Policy] = {}
"""By run, on the device that this helper was given first: later work stays there, whichever it names."""


def loaded(run: Run, device: str) -> Policy:
    """The model of a run in a helper, which keeps it from one piece of work to the next."""
    name = str(run.path)
    if name not in _loaded:
        _loaded.clear()
        _loaded[name] = Policy.of(run.config.model.model_copy(update={"device": device}))
    return _loaded[name]


def _sample(path: str, sets: tuple[Setting, ...], kind: Kind, iteration: int, part: Part, device: str) -> Counts:
    """One helper's part of a stage, with a model that is loaded once; the numbers of videos it sampled."""
    run = Run.open(path, sets)
    stage = run.iteration(iteration) if kind == "rollout" else run.evaluation(iteration)
    if stage.is_complete():
        return 0, 0
    report = rollout_run.rollout(run, stage, loaded(run, device), None, part)
    return report.done, report.broken
