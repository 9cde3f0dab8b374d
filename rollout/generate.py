"""The rollout stage: samples the shards that are missing, one expert at a time; a kill loses at most a chunk."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rollout.planning import check_stage, stage_plan, take_policy
from rollout.policy import Policy
from rollout.policy_inputs import find_device
from rollout.policy_ulysses import shared_tokens
from rollout.sampler import Chunk, Sampler, State, Tensors
from rollout.together import Group, Leader, follow
from shards import claims
from shards.errors import UserError
from shards.files import read_json
from shards.progress import Progress
from shards.run import SAMPLE_KEY, Run, Stage
from shards.signals import check
from shards.usage import peak_memory_bytes
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

LOOK_EVERY = 2.0  # seconds between two counts of what other workers have finished


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
    waited: float = 0.0
    """Seconds of those spent waiting for others."""

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
    wait: bool = False,
) -> RolloutReport:
    """Sample every shard of a stage that is missing. A stage that is complete is left alone, and no model is loaded.

    `policy` is a loaded model, which is given the weights of the stage; None loads it as run.toml says. Worker (i, n)
    begins with the shards i, i+n, … and goes on with what others have not claimed. It ends when living workers hold
    what is left, or, with `wait`, when nothing is left; it takes over the shards of the dead in either case. Samples
    are committed one by one to the spool of their shard, so that a killed stage goes on where it was. Raises UserError
    for a plan that differs from the one on disk, for a policy that was not trained yet, for prompts or sizes the model
    cannot take, and for shards or claims of another version of rushes. With `rollout.ulysses` the ranks of torchrun
    sample each video in groups of that many.
    """
    began = time.monotonic()
    plan = stage.plan()
    complete = plan is not None and len(stage.shards()) == len(plan["shards"])
    group = Group.of(run.config, find_device(run.config.model.device))
    if group.world.broadcast(complete) if group else complete:  # ranks that work together must not part here
        plan = stage.plan() or {}
        return RolloutReport(0, len(plan["groups"]) * plan["group_size"], time.monotonic() - began)
    _check_version(stage)
    check_stage(run, stage, policy)
    policy = policy or Policy.of(run.config.model)
    identity = take_policy(run, stage, policy)
    plan = stage.publish_plan(stage_plan(run, stage, policy.layout, identity))
    total = len(plan["groups"]) * plan["group_size"]
    with _sampler(group, policy, plan, stage) as sampler:
        if group and not group.leads:
            follow(group, sampler)
            return RolloutReport(0, total, time.monotonic() - began)
        if group:
            worker = worker[0] // group.world.ulysses, worker[1] // group.world.ulysses
        work = _Work(stage, sampler, progress, worker, run.config.workers.claim_seconds)
        busy, waited = work.run(wait)
    skipped = sum(len(plan["shards"][n]) for n in stage.shards()) * plan["group_size"] - work.done
    if not busy:
        skipped = total - work.done
    return RolloutReport(work.done, max(0, skipped), time.monotonic() - began, len(busy), waited)


@contextmanager
def _sampler(group: Group | None, policy: Policy, plan: dict[str, Any], stage: Stage) -> Iterator[Sampler]:
    """The sampler of a stage; within a group of ranks, that of its leader has the others compute along."""
    identity = policy, plan, stage.plan_sha256()
    with ExitStack() as open_now:
        open_now.callback(policy.use, None)
        if group:
            video = plan["video"]
            size = video["height"], video["width"], video["frames"]
            open_now.enter_context(shared_tokens(policy, size, group.world))
        sampler = Leader(group, *identity) if group and group.leads else Sampler(*identity)
        open_now.callback(sampler.end)
        yield sampler


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


def _check_version(stage: Stage) -> None:
    """Shards of one stage are made by one version: another one may draw other noise or round otherwise."""
    for shard in stage.shards()[:1]:
        found = read_json(stage.manifest_path(shard)).get("info", {}).get("versions", {}).get("rushes", "")
        if found and claims.our_version() not in (found, ""):
            raise UserError(
                f"{stage.path} was begun by rushes {found}, this is {claims.our_version()}",
                "finish this stage with that version; the next one can have another",
            )


class _Work:
    """One worker's way through the shards of a stage."""

    def __init__(
        self, stage: Stage, sampler: Sampler, progress: Progress | None, worker: tuple[int, int], seconds: float
    ) -> None:
        self.stage, self.sampler, self.progress, self.worker, self.seconds = stage, sampler, progress, worker, seconds
        self.done = 0
        self.missing = {n: len(stage.keys(n)) for n in range(stage.expected()) if not stage.is_committed(n)}
        self.mine: set[int] = set()
        self.ready = 0
        self.elsewhere, self.looked, self.shown = 0, -LOOK_EVERY, 0

    def run(self, wait: bool) -> tuple[list[int], float]:
        """Sample what is missing. Returns the shards that living workers hold, and the seconds spent waiting for them.

        With `wait` it stays until there are none.
        """
        busy = self.go(claims.order(range(self.stage.expected()), self.worker))
        pause = claims.Pause(self.seconds / claims.BEATS)
        while busy and (wait or not all(self.lives(shard) for shard in busy)):
            self.tell(f"waiting for {len(busy)} shards of others")
            check(f"in {self.stage.name} rollout, which waited for others")
            self.sampler.stay()
            pause()
            busy = self.go(busy)
        if not busy and self.worker[1] > 1 and self.shown < sum(self.missing.values()):  # others finished the rest
            self.looked = -LOOK_EVERY
            self.tell("")
        claims.sweep_claims(self.stage, "rollout", self.seconds)
        return busy, pause.waited

    def go(self, shards: Sequence[int]) -> list[int]:
        """Sample the shards that are missing and free; returns those that other workers hold."""
        busy = []
        for shard in shards:
            if self.stage.is_committed(shard):
                continue
            with claims.claim(self.stage, shard, "rollout", self.seconds, self.worker) as held:
                if not held or not (self.stage.is_committed(shard) or self._shard(shard, held)):
                    busy.append(shard)
        return [shard for shard in busy if not self.stage.is_committed(shard)]

    def lives(self, shard: int) -> bool:
        """Whether the worker that holds a shard was seen to live."""
        found = claims.holder(self.stage, shard, "rollout")
        return found is not None and claims.life(found, self.seconds) == "alive"

    def _shard(self, shard: int, held: claims.Claim) -> bool:
        """All chunks of a shard through the high-noise steps, then all through the rest: one swap of experts.

        False when another worker took the shard from us in the meantime; what it finished is not made again.
        """
        began = time.monotonic()
        self.mine.add(shard)
        finished = spooled(self.stage, shard)
        groups = self.stage.groups(shard)
        self._report(len(finished), f"shard {shard}")
        shared = self._shared(shard, groups)
        if len(shared) < len(groups):  # without our claim: another worker has just committed the shard
            return self.stage.is_committed(shard)
        chunks = [chunk for chunk in self.sampler.chunks(groups) if not finished.issuperset(chunk.keys)]
        states = self._restore(shard, chunks)
        phases = self.sampler.phases
        for number, (expert, steps) in enumerate(phases):
            waiting = [chunk for chunk in chunks if number > 0 or chunk not in states]
            if waiting:
                self.sampler.policy.use(expert)
            for chunk in waiting:
                check(f"in shard {shard} of {self.stage.name}")
                if held.lost:
                    return False
                if self.stage.is_committed(shard) or spooled(self.stage, shard).issuperset(chunk.keys):
                    continue
                state = states.pop(chunk, None) or self.sampler.start(chunk)
                self.sampler.advance(chunk, state, shared[chunk.group], steps)
                if number + 1 < len(phases):
                    states[chunk] = state
                    self._park(shard, chunk, state)
                else:
                    self._commit(shard, chunk, state)
        if chunks:
            self.sampler.policy.use(None)
        seal(self.stage, shard, _circumstances(self.sampler.policy, time.monotonic() - began, self.worker))
        return True

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
        self.tell(note)

    def tell(self, note: str) -> None:
        """Report the progress of the whole stage: where there are several workers, what others finished counts too."""
        if self.progress:
            total = sum(self.missing.values())
            self.shown = min(self.ready + self._others(), total)
            self.progress(self.shown, total, "videos", note)

    def _others(self) -> int:
        """Videos that other workers have finished since we began, from the files they left."""
        if self.worker[1] > 1 and time.monotonic() - self.looked >= LOOK_EVERY:
            theirs = {shard: count for shard, count in self.missing.items() if shard not in self.mine}
            committed = set(self.stage.shards())
            self.elsewhere = sum(
                count if shard in committed else len(spooled(self.stage, shard)) for shard, count in theirs.items()
            )
            self.looked = time.monotonic()
        return self.elsewhere


def _circumstances(policy: Policy, seconds: float, worker: tuple[int, int]) -> dict[str, Any]:
    """What the manifest keeps about the making of a shard."""
    packages = ("rushes", "torch", "diffusers", "transformers", "peft", "safetensors")
    return {
        "host": socket.gethostname(),
        "device": str(policy.device),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "worker": f"{worker[0]}/{worker[1]}",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout
        return ""
