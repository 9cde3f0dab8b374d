"""Measurements on the machine at hand: workers and ranks on the embedded model, files of real size, the order at size.

Every process of a measurement is the product's own command under bench/scale_probe.py, one torch thread each.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.plans import bare_plan, bare_sample
from bench.scale_probe import kinds, moved
from shards.errors import RunFailed
from shards.files import publish_new
from shards.plan import group_key
from shards.reader import open_shard
from shards.run import Run, Stage
from shards.run_toml import apply_sets, parse_config, read_preset
from shards.spool import write_group, write_phase, write_samples
from shards.workers.claims import claim
from shards.writer import seal
from train.order import Unit, plan_ranks

PROBE = Path(__file__).with_name("scale_probe.py")
KINDS = ("model", "video", "read", "write", "wait", "rest")
ENOUGH = {0, 3, 75}  # a worker that came late, or that leaves the last shards to others, has a code of its own
STATE = (16, 21, 60, 104)  # A14B at 480x832, 81 frames
STATES = 7
VIDEO = 2_500_000


@dataclass(frozen=True)
class Measured:
    """What files of real size cost."""

    publish: float
    """Seconds to create, sync and link one small file."""
    write: float
    """Bytes a second of spooling samples and sealing the shard: checksums, sha256 and syncs included."""
    read: float
    """Bytes a second of reading states with their checksums, from the page cache."""


@dataclass(frozen=True)
class Size:
    """The run on the embedded model."""

    prompts: int
    group: int
    updates: int
    high: int = 2
    low: int = 2

    @property
    def videos(self) -> int:
        """Videos of the iteration, one shard a prompt."""
        return self.prompts * self.group

    @property
    def transitions(self) -> int:
        """Transitions of the iteration."""
        return self.videos * (self.high + self.low)


@dataclass(frozen=True)
class Timed:
    """One stage with some processes: what came out a second, and where the time of all processes went."""

    processes: int
    rate: float
    """Videos, or transitions in updates, a second."""
    shares: dict[str, float]
    """By kind; they add up to 1."""
    cpu: float
    """Seconds of all processes on a processor, for one video or transition."""
    seconds: float
    """From the first process with a model to the last one done; in training, of the updates."""
    parts: dict[str, float]
    """Seconds of all processes by label, what is inside included."""
    calls: dict[str, int]
    written: int
    """Bytes."""


def make_run(path: Path, size: Size, objective: str) -> Run:
    """A run of the `words` preset with one shard a prompt."""
    sets = {
        "rollout.prompts_per_iteration": size.prompts, "rollout.group_size": size.group,
        "rollout.batch_size": size.group, "rollout.groups_per_shard": 1,
        "rollout.high_steps": size.high, "rollout.low_steps": size.low, "rollout.workers": 1,  # no helper unseen
        "train.objective": f'"{objective}"', "train.updates_per_rollout": size.updates,
    }  # fmt: skip
    values = apply_sets(read_preset("words"), [f"{name}={value}" for name, value in sets.items()])
    return Run.create(path, parse_config(values, "preset words"))


def launch(folder: Path, commands: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Run commands side by side; what their probes left in `folder`, by rank. Raises RunFailed when one fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process, command in zip(started, commands, strict=True):
        told = process.communicate()[1]
        if process.returncode not in ENOUGH:
            raise RunFailed(f"{' '.join(command)} ended with {process.returncode}: {told[-2000:]}")
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(records, key=lambda record: record["rank"])


def time_rollout(out: Path, size: Size, workers: int) -> tuple[Run, Timed]:
    """Sample a new run with so many workers."""
    run = make_run(out / "run", size, "nft")
    words = ("rollout", str(run.path), "--iteration", "0")
    commands = [
        (sys.executable, str(PROBE), str(out / "probes"), *words, "--worker", f"{worker}/{workers}")
        for worker in range(workers)
    ]
    records = launch(out / "probes", commands)
    if len(run.iteration(0).shards()) != size.prompts:
        raise RunFailed(f"{run.path}: not all shards were sampled")
    return run, of_rollout(records, size.videos)


def of_rollout(records: Sequence[dict[str, Any]], videos: int) -> Timed:
    """What the probes of a rollout say. A worker that has nothing left to do waits for the last one."""
    done = [record["last"]["rollout"] for record in records]
    seconds = max(done) - min(record["first"].get("load", record["began"]) for record in records)
    spent = Counter[str]()
    for record, end in zip(records, done, strict=True):
        spent.update(kinds(record["own"]["rollout"]))
        spent["wait"] += max(done) - end
    cpu = sum(record["cpu"]["rollout"] - record["cpu"].get("load", 0.0) for record in records)
    return _timed(records, videos / seconds, cpu / videos, spent, seconds)


def time_training(out: Path, sampled: Run, size: Size, objective: str, ranks: int) -> Timed:
    """Train a copy of a sampled run with so many ranks; advantages alternate, which costs what real ones cost."""
    from bench.gpu.iteration import advise

    shutil.copytree(sampled.path, out / "run")
    (out / "run" / "run.toml").unlink()
    run = make_run(out / "run", size, objective)
    advise(run.iteration(0))
    words = (str(PROBE), str(out / "probes"), "train", str(run.path), "--iteration", "0")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    records = launch(out / "probes", [(sys.executable, *(torchrun if ranks > 1 else ()), *words)])
    if not run.iteration(0).trained():
        raise RunFailed(f"{run.path}: not trained")
    return of_training(records, size.transitions)


def of_training(records: Sequence[dict[str, Any]], transitions: int) -> Timed:
    """What the probes of a training say of its updates."""
    seconds = max(record["total"]["update"] for record in records)
    spent = Counter[str]()
    for record in records:
        spent.update(kinds(record["own"]["update"]))
    cpu = sum(record["cpu"]["update"] for record in records)
    return _timed(records, transitions / seconds, cpu / transitions, spent, seconds)


def _timed(records: Sequence[dict[str, Any]], rate: float, cpu: float, spent: Counter[str], seconds: float) -> Timed:
    whole = sum(spent.values())
    parts, calls = Counter[str](), Counter[str]()
    for record in records:
        parts.update(record["total"])
        parts.update(record["aside"])
        calls.update(record["calls"])
    shares = {kind: spent[kind] / whole for kind in KINDS}
    written = sum(record["bytes"]["written"] for record in records)
    return Timed(len(records), rate, shares, cpu, seconds, dict(parts), dict(calls), written)


def middle(rounds: Sequence[Timed]) -> Timed:
    """The round with the median rate; of an even number, the slower of the two."""
    return sorted(rounds, key=lambda one: one.rate)[(len(rounds) - 1) // 2]


# --- Files -----------------------------------------------------------------------------------------------------------


def time_files(out: Path, samples: int, files: int) -> tuple[Measured, dict[str, float]]:
    """Publish, seal and read a shard as large as A14B's, and small files; also seconds of single actions, median."""
    stage = Stage(out, "iter-0000", 0, "rollout")
    group = group_key(0, 0)
    stage.publish_plan(bare_plan(0, 1, samples))
    numbers = np.random.default_rng(0).standard_normal((STATES, *STATE), dtype=np.float32).astype(np.float16)
    found = [bare_sample(stage, group, number, numbers, bytes(VIDEO)) for number in range(samples)]
    parked = {"x": numbers[0].astype(np.float32), "kept": numbers[:4]}
    before, began = moved()["written"], time.perf_counter()
    write_group(stage, 0, group, {"prompt": numbers[0, 0], "negative": numbers[0, 1]})
    for sample in found:
        write_phase(stage, 0, sample.key, parked)
        write_samples(stage, 0, sample)
    sealing = time.perf_counter()
    seal(stage, 0, {})
    ended, written = time.perf_counter(), moved()["written"] - before
    with open_shard(stage, 0) as shard:
        shard.latents(found[0].key, [0, 1])
        reading = time.perf_counter()
        count = sum(shard.latents(sample.key, [2, 3]).nbytes for sample in found)
        read = count / (time.perf_counter() - reading)
    small = [_seconds_of(publish_new, out / "small" / f"{number}.json", b"x" * 1024) for number in range(files)]
    claimed = [_seconds_of(_claim, stage) for _ in range(files)]
    tar = stage.shard_path(0).stat().st_size
    measured = Measured(statistics.median(small), written / (ended - began), read)
    return measured, {
        "sealing": ended - sealing, "spooling": sealing - began, "claim": statistics.median(claimed),
        "tar": tar, "written": written, "samples": samples,
    }  # fmt: skip


