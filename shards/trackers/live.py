"""Metrics go to trackers while a stage works: updates as they are made, rewards as they are known.

The trackers are those of accelerate (`tensorboard`, `wandb`, `mlflow`, `comet_ml`, …), or a class of one's own with the
same methods. Each works in a thread of its own, so that one that is slow or fails costs no time and stops nothing.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

from shards.errors import UserError, nearest
from shards.measures import read_metrics
from shards.process.torchrun import is_first
from shards.records.opening import refuse_escape
from shards.settings.own_class import load_class
from shards.settings.trust import check_trust

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from shards.measures import StageReward
    from shards.records.updates import Update
    from shards.run import Run, Stage

SETTING = "track.to"
MODULES = {"comet_ml": "comet_ml", "dvclive": "dvclive"}  # packages of trackers, where they are called otherwise
WAITING = 10_000  # metrics that a slow tracker may be behind; later ones are lost to it
PATIENCE = 15.0  # s that the end of a command waits for a tracker to take the last ones
OWN_STEPS = ("wandb", "trackio", "swanlab")  # they count calls, and draw against a metric that they are given
AXES = {"training/*": "iteration", "held out/*": "iteration", "high_noise/*": "update", "low_noise/*": "update"}
_open: list[Feed] = []
_given: set[tuple[str, int]] = set()  # expert and number of the updates that the open trackers were given


@contextmanager
def tracking(run: Run) -> Iterator[None]:
    """While the block runs, metrics go to the trackers that `track.to` names; of several ranks the first one's do.

    Raises UserError, before anything is done, for a tracker that is not known, not trusted, or whose package is
    missing. What goes wrong later is said once, and that tracker gets no more.
    """
    check_trust(run, run.config.track.to)
    classes = {name: _class_of(name) for name in dict.fromkeys(run.config.track.to)}
    if not classes or _open or not is_first():
        yield
        return
    _open.extend(Feed(name, found, run) for name, found in classes.items())
    try:
        yield
    finally:
        for feed in _open:
            feed.close()
        _open.clear()
        _given.clear()


def track_update(record: Update) -> None:
    """Give the numbers of one update to the trackers; `record` is a line of metrics.jsonl."""
    if not _open:
        return
    step = int(record["total_updates"])
    _given.add((record["expert"], step))
    values = {f"{record['expert']}/{name}": value for name, value in record.items() if isinstance(value, float)}
    for feed in _open:
        feed.put(values, "update", step)


@contextmanager
def tracking_helpers(stage: Stage) -> Iterator[None]:
    """At the end of the block, give the trackers those updates of an iteration that another process made meanwhile.

    A helper has no trackers of its own: two processes that write to one run of a tracker get in each other's way.
    """
    before = [(record["expert"], record["total_updates"]) for record in read_metrics(stage)] if _open else []
    yield
    for record in read_metrics(stage) if _open else ():
        if (record["expert"], record["total_updates"]) not in _given.union(before):
            track_update(record)


def track_reward(reward: StageReward) -> None:
    """Give the mean reward of a stage to the trackers, by its iteration."""
    kind = "held out" if reward.kind == "eval" else "training"
    values = {f"{kind}/reward": reward.now.mean, f"{kind}/reward_error": reward.now.error}
    if reward.kind != "eval" and reward.now.groups:
        values[f"{kind}/groups_used"] = reward.now.used_groups / reward.now.groups
    for feed in _open:
        feed.put(values, "iteration", int(reward.stage.rpartition("-")[2]))


class _Log(logging.LoggerAdapter[logging.Logger]):
    """A log for accelerate's trackers, which give more arguments than `logging` knows."""

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        """As `logging`; which processes log is decided elsewhere."""
        options = {name: value for name, value in options.items() if name not in ("main_process_only", "in_order")}
        super().log(level, msg, *args, **options)

    def warning_once(self, msg: object, *args: object, **options: Any) -> None:
        """A warning."""
        self.warning(msg, *args, **options)


