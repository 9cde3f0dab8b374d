"""A `rushes` command with a stopwatch on its parts: where the time of one process goes. bench/scale.py starts it.

    python bench/scale_probe.py FOLDER rollout RUN --worker 0/2
    torchrun --nproc-per-node 2 bench/scale_probe.py FOLDER train RUN

The command is the product's own; its functions are wrapped before it begins, so that the product carries no timers.
Every process leaves one JSON file in FOLDER.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

PHASES = ("rollout", "train", "update", "replay", "load")  # a moment belongs to the innermost of these
OURS = ("cli", "shards", "rollout", "score", "train")


@dataclass(frozen=True)
class Probe:
    """What to time: a function, a method, or, with `context`, entering and leaving a context manager."""

    label: str
    kind: str
    """phase, model, video, read, write or wait"""
    target: str
    """module:name or module:Class.name"""
    context: bool = False


PROBES = (
    Probe("rollout", "phase", "rollout.run:rollout"),
    Probe("train", "phase", "train.run:train"),
    Probe("update", "phase", "train.trainer:ExpertTrainer.update"),
    Probe("replay", "phase", "train.replay:prove"),
    Probe("load", "phase", "rollout.policy:Policy.of"),
    Probe("velocity", "model", "rollout.policy:Policy.velocity"),
    Probe("decode", "model", "rollout.policy.media:Vae.decode"),
    Probe("encode", "model", "rollout.policy.media:TextEncoder.encode"),
    Probe("backward", "model", "torch:Tensor.backward"),
    Probe("optimizer", "model", "torch.optim:AdamW.step"),
    Probe("mp4", "video", "shards.video:encode_mp4"),
    Probe("chunk", "read", "train.batch_loss:Losses.read"),  # what an update waits for, read ahead or not
    Probe("replayed", "read", "train.data:read_batch"),
    Probe("open", "read", "train.data:Rollouts.open"),
    Probe("group", "read", "shards.spool:read_group"),
    Probe("sample", "write", "shards.spool:write_samples"),
    Probe("phase", "write", "shards.spool:write_phase"),
    Probe("text", "write", "shards.spool:write_group"),
    Probe("seal", "write", "shards.writer:seal"),
    Probe("behind", "write", "shards.process.background:Background.settle"),  # for encoding and writing, in a thread
    Probe("publish", "write", "shards.files:publish_new"),
    Probe("fsync", "write", "os:fsync"),
    Probe("link", "write", "os:link"),
    Probe("checkpoint", "write", "train.checkpoint:Checkpoints.save"),
    Probe("checkpoints", "write", "train.checkpoint:Checkpoints.wait"),
    Probe("claim", "wait", "shards.workers.claims:claim", context=True),
    Probe("pause", "wait", "shards.workers.claims:Pause.__call__"),
    *(
        Probe(name, "wait", f"torch.distributed:{name}")
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast", "barrier",
                     "all_gather_object", "broadcast_object_list", "Work.wait")
    ),
    Probe("wait_tensor", "wait", "torch.distributed._functional_collectives:wait_tensor"),
)  # fmt: skip
KINDS = {probe.label: probe.kind for probe in PROBES}


class Account:
    """Seconds of one thread: every moment is owned by the innermost call that is timed, in the innermost phase."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, processor: Callable[[], float] = time.thread_time
    ) -> None:
        self.clock, self.processor, self.thread = clock, processor, threading.get_ident()
        self.own: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        """By phase and label: without the timed calls inside."""
        self.total: dict[str, float] = defaultdict(float)
        """By label: with everything inside."""
        self.cpu: dict[str, float] = defaultdict(float)
        """By label, with everything inside: seconds on a processor, which a busy machine does not stretch."""
        self.calls: dict[str, int] = defaultdict(int)
        self.first: dict[str, float] = {}
        """When a label was first left, on the clock."""
        self.last: dict[str, float] = {}
        self.aside: dict[str, float] = defaultdict(float)
        """Seconds of calls in other threads, which may overlap with all of the above."""
        self._stack: list[str] = []
        self._since = clock()

    @contextmanager
    def timed(self, label: str) -> Iterator[None]:
        """What runs inside belongs to `label`. A call inside one of the same label is part of it."""
        began = self.clock()
        if threading.get_ident() != self.thread:
            try:
                yield
            finally:
                self.aside[label] += self.clock() - began
                self.calls[label] += 1
            return
        worked = self.processor()
        self._turn(began)
        self._stack.append(label)
        try:
            yield
        finally:
            ended = self.clock()
            self._turn(ended)
            self._stack.pop()
            if label not in self._stack:
                self.total[label] += ended - began
                self.cpu[label] += self.processor() - worked
                self.calls[label] += 1
            self.first.setdefault(label, ended)
            self.last[label] = ended

    def _turn(self, now: float) -> None:
        """Write down the time since the last turn for whoever had it."""
        if self._stack:
            phase = next((label for label in reversed(self._stack) if label in PHASES), "")
            self.own[phase][self._stack[-1]] += now - self._since
        self._since = now


