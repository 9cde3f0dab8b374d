"""Both experts of an iteration at once: one in this process, one in a helper, each as `train` alone would train it."""

from __future__ import annotations

import concurrent.futures
import os
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rollout.memory.needs import Need, train_need
from rollout.policy import Policy
from rollout.processes import helpers, loaded, start_helpers
from rollout.ranks.device import share_cores
from shards.errors import StillBusy, Stopped
from shards.process.peak_memory import available_memory_bytes
from shards.process.signals import check, stoppable
from shards.process.torchrun import world_size
from shards.run import EXPERT_NAMES, Run
from shards.trackers.live import tracking_helpers
from train.run import TrainReport, choose_experts, train

if TYPE_CHECKING:
    from shards.process.progress import Progress
    from shards.run_toml import Setting

SLICE = 0.5  # seconds between two looks whether a signal asked for the end
FIRST, SECOND = EXPERT_NAMES
Ends = (BrokenProcessPool, StillBusy, Stopped, MemoryError, torch.OutOfMemoryError)
"""What may become of a helper that costs nothing but time."""


def train_at_once(
    run: Run, iteration: int, policy: Policy | None = None, progress: Progress | None = None, advantage: str = ""
) -> TrainReport:
    """As `train.run.train`, by two processes where `train.experts_at_once` allows it: the experts share no weight.

    This one trains the high-noise expert, a helper the low-noise one, and the last to finish publishes. A helper that
    is late, dies or runs out of memory costs nothing but time: this process then trains the other expert too. What else
    ends it is raised here.
    """
    began, stage = time.monotonic(), run.iteration(iteration)
    device = None if stage.trained() or stage.plan() is None else second_device(run, policy)
    if device is None:
        return train(run, iteration, policy, progress, advantage)
    share_cores(run.config)
    policy = policy or Policy.of(run.config.model)
    with tracking_helpers(stage):
        report = _both(run, iteration, policy, progress, advantage, _hand_out(run, iteration, advantage, device))
    return replace(report, seconds=time.monotonic() - began)


def _both(
    run: Run,
    iteration: int,
    policy: Policy,
    progress: Progress | None,
    advantage: str,
    future: Future[TrainReport] | None,
) -> TrainReport:
    """The high-noise expert here; the other one too, unless the helper that `future` stands for trains it."""
    try:
        report = train(run, iteration, policy, progress, advantage, FIRST)
        while report.missing:
            try:
                report = train(run, iteration, policy, progress, advantage, SECOND)
            except StillBusy:
                if future is None:  # another process than our helper has it
                    raise
                report, future = _result(future) or report, None
        if report.skipped and future:  # the helper has just published: its report says how that was
            report = _result(future) or report
    except BaseException as error:
        _stop(future, at_once=not isinstance(error, Stopped))
        raise
    return report


def second_device(run: Run, policy: Policy | None) -> str | None:
    """The device of the second process, as model.device names it; None where this one trains the experts in turn.

    On GPUs that is the one after ours, where model.device leaves the choice. On a CPU `rollout.workers` says whether
    the run may have a second process, which then has the model in memory already. Either way the memory of this machine
    must allow it, unless `train.experts_at_once` is true.
    """
    wanted = run.config.train.experts_at_once
    if wanted is False or world_size() > 1 or len(choose_experts(run, policy, "")) < 2:
        return None
    device = policy.device if policy else Policy.device_of(run.config.model)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if gpus > 1 and device.index is None:
        second, room = f"cuda:{(torch.cuda.current_device() + 1) % gpus}", True
    else:
        second = run.config.model.device
        room = device.type == "cpu" and run.config.rollout.workers > 1 and len(os.sched_getaffinity(0)) > 1
    return second if wanted is True or (room and _has_memory(run, device)) else None


_needs: dict[tuple[str, str], Need] = {}  # by run and settings: counting takes a moment


def _has_memory(run: Run, device: torch.device) -> bool:
    """Whether this machine has room for one more process that trains; true where nobody can say."""
    name = str(run.path), run.config.model_dump_json()
    available, need = available_memory_bytes(), _needs[name] if name in _needs else train_need(run)
    _needs[name] = need
    return available is None or need.host + (need.device if device.type == "cpu" else 0) < available


def _hand_out(run: Run, iteration: int, advantage: str, device: str) -> Future[TrainReport] | None:
    """Give the other expert to a helper, one of those of the rollout; None when none could be started."""
    executor = start_helpers(max(1, run.config.rollout.workers - 1))
    try:
        return executor.submit(_train_second, str(run.path), run.sets, iteration, advantage, device)
    except BrokenProcessPool:
        helpers.discard()
        return None


def _train_second(path: str, sets: tuple[Setting, ...], iteration: int, advantage: str, device: str) -> TrainReport:
    """A helper's part. SIGTERM ends it after an update, which is kept."""
    run = Run.open(path, sets)
    policy = loaded(run, device)
    with stoppable():
        return train(run, iteration, policy, None, advantage, SECOND)


def _result(future: Future[TrainReport]) -> TrainReport | None:
    """What the helper did; None when it came to an end without doing it. Raises what else ended it, and Stopped."""
    while not concurrent.futures.wait([future], SLICE).done:
        check(f"while the {SECOND} expert was trained")
    try:
        return future.result()
    except BrokenProcessPool:
        helpers.discard()
    except Ends:
        pass
    return None


def _stop(future: Future[TrainReport] | None, *, at_once: bool) -> None:
    """End the helper; unless `at_once`, it finishes its update first, and keeps that."""
    helpers.discard(at_once=at_once)
    if future and not at_once:
        concurrent.futures.wait([future])
