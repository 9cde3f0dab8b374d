"""The rollout stage: samples the shards that are missing, one expert at a time, and can be killed at any moment."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.lineage import take_policy
from rollout.plan import check_stage, stage_plan
from rollout.policy import Policy
from rollout.policy.ulysses import shared_tokens
from rollout.ranks.device import find_device, share_cores
from rollout.sampler import Sampler
from rollout.ulysses_group import Leader, UlyssesGroup, follow
from rollout.worker import Work
from shards.errors import UserError
from shards.plan import SAMPLE_KEY, RolloutPlan
from shards.process.machine import shared_gpu
from shards.process.progress import Progress
from shards.process.versions import our_version
from shards.reader import open_shard, read_manifest
from shards.run import Run, Stage
from shards.spool import Sample
from shards.workers.leftovers import sweep_run
from shards.workers.worker import Part, Worker

TIME_AND_PLACE = ("seconds", "host")  # of a record: they differ whenever a sample is made again


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
    broken: int = 0
    """Videos sampled that are not finite, and so earn no reward."""

    def __str__(self) -> str:
        if not self.done:
            return f"nothing to do: {self.skipped} videos are there"
        rate = self.done / max(self.seconds, 1e-9)
        there = f", {self.skipped} were there" if self.skipped else ""
        told = f"{self.done} videos sampled{there}; {self.seconds:.1f} s, {rate:.2f} videos/s"
        if not self.broken:
            return told
        return f"{told}; {self.broken} of them are not finite and earn no reward: take a wider dtype, or less guidance"


def rollout(
    run: Run,
    stage: Stage,
    policy: Policy | None = None,
    progress: Progress | None = None,
    worker: Part = (0, 1),
    wait: bool = False,
    tell: Callable[[str], None] | None = None,
) -> RolloutReport:
    """Sample every shard of a stage that is missing. A stage that is complete is left alone, and no model is loaded.

    `policy` is a loaded model, which is given the weights of the stage; None loads it as run.toml says. Worker (i, n)
    begins with the shards i, i+n, … and continues with what others have not claimed. It ends when living workers hold
    what is left, or, with `wait`, when nothing is left; it takes over the shards of the dead in either case. Samples
    are committed chunk by chunk to the spool of their shard, so that a killed stage continues where it was. `tell` gets
    what `check_stage` says, before anything is sampled. Raises UserError
    for a plan that differs from the one on disk, for a policy that was not trained yet, for prompts or sizes the model
    cannot take, and for shards or claims of another version of rushes. With `rollout.ulysses` the ranks of torchrun
    sample each video in groups of that many.
    """
    began = time.monotonic()
    sweep_run(run)
    complete = stage.is_complete()
    device = policy.device if policy else find_device(run.config.model.device)
    group = UlyssesGroup.of(run.config, device)
    if group.world.broadcast(complete) if group else complete:  # ranks that work together must not part here
        there = stage.plan()
        assert there is not None
        return RolloutReport(0, there.samples, time.monotonic() - began)
    _check_version(stage)
    sentences = check_stage(run, stage, policy)
    if device.type == "cuda" and (shared := shared_gpu(torch.cuda.device_count())):
        sentences.append(shared)
    for sentence in sentences:
        if tell:
            tell(sentence)
    share_cores(run.config)
    policy = policy or Policy.of(run.config.model)
    policy.vae.load()
    identity = take_policy(run, stage, policy)
    plan = stage.publish_plan(stage_plan(run, stage, policy.layout, identity))
    policy.experts.compute_as(plan.arithmetic)
    with _sampler(group, policy, plan, stage) as sampler:
        if group and not group.leads:
            follow(group, sampler)
            return RolloutReport(0, plan.samples, time.monotonic() - began)
        if group:
            worker = worker[0] // group.world.ulysses, worker[1] // group.world.ulysses
        ours = Worker(stage, "rollout", worker, run.config.workers.claim_seconds)
        work = Work(stage, sampler, ours, progress)
        busy = work.run(wait)
    finished = plan.samples if not busy else sum(plan.shard_sizes[shard] for shard in stage.shards())
    return RolloutReport(
        work.made, max(0, finished - work.made), time.monotonic() - began, len(busy), ours.waited, work.broken
    )


@contextmanager
def _sampler(group: UlyssesGroup | None, policy: Policy, plan: RolloutPlan, stage: Stage) -> Iterator[Sampler]:
    """The sampler of a stage; within a group of ranks, that of its leader has the others compute along."""
    identity = policy, plan, stage.plan_sha256()
    with ExitStack() as open_now:
        open_now.callback(policy.experts.use, None)
        if group:
            open_now.enter_context(shared_tokens(policy, plan.video.size, group.world))
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
    if plan is None or match is None or group not in plan.by_key:
        raise UserError(f"{key!r} is not a sample of {stage.path}", "`rushes inspect` lists the keys")
    if int(number) >= plan.group_size:
        raise UserError(f"{key!r} is not a sample of {stage.path}", f"its groups have {plan.group_size} samples")
    identity = take_policy(run, stage, policy)
    if identity["fingerprint"] != plan.policy.fingerprint:
        raise UserError(f"{key} was sampled by another policy", "restore the model or the adapters of that iteration")
    policy.experts.compute_as(plan.arithmetic)
    sampler = Sampler(policy, plan, stage.plan_sha256())
    shard = next(groups for groups in plan.shards if group in groups)
    chunk = next(chunk for chunk in plan.chunks(shard) if key in chunk.keys)
    shared = sampler.group_tensors([group for group, _ in chunk.parts])
    state = sampler.start(chunk)
    for expert, steps in sampler.phases:
        policy.experts.use(expert)
        sampler.advance(chunk, state, shared, steps)
    return sampler.finish(chunk, state)[chunk.keys.index(key)]


@dataclass(frozen=True)
class Regenerated:
    """A stored sample beside the same made again."""

    key: str
    differences: dict[str, float]
    """Largest absolute difference of each part that is not the same, by name; infinite where it is not a number."""

    @property
    def largest(self) -> float:
        """The largest of all differences; 0 when every part is the same, bit for bit."""
        return max(self.differences.values(), default=0.0)

    def __str__(self) -> str:
        """As a line for people."""
        if not self.differences:
            return f"{self.key}: the same, bit for bit"
        found = sorted(self.differences.items())
        named = ", ".join(f"{name} by {value:.3g}" if math.isfinite(value) else name for name, value in found)
        return f"{self.key}: differs in {named}"


def compare_with_stored(stage: Stage, shard: int, sample: Sample, exact: bool = True) -> Regenerated:
    """Hold a sample that was made again against the stored one: its record but for time and place, tensors, video.

    Without `exact` the bytes of the video are left out: one pixel that rounds otherwise changes the file. Raises
    Damaged for a shard that cannot be read.
    """
    with open_shard(stage, shard) as opened:
        stored = opened.meta(sample.key), opened.trajectory(sample.key), opened.video(sample.key)
    record = json.loads(json.dumps(sample.meta))
    parts = {name: (stored[0].get(name), record.get(name)) for name in stored[0].keys() | record.keys()}
    pairs: dict[str, tuple[object, object]] = {name: pair for name, pair in parts.items() if name not in TIME_AND_PLACE}
    pairs |= {
        name: (stored[1].get(name), sample.tensors.get(name)) for name in stored[1].keys() | sample.tensors.keys()
    }
    if exact:
        pairs["video"] = stored[2], sample.video
    found = {name: _difference(*pair) for name, pair in pairs.items()}
    return Regenerated(sample.key, {name: value for name, value in found.items() if value > 0})


def _difference(stored: object, again: object) -> float:
    """Largest absolute difference of two numbers, lists of them or tensors; 0 when equal, inf when they are neither."""
    if not isinstance(stored, Tensor) and stored == again:
        return 0.0
    try:
        one, other = torch.as_tensor(stored).double(), torch.as_tensor(again).double()
    except (TypeError, ValueError, RuntimeError):  # text, bytes, something that is missing
        return math.inf
    if one.shape != other.shape:
        return math.inf
    difference = (one - other).abs().nan_to_num(math.inf)
    difference[one.isnan() & other.isnan()] = 0.0
    return float(difference.max()) if difference.numel() else 0.0


def _check_version(stage: Stage) -> None:
    """Shards of one stage are made by one version: another one may draw other noise or round otherwise."""
    for shard in stage.shards()[:1]:
        found = read_manifest(stage, shard).version
        if found and our_version() not in (found, ""):
            raise UserError(
                f"{stage.path} was begun by rushes {found}, this is {our_version()}",
                "finish this stage with that version; the next one can have another",
            )