def _claim(stage: Stage) -> None:
    with claim(stage, 0, "rollout"):
        pass


def _seconds_of(function: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


# --- Order -----------------------------------------------------------------------------------------------------------


def time_order(ranks: int, transitions: int, updates: int = 4) -> dict[str, float]:
    """Plan an iteration for many ranks, read every rank's list, and see that each transition is done exactly once.

    Three of five transitions are of the high-noise expert. Raises RunFailed when one is missing or done twice.
    """
    units = [
        Unit(int(step > 2), sample // 160, group_key(0, sample // 16), (sample % 16,), step)
        for sample in range(transitions // 5)
        for step in range(5)
    ]
    began = time.perf_counter()
    plans = [plan_ranks(units, ranks, seed=0, iteration=0, expert=e, updates=updates) for e in (0, 1)]
    planned = time.perf_counter()
    done = Counter[Unit]()
    slots = Counter[int]()
    for plan in plans:
        for update in range(len(plan.batches)):
            for rank in range(ranks):
                mine = plan.of_rank(update, rank)
                slots[rank] += len(mine)
                done.update(slot.unit for slot in mine if slot.counts)
    ended = time.perf_counter()
    if done != Counter(units) or len(set(slots.values())) != 1:
        raise RunFailed("the order of training does not use every transition exactly once on all ranks")
    whole = ranks * slots[0]
    busiest = [plan.imbalance for plan in plans]
    return {"planning": planned - began, "reading": ended - planned, "padding": 1 - len(units) / whole,
            "imbalance": max(busiest), "slots": slots[0]}  # fmt: skip


# --- All of it -------------------------------------------------------------------------------------------------------


@contextmanager
def _emptied(path: Path) -> Iterator[Path]:
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path)


def measure(out: Path, size: Size, rounds: int, processes: Sequence[int]) -> dict[str, list[Timed]]:
    """Rollout and training, in turn with each number of processes, so that a busy machine slows all of them."""
    found: dict[str, list[Timed]] = {}
    for number in range(rounds):
        with _emptied(out / f"round-{number}") as folder:
            for count in processes:
                run, timed = time_rollout(folder / f"rollout-{count}", size, count)
                found.setdefault(f"rollout {count}", []).append(timed)
            for objective in ("nft", "grpo"):
                for count in processes:
                    timed = time_training(folder / f"{objective}-{count}", run, size, objective, count)
                    found.setdefault(f"{objective} {count}", []).append(timed)
    return found


def dump(found: dict[str, list[Timed]]) -> dict[str, Any]:
    """As plain values."""
    return {name: [asdict(one) for one in rounds] for name, rounds in found.items()}


def restore(values: dict[str, Any]) -> dict[str, list[Timed]]:
    """The opposite of `dump`."""
    return {name: [replace(Timed(**one)) for one in rounds] for name, rounds in values.items()}