class Feed:
    """One tracker with the thread that speaks to it, which begins with the first metric."""

    def __init__(self, name: str, made_by: type[GeneralTracker], run: Run) -> None:
        self.name, self.made_by, self.run = name, made_by, run
        self.queue: Queue[tuple[dict[str, float], str, int] | None] = Queue(WAITING)
        self.thread: Thread | None = None
        self.failed = False

    def put(self, values: Mapping[str, float], axis: str, step: int) -> None:
        """Leave some numbers for the tracker; returns at once. What is not finite is left out."""
        kept = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        if self.failed or not kept:
            return
        if self.thread is None:
            self.thread = Thread(target=self._work, name=f"tracker {self.name}", daemon=True)
            self.thread.start()
        try:
            self.queue.put_nowait((kept, axis, step))
        except Full:
            self._fail(f"it is {WAITING} metrics behind")

    def close(self) -> None:
        """Let the tracker take what it still has to, for a while."""
        if self.thread is None:
            return
        if not self.failed:
            try:
                self.queue.put_nowait(None)
            except Full:
                self._fail(f"it is {WAITING} metrics behind")
        self.thread.join(PATIENCE)
        if self.thread.is_alive() and not self.failed:
            self._fail(f"it has not taken the last metrics within {PATIENCE:g} s")

    def _work(self) -> None:
        try:
            tracker = _started(self.name, self.made_by, self.run)
            while (item := self.queue.get()) is not None:
                values, axis, step = item
                if self.name in OWN_STEPS:
                    tracker.log(values | {axis: step})
                else:
                    tracker.log(values, step=step)
            if hasattr(tracker, "finish"):
                tracker.finish()
        except BaseException as error:  # a tracker may raise anything, also SystemExit
            self._fail(" ".join(f"{type(error).__name__}: {error}".split()))

    def _fail(self, reason: str) -> None:
        self.failed = True
        text = f"tracker {self.name}: {reason} (hint: it gets no more metrics; the run continues, and keeps them all)"
        print(text, file=sys.stderr, flush=True)


def _started(name: str, made_by: type[GeneralTracker], run: Run) -> GeneralTracker:
    """A tracker that is ready to be given numbers."""
    own, folder = run.path.resolve().name, run.report_dir / "live"
    refuse_escape(folder, root=run.path)
    options: dict[str, object] = {}
    if getattr(made_by, "requires_logging_directory", False):
        folder.mkdir(parents=True, exist_ok=True)
        options["logging_dir"] = str(folder)
    project = own
    if name == "wandb":  # the same folder is always the same run there
        project = os.environ.get("WANDB_PROJECT") or "rushes"
        folder.mkdir(parents=True, exist_ok=True)
        options |= {"id": f"{own}-live", "name": own, "resume": "allow", "dir": str(folder)}
    tracker = made_by(project, **options)
    tracker.main_process_only = False  # we are: else accelerate would ask torch.distributed, from this thread
    if hasattr(tracker, "start"):
        tracker.start()
    if name == "wandb":
        for axis in dict.fromkeys(AXES.values()):
            tracker.tracker.define_metric(axis)
        for pattern, axis in AXES.items():
            tracker.tracker.define_metric(pattern, step_metric=axis)
    return tracker


def _class_of(name: str) -> type[GeneralTracker]:
    """What makes a tracker of this name: a class of accelerate's, or one of the user's, `module:Class`."""
    if ":" in name:
        return load_class(f"tracker {name!r}", name)
    from accelerate import tracking as theirs

    theirs.logger = _Log(logging.getLogger(theirs.__name__), {})  # their own one asks for the state of an Accelerator
    known_names: dict[str, type[GeneralTracker]] = theirs.LOGGER_TYPE_TO_CLASS
    if name not in known_names:
        near = nearest(name, list(known_names), 0.5)
        known = f"there are: {', '.join(sorted(known_names))}, and your own as `module:Class`"
        raise UserError(f"{SETTING}: no tracker {name!r}", f"did you mean {near}? {known}" if near else known)
    package = MODULES.get(name, name)
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{SETTING}: {name} is not installed", f"pip install {package}, or take {name} out of it")
    return known_names[name]
