"""Training one iteration: prove the rollouts, update each expert in turn, publish the next policy."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.lineage import policy_record, starting_policy
from rollout.policy import Policy
from rollout.policy.folder import find_folder, read_layout
from rollout.ranks.agreement import agree_on_run
from rollout.ranks.device import share_cores
from rollout.ranks.world import World
from shards.absolute_paths import NONE
from shards.diagnosis import note_replay
from shards.errors import UserError
from shards.process.machine import take_place
from shards.process.progress import counted
from shards.run import EXPERT_NAMES, Stage
from shards.store.urls import in_shell
from shards.workers.leftovers import sweep_run
from train import checkpoint
from train.checkpoint import Checkpoints
from train.data import Rollouts
from train.diagnosis import diagnose
from train.experts.updates import Work, all_updates
from train.inputs import check_policy
from train.metrics import MetricsLog, Record, joined_logs
from train.objectives.settings import check_settings
from train.publish import Trained, forget_records, publish, read_trained, write_record
from train.ranks import agree_on_inputs, claimed, lost_ranks
from train.replay import prove, replay_limit

if TYPE_CHECKING:
    from shards.config import RunConfig, TrainConfig
    from shards.process.progress import Progress
    from shards.run import Run
    from shards.workers.claims import Claim


@dataclass(frozen=True)
class TrainReport:
    """What `train` did."""

    skipped: bool
    """True when the policy was there already and nothing was done."""
    fingerprint: str
    """Of the policy that is there now; empty while the other expert is not trained."""
    updates: dict[str, int] = field(default_factory=dict)
    """Optimizer steps of each expert in this iteration."""
    advantages: str = ""
    """Name of the advantages it was trained on: a folder in iter-*/advantage."""
    replay: float | None = None
    """Largest |log-ratio| of the replay gate; None when it did not run."""
    warnings: list[str] = field(default_factory=list)
    """What is worth a look, in plain words."""
    seconds: float = 0.0
    missing: list[str] = field(default_factory=list)
    """Experts that are not trained yet, when this process trained the other one alone."""

    def __str__(self) -> str:
        if self.skipped:
            return f"nothing to do: policy {self.fingerprint[:12]} is there"
        proof = "" if self.replay is None else f", largest |log-ratio| of the replay {self.replay:.3g}"
        steps = ", ".join(f"{counted(count, 'update')} of {name}" for name, count in self.updates.items())
        words = "".join(f"\n  note: {sentence}" for sentence in self.warnings)
        done = f"{steps} on advantages {self.advantages}{proof}"
        if self.missing:
            return f"{done}; {self.seconds:.1f} s; the policy is published when {self.missing[0]} is trained too"
        return f"{done}; policy {self.fingerprint[:12]}; {self.seconds:.1f} s{words}"


def train(
    run: Run,
    iteration: int,
    policy: Policy | None = None,
    progress: Progress | None = None,
    advantage: str = "",
    expert: str = "",
) -> TrainReport:
    """Train the policy of one iteration on its shards and advantages and publish it; a second call does nothing.

    `policy` is a loaded model to use instead of loading one; its weights are set from the files. `advantage` names the
    specification to train on, when there are several. `expert` is the only one to train, high_noise or low_noise, while
    another process may train the other one; the last to finish publishes. Killed at any moment and called again, it
    continues from its last checkpoint and ends with the weights of an undisturbed run (on a CPU, bit for bit), however
    the experts were trained. Under torchrun all ranks call this; the policy is sharded over them and has to be given
    the weights it gets next (`become`) before it is used otherwise.
    Raises UserError for incomplete, stale or changed inputs and for ranks that do not have the same, RunFailed when the
    replay gate fails, StillBusy when another process trains the same.
    """
    ranks = World.joined()
    stage = run.iteration(iteration)
    with lost_ranks():
        if ranks.is_first:
            sweep_run(run)
        done = _published(ranks, stage)
        if done:
            return done
        with ranks.together():
            check_settings(run.config)
            if stage.plan() is None:  # told before the claim, which would make the folder of the iteration
                problem = f"{stage.path} has no rollouts"
                raise UserError(problem, f"run `rushes rollout {in_shell(run.path)} --iteration {iteration}` first")
            experts = choose_experts(run, policy, expert)
            if policy is None:  # the experts of one machine may be trained by two processes, on a GPU each
                take_place((experts[0], len(EXPERT_NAMES)) if expert else (0, 1))
            device = policy.device if policy else Policy.device_of(run.config.model)
        world = agree_on_run(run, device)
        with claimed(world, stage, run.config.workers.claim_seconds, experts) as held:
            # looked at again: who held the claim before may have published in the meantime
            report = _published(world, stage) or _train(
                run, stage, policy, world, progress if world.is_first else None, advantage, held, experts
            )
            world.barrier()
            return report


def choose_experts(run: Run, policy: Policy | None, expert: str) -> list[int]:
    """The numbers of the experts to train: the one of that name, or all that the model has.

    UserError for a name that none of them has.
    """
    numbers = policy.layout.expert_ids if policy else read_layout(find_folder(run.config.model.path)).expert_ids
    names = [EXPERT_NAMES[number] for number in numbers]
    if expert and expert not in names:
        problem = f"--expert {expert}: {run.config.model.path} has no such expert"
        raise UserError(problem, f"it has {' and '.join(names)}")
    return [number for number, name in zip(numbers, names, strict=True) if expert in ("", name)]


def _published(ranks: World, stage: Stage) -> TrainReport | None:
    """What there is to say of an iteration whose policy is there; the same answer on all ranks."""
    record = ranks.broadcast(policy_record(stage) if ranks.is_first else None)
    return None if record is None else TrainReport(skipped=True, fingerprint=record.fingerprint)


def _train(
    run: Run,
    stage: Stage,
    policy: Policy | None,
    world: World,
    progress: Progress | None,
    advantage: str,
    held: list[Claim],
    experts: list[int],
) -> TrainReport:
    started = time.monotonic()
    config = run.config
    inputs = agree_on_inputs(world, run, stage, advantage)
    with world.together():
        start = starting_policy(run, stage.iteration)
    policy, lag = _ready(run, inputs.rollouts, policy, start, world)
    alone = len(experts) < len(policy.layout.expert_ids)
    there = _trained_before(stage, policy, world)
    mine = [expert for expert in experts if expert not in there]
    names = [EXPERT_NAMES[expert] for expert in mine]
    covered = {name: found[0] for name in names if (found := checkpoint.latest(stage.trainer_dir(name), stage.files))}
    replayed = None
    if mine and not covered and _must_prove(config.train, inputs.rollouts, lag):
        replayed = _prove(config, policy, inputs.rollouts, progress, world, mine)
    kept = covered | {EXPERT_NAMES[expert]: config.train.updates_per_rollout for expert in there}
    log = MetricsLog(stage, kept, EXPERT_NAMES[experts[0]] if alone else "") if world.is_first else None
    try:
        with Checkpoints(config.train.keep_checkpoints, config.train.async_checkpoints, stage.files) as checkpoints:
            work = Work(policy, inputs, config, world, start, log, checkpoints, progress, held)
            trained = there | {expert: all_updates(work, expert, replayed) for expert in mine}
    finally:
        if log:
            log.close()
    work.require_claim()
    if alone:
        trained = _say_trained(work, trained, mine)
    return _end(run, work, trained, mine, lag, started)


def _prove(
    config: RunConfig,
    policy: Policy,
    rollouts: Rollouts,
    progress: Progress | None,
    world: World,
    experts: list[int],
) -> float:
    """The largest |log-ratio| that the gate finds of these experts."""
    limit = replay_limit(policy, config.train.replay_limit, max(world.ulysses, config.rollout.ulysses))
    samples = config.train.replay_samples
    found = prove(policy, rollouts, samples=samples, limit=limit, progress=progress, world=world, experts=experts)
    return found.largest


def _trained_before(stage: Stage, policy: Policy, world: World) -> dict[int, Trained]:
    """The experts that other processes trained, or this one earlier; the same on all ranks."""
    found: dict[int, Trained] = {}
    with world.together():
        if world.is_first:
            records = {expert: read_trained(stage, expert) for expert in policy.layout.expert_ids}
            found = {expert: record for expert, record in records.items() if record}
    return world.broadcast(found)


def _say_trained(work: Work, trained: dict[int, Trained], mine: list[int]) -> dict[int, Trained]:
    """Say that these experts are trained; returns all that are by now."""
    stage = work.inputs.rollouts.stage
    with work.world.together():
        for expert in mine if work.world.is_first else ():
            write_record(stage, expert, trained[expert])
    return trained | _trained_before(stage, work.policy, work.world)


def _end(run: Run, work: Work, trained: dict[int, Trained], mine: list[int], lag: int, started: float) -> TrainReport:
    """Publish the policy when all its experts are trained, and report; the same on all ranks."""
    policy, inputs, world = work.policy, work.inputs, work.world
    missing = [EXPERT_NAMES[expert] for expert in policy.layout.expert_ids if expert not in trained]
    # who trained the other one may just have published, and taken the records of single experts away
    done = _published(world, inputs.rollouts.stage) if missing else None
    if done:
        return done
    records, fingerprint = work.log.records if work.log else [], ""
    if not missing:
        fingerprint, records = _publish(work, trained, mine)
    counts = {EXPERT_NAMES[expert]: 0 for expert in sorted(trained)}
    for record in records:
        counts[record["expert"]] += 1
    unmoved = {expert: trained[expert].unmoved for expert in sorted(trained)}
    replay = max((one.replay for one in trained.values() if one.replay is not None), default=None)
    told = world.is_first and not missing
    report = TrainReport(
        skipped=False,
        fingerprint=fingerprint,
        updates=counts,
        advantages=inputs.specification,
        replay=replay,
        warnings=[*note_replay(replay), *diagnose(run, inputs, records, unmoved, lag)] if told else [],
        seconds=time.monotonic() - started,
        missing=missing,
    )
    return world.broadcast(report)


def _publish(work: Work, trained: dict[int, Trained], mine: list[int]) -> tuple[str, list[Record]]:
    """Commit the policy of trained experts: its fingerprint, on all ranks, and on rank 0 the records of all updates."""
    stage, records, fingerprint = work.inputs.rollouts.stage, [], ""
    with work.world.together():
        if work.world.is_first:
            others = [EXPERT_NAMES[expert] for expert in trained if expert not in mine]
            with joined_logs(stage, others) as records:
                fingerprint = publish(work.policy, stage, trained, mine, ema=work.config.train.ema > 0)
            forget_records(stage)
    return work.world.broadcast(fingerprint), records


def _ready(run: Run, rollouts: Rollouts, policy: Policy | None, start: Path | None, world: World) -> tuple[Policy, int]:
    """The policy of `start`, trainable and on all ranks, and its distance from the one that sampled, in policies."""
    settings = run.config.train
    with world.together():
        share_cores(run.config)
        policy = policy or Policy.of(run.config.model)
        policy.check_model(run.model_path)
        policy.experts.become(start)
        policy.experts.compute_as(rollouts.plan.arithmetic)
        fingerprint = policy.experts.fingerprint(start)["fingerprint"]
        lag = check_policy(rollouts, fingerprint, settings)
        _check_lag(settings, lag)
        _make_trainable(policy, run.config, start)
        policy.experts.check_ulysses(*rollouts.plan.video.size, world)
    world.agree("policy", fingerprint)
    policy.experts.distribute(world)
    return policy, lag


def _must_prove(settings: TrainConfig, rollouts: Rollouts, lag: int) -> bool:
    """The gate has nothing to say on recomputed log-probs, on shards known to be older, and without log-probs.

    It stands before DiffusionNFT too, whose old velocity must be that of the policy that sampled.
    """
    sampled = any(group.window for group in rollouts.plan.groups)
    return sampled and not settings.recompute_log_probs and lag == 0


def _make_trainable(policy: Policy, config: RunConfig, start: Path | None) -> None:
    """Adapters, fresh ones where the start has none, or all weights; the kind cannot change within a run."""
    settings = config.train
    if settings.full and policy.experts.has_lora:
        model = config.model
        named = f"model.lora_2 = {model.lora_2}" if model.lora in ("", NONE) else f"model.lora = {model.lora}"
        source = f"{start} holds a LoRA" if start else named
        hint = "begin a new run" if start else "name it in model.base_lora instead, which merges it into the model"
        raise UserError(f"train.full trains all weights, but {source}", hint)
    if not settings.full and policy.experts.is_full:
        source = str(start or config.model.lora)
        raise UserError(f"train.full is off, but {source} holds all weights", "set train.full = true, as it was before")
    if settings.full:
        policy.experts.train_all()
    else:
        policy.experts.add_lora(settings.lora_rank, settings.lora_alpha, config.rollout.seed)


def _check_lag(settings: TrainConfig, lag: int) -> None:
    """Older shards bring their log-probs, but not the means that RatioNorm compares with."""
    if lag > 0 and settings.ratio_norm and not settings.recompute_log_probs and settings.objective == "grpo":
        raise UserError(
            f"train.ratio_norm needs the means of the policy that sampled the shards, but that is {lag} policies old",
            "set train.recompute_log_probs = true, or train.ratio_norm = false",
        )
