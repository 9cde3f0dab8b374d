"""The rollout stage: samples the shards that are missing, one expert at a time; a kill loses at most a chunk."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rollout.planning import stage_plan, take_policy
from rollout.policy import Policy
from rollout.sampler import Chunk, Sampler, State, Tensors
from shards.errors import UserError
from shards.progress import Progress
from shards.run import SAMPLE_KEY, Run, Stage, claim
from shards.writer import (
    Sample,
    read_group,
    read_phase,
    seal,
    spooled,
    write_group,
    write_phase,
    write_sample,
)


@dataclass(frozen=True)
class RolloutReport:
    """What a call of `rollout` did."""

    done: int
    """Videos sampled."""
    skipped: int
    """Videos that were there already."""
    seconds: float
    busy: int = 0
    """Shards that other workers hold and have not finished."""

    def __str__(self) -> str:
        if not self.done:
            return f"nothing to do: {self.skipped} videos are there"
        rate = self.done / max(self.seconds, 1e-9)
        there = f", {self.skipped} were there" if self.skipped else ""
        return f"{self.done} videos sampled{there}; {self.seconds:.1f} s, {rate:.2f} videos/s"


def rollout(
    run: Run,
    stage: Stage,
    policy: Policy | None = None,
    progress: Progress | None = None,
    worker: tuple[int, int] = (0, 1),
) -> RolloutReport:
    """Sample every shard of a stage that is missing. A stage that is complete is left alone, and no model is loaded.

    `policy` is a loaded model, which is given the weights of the stage; None loads it as run.toml says. Worker (i, n)
    begins with the shards i, i+n, … and goes on with what others have not claimed. Samples are committed one by one to
    the spool of their shard, so that a killed stage goes on where it was. Raises UserError for a plan that differs from
    the one on disk, for a policy that was not trained yet, and for prompts or sizes the model cannot take.
    """
    began = time.monotonic()
    plan = stage.plan()
    if plan is not None and len(stage.shards()) == len(plan["shards"]):
        return RolloutReport(0, len(plan["groups"]) * plan["group_size"], time.monotonic() - began)
    policy = policy or Policy.of(run.config.model)
    identity = take_policy(run, stage, policy)
    plan = stage.publish_plan(stage_plan(run, stage, policy.layout, identity))
    work = _Work(stage, Sampler(policy, plan, stage.plan_sha256()), progress)
    busy = work.go(_order(len(plan["shards"]), worker))
    if busy:  # a worker may have died in the meantime
        busy = work.go(busy)
    policy.use(None)
    total = len(plan["groups"]) * plan["group_size"]
    skipped = sum(len(plan["shards"][n]) for n in stage.shards()) * plan["group_size"] - work.done
    if not busy:
        skipped = total - work.done
    return RolloutReport(work.done, max(0, skipped), time.monotonic() - began, len(busy))


def regenerate(run: Run, stage: Stage, key: str, policy: Policy) -> Sample:
    """Make a stored sample again from its seeds alone: prompt encoded, noise drawn, chunk sampled, video encoded.

    On the machine that made it the tensors and the video come out the same, bit for bit; the record differs only in
    `seconds` and `host`. Raises UserError for a key the plan does not have and for a policy other than the sample's.
    """
    plan, match = stage.plan(), SAMPLE_KEY.fullmatch(key)
    group, _, number = key.rpartition("-s")
    if plan is None or match is None or group not in {item["key"] for item in plan["groups"]}:
        raise UserError(f"{key!r} is not a sample of {stage.path}", "`rushes inspect` lists the keys")
    if int(number) >= plan["group_size"]:
        raise UserError(f"{key!r} is not a sample of {stage.path}", f"its groups have {plan['group_size']} samples")
    identity = take_policy(run, stage, policy)
    if identity["fingerprint"] != plan["policy"]["fingerprint"]:
        raise UserError(f"{key} was sampled by another policy", "restore the model or the adapters of that iteration")
    sampler = Sampler(policy, plan, stage.plan_sha256())
    chunk = next(chunk for chunk in sampler.chunks([group]) if int(number) in chunk.samples)
    shared = sampler.group_tensors([group])[group]
    state = sampler.start(chunk)
    for expert, steps in sampler.phases:
        policy.use(expert)
        sampler.advance(chunk, state, shared, steps)
    return sampler.finish(chunk, state)[int(number) - chunk.first]


def _order(shards: int, worker: tuple[int, int]) -> list[int]:
    """Shards in the order in which a worker tries them: its own share, then that of the next worker, and so on."""
    index, count = worker
    if not 0 <= index < count:
        raise UserError(f"worker {index}/{count} does not exist", "workers are counted from 0: 0/4, 1/4, 2/4, 3/4")
    return sorted(range(shards), key=lambda shard: ((shard - index) % count, shard))


class _Work:
    """One worker's way through the shards of a stage."""

    def __init__(self, stage: Stage, sampler: Sampler, progress: Progress | None) -> None:
        self.stage, self.sampler, self.progress = stage, sampler, progress
        self.done = 0
        self.total = sum(len(stage.keys(n)) for n in range(stage.expected()) if not stage.is_committed(n))
        self.ready = 0

    def go(self, shards: Sequence[int]) -> list[int]:
        """Sample the shards that are missing and free; returns those that other workers hold."""
        busy = []
        for shard in shards:
            if self.stage.is_committed(shard):
                continue
            with claim(self.stage, shard, "rollout") as held:
                if not held:
                    busy.append(shard)
                elif not self.stage.is_committed(shard):
                    self._shard(shard)
        return [shard for shard in busy if not self.stage.is_committed(shard)]

    def _shard(self, shard: int) -> None:
        """All chunks of a shard through the high-noise steps, then all through the rest: one swap of experts."""
        began = time.monotonic()
        finished = spooled(self.stage, shard)
        groups = self.stage.groups(shard)
        self._report(len(finished), f"shard {shard}")
        shared = self._shared(shard, groups)
        chunks = [chunk for chunk in self.sampler.chunks(groups) if not finished.issuperset(chunk.keys)]
        states = self._restore(shard, chunks)
        phases = self.sampler.phases
        for number, (expert, steps) in enumerate(phases):
            waiting = [chunk for chunk in chunks if number > 0 or chunk not in states]
            if waiting:
                self.sampler.policy.use(expert)
            for chunk in waiting:
                state = states.pop(chunk, None) or self.sampler.start(chunk)
                self.sampler.advance(chunk, state, shared[chunk.group], steps)
                if number + 1 < len(phases):
                    states[chunk] = state
                    self._park(shard, chunk, state)
                else:
                    self._commit(shard, chunk, state)
        if chunks:
            self.sampler.policy.use(None)
        seal(self.stage, shard, _circumstances(self.sampler.policy, time.monotonic() - began))

    def _shared(self, shard: int, groups: list[str]) -> dict[str, Tensors]:
        """The tensors of the groups as the spool has them; what is missing is encoded and put there first.

        They are always read back: whoever goes on with this shard, here or elsewhere, uses the same bits.
        """
        missing = [group for group in groups if read_group(self.stage, shard, group) is None]
        if missing:
            for group, tensors in self.sampler.group_tensors(missing).items():
                write_group(self.stage, shard, group, tensors)
        found = {group: read_group(self.stage, shard, group) for group in groups}
        return {group: tensors for group, tensors in found.items() if tensors is not None}

    def _restore(self, shard: int, chunks: Sequence[Chunk]) -> dict[Chunk, State]:
        """Chunks that have their high-noise steps behind them, from the spool."""
        states = {}
        for chunk in chunks if len(self.sampler.phases) > 1 else ():
            rows = [read_phase(self.stage, shard, key) for key in chunk.keys]
            if all(row is not None for row in rows):
                states[chunk] = State.from_rows([row for row in rows if row is not None])
        return states

    def _park(self, shard: int, chunk: Chunk, state: State) -> None:
        """Spool a chunk between its phases."""
        for index, key in enumerate(chunk.keys):
            write_phase(self.stage, shard, key, state.row(index))
        self._report(0, f"shard {shard}, {chunk.keys[0]}: high-noise steps done")

    def _commit(self, shard: int, chunk: Chunk, state: State) -> None:
        """Decode a chunk and spool its samples; those that were there stay as they are."""
        new = sum(write_sample(self.stage, shard, sample) for sample in self.sampler.finish(chunk, state))
        self.done += new
        self._report(new, f"shard {shard}, {chunk.keys[-1]}")

    def _report(self, new: int, note: str) -> None:
        self.ready += new
        if self.progress:
            self.progress(self.ready, self.total, "videos", note)


def _circumstances(policy: Policy, seconds: float) -> dict[str, Any]:
    """What the manifest keeps about the making of a shard."""
    packages = ("rushes", "torch", "diffusers", "transformers", "peft", "safetensors")
    return {
        "host": socket.gethostname(),
        "device": str(policy.device),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "seconds": round(seconds, 3),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return ""