def kinds(own: dict[str, float]) -> dict[str, float]:
    """Seconds of one phase by kind; what its functions do themselves is `rest`."""
    found: dict[str, float] = defaultdict(float)
    for label, seconds in own.items():
        kind = KINDS[label]
        found["rest" if kind == "phase" else kind] += seconds
    return dict(found)


def install(account: Account, probes: Sequence[Probe]) -> None:
    """Put the stopwatch on every probe, wherever its function was imported by name. AttributeError for a wrong name."""
    modules = [importlib.import_module(probe.target.partition(":")[0]) for probe in probes]
    for probe, module in zip(probes, modules, strict=True):
        owner: Any = module
        *inner, name = probe.target.partition(":")[2].split(".")
        for part in inner:
            owner = getattr(owner, part)
        bound = isinstance(owner, type) and isinstance(vars(owner).get(name), classmethod)
        original = vars(owner)[name].__func__ if bound else getattr(owner, name)
        wrapped = _context(account, probe.label, original) if probe.context else _call(account, probe.label, original)
        setattr(owner, name, classmethod(wrapped) if bound else wrapped)
        if owner is module:
            _replace(original, wrapped)


def _replace(original: Any, wrapped: Any) -> None:
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] in OURS:
            for key in [key for key, value in vars(module).items() if value is original]:
                setattr(module, key, wrapped)


def _call(account: Account, label: str, function: Any) -> Any:
    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with account.timed(label):
            return function(*args, **kwargs)

    return timed


def _context(account: Account, label: str, function: Any) -> Any:
    @functools.wraps(function)
    @contextmanager
    def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        manager = function(*args, **kwargs)
        with account.timed(label):
            value = manager.__enter__()
        try:
            yield value
        except BaseException:
            with account.timed(label):
                swallowed = manager.__exit__(*sys.exc_info())
            if not swallowed:
                raise
        else:
            with account.timed(label):
                manager.__exit__(None, None, None)

    return timed


def moved() -> dict[str, int]:
    """Bytes that this process has read and written so far, through whatever cache (Linux)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = dict(line.split(": ") for line in lines)
    return {"read": int(counts["rchar"]), "written": int(counts["wchar"])}


def main() -> None:
    """Run the command and write down where its time went."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    import cli
    from shards.process import torchrun

    for name in ("rollout.run", "train.run", "av", "pandas", "pyarrow.parquet"):  # not to be timed
        importlib.import_module(name)
    account = Account()
    install(account, PROBES)
    sys.argv = ["rushes", *words]
    before, began = moved(), time.monotonic()
    try:
        cli.main()
    finally:
        record = {
            "rank": torchrun.rank(), "began": began, "ended": time.monotonic(), "own": account.own,
            "total": account.total, "cpu": account.cpu, "calls": account.calls, "first": account.first,
            "last": account.last, "aside": account.aside,
            "bytes": {name: count - before[name] for name, count in moved().items()},
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{os.getpid()}.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    from shards.process.torchrun import run_to_end

    run_to_end(main) if "WORLD_SIZE" in os.environ else main()
