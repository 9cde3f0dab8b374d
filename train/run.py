"""Training one iteration: prove the rollouts, update each expert in turn, publish the next policy."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rollout.lineage import policy_record, starting_policy
from rollout.policy import Policy
from rollout.ranks.meet import meet
from rollout.ranks.world import World
from shards.errors import UserError
from shards.process.progress import counted
from shards.process.signals import stopped
from shards.run import EXPERT_NAMES, Stage, trainer_dir
from shards.store.urls import in_shell
from shards.workers.leftovers import sweep_run
from train import checkpoint
from train.checkpoint import Checkpoints
from train.data import Inputs, Rollouts
from train.inputs import check_policy
from train.metrics import MetricsLog
from train.notes import notes
from train.objectives.settings import check_settings
from train.order import RankPlan, plan_ranks
from train.publish import publish
from train.ranks import agree_on_inputs, agreed, claimed, lost_ranks
from train.replay import prove, replay_limit
from train.trainer import ExpertTrainer

if TYPE_CHECKING:
    from shards.config import RunConfig, TrainConfig
    from shards.process.progress import Progress
    from shards.run import Run
    from shards.workers.claims import Claim


@dataclass(frozen=True)
class Trained:
    """What became of one expert."""

    averages: dict[str, Tensor]
    """Averaged weights by name, on the host of rank 0; empty without `train.ema`."""
    unmoved: list[str]
    """Layers that no gradient reached."""


@dataclass(frozen=True)
class Work:
    """What the training of every expert of an iteration needs."""

    policy: Policy
    inputs: Inputs
    config: RunConfig
    world: World
    start: Path | None
    """Folder of the policy the iteration starts from."""
    log: MetricsLog | None
    """None on all ranks but the first."""
    checkpoints: Checkpoints
    progress: Progress | None
    held: Claim | None
    """The claim on the training, on the rank that holds it."""

    def require_claim(self) -> None:
        """Raise RunFailed on all ranks when another process trains in our place, as after a sleep of this machine: what
        that one writes, or has published, must not be touched."""
        with self.world.together():
            if self.held:
                self.held.require()


@dataclass(frozen=True)
class TrainReport:
    """What `train` did."""

    skipped: bool
    """True when the policy was there already and nothing was done."""
    fingerprint: str
    """Of the policy that is there now."""
    updates: dict[str, int] = field(default_factory=dict)
    """Optimizer steps of each expert in this iteration."""
    advantages: str = ""
    """Name of the advantages it was trained on: a folder in iter-*/advantage."""
    replay: float | None = None
    """Largest |log-ratio| of the replay gate; None when it did not run."""
    warnings: list[str] = field(default_factory=list)
    """What is worth a look, in plain words."""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.skipped:
            return f"nothing to do: policy {self.fingerprint[:12]} is there"
        proof = "" if self.replay is None else f", largest |log-ratio| of the replay {self.replay:.3g}"
        steps = ", ".join(f"{counted(count, 'update')} of {name}" for name, count in self.updates.items())
        words = "".join(f"\n  note: {sentence}" for sentence in self.warnings)
        done = f"{steps} on advantages {self.advantages}{proof}"
        return f"{done}; policy {self.fingerprint[:12]}; {self.seconds:.1f} s{words}"


def train(
    run: Run, iteration: int, policy: Policy | None = None, progress: Progress | None = None, advantage: str = ""
) -> TrainReport:
    """Train the policy of one iteration on its shards and advantages and publish it; a second call does nothing.

    `policy` is a loaded model to use instead of loading one; its weights are set from the files. `advantage` names the
    specification to train on, when there are several. Killed at any moment and called again, it goes on from its last
    checkpoint and ends with the weights of an undisturbed run (on a CPU, bit for bit). Under torchrun all ranks call
    this; the policy is sharded over them and has to be given the weights it shall have next (`become`) before it is
    used otherwise.
    Raises UserError for incomplete, stale or changed inputs and for ranks that do not have the same, RunFailed when the
    replay gate fails, StillBusy when another process trains this iteration.
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
            device = policy.device if policy else Policy.device_of(run.config.model)
        world = meet(run, device)
        with claimed(world, stage, run.config.workers.claim_seconds) as held:
            # looked at again: who held the claim before may have published in the meantime
            report = _published(world, stage) or _train(
                run, stage, policy, world, progress if world.is_first else None, advantage, held
            )
            world.barrier()
            return report


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
    held: Claim | None,
) -> TrainReport:
    started = time.monotonic()
    config = run.config
    inputs = agree_on_inputs(world, run, stage, advantage)
    with world.together():
        start = starting_policy(run, stage.iteration)
    policy, lag = _ready(run, inputs.rollouts, policy, start, world)
    covered = {
        name: found[0] for name in EXPERT_NAMES if (found := checkpoint.latest(stage.trainer_dir(name), stage.files))
    }
    replayed = None
    if not covered and _must_prove(config.train, inputs.rollouts, lag):
        limit = replay_limit(policy, config.train.replay_limit, max(world.ulysses, config.rollout.ulysses))
        replayed = prove(
            policy, inputs.rollouts, samples=config.train.replay_samples, limit=limit, progress=progress, world=world
        )
    log = MetricsLog(stage.policy_dir, covered, stage.files) if world.is_first else None
    try:
        with Checkpoints(config.train.keep_checkpoints, config.train.async_checkpoints, stage.files) as checkpoints:
            work = Work(policy, inputs, config, world, start, log, checkpoints, progress, held)
            trained = {expert: _train_expert(work, expert) for expert in policy.layout.expert_ids}
    finally:
        if log:
            log.close()
    averages = {expert: one.averages for expert, one in trained.items()}
    work.require_claim()
    fingerprint = publish(policy, stage, averages, world, config.train.ema > 0)
    records = log.records if log else []
    updates = {name: sum(record["expert"] == name for record in records) for name in EXPERT_NAMES}
    unmoved = {expert: one.unmoved for expert, one in trained.items()}
    report = TrainReport(
        skipped=False,
        fingerprint=fingerprint,
        updates={EXPERT_NAMES[expert]: updates[EXPERT_NAMES[expert]] for expert in policy.layout.expert_ids},
        advantages=inputs.specification,
        replay=replayed.largest if replayed else None,
        warnings=notes(run, inputs, records, unmoved, lag) if world.is_first else [],
        seconds=time.monotonic() - started,
    )
    return world.broadcast(report)


def _ready(run: Run, rollouts: Rollouts, policy: Policy | None, start: Path | None, world: World) -> tuple[Policy, int]:
    """The policy of `start`, trainable and on all ranks, and its distance from the one that sampled, in policies."""
    settings = run.config.train
    with world.together():
        policy = policy or Policy.of(run.config.model)
        policy.check_model(run.model_path)
        policy.experts.become(start)
        fingerprint = policy.experts.fingerprint(start)["fingerprint"]
        lag = check_policy(rollouts, fingerprint, settings)
        _check_lag(settings, lag)
        _make_trainable(policy, run.config, start)
        policy.experts.check_ulysses(*rollouts.plan.video.size, world)
    world.agree("policy", fingerprint)
    policy.experts.distribute(world)
    return policy, lag


def _train_expert(work: Work, expert: int) -> Trained:
    """All updates of one expert, from where its last checkpoint left off."""
    inputs, settings, world = work.inputs, work.config.train, work.world
    stage = inputs.rollouts.stage
    trainer = ExpertTrainer(work.policy, inputs, settings, expert, world)
    done = _restore(trainer, stage.trainer_dir(trainer.name), work.start)
    plan = plan_ranks(
        inputs.units(),
        world.data_parallel,
        seed=inputs.rollouts.plan.seed,
        iteration=stage.iteration,
        expert=expert,
        updates=settings.updates_per_rollout,
        whole_groups=bool(inputs.pairs),
    )
    with closing(trainer):
        if settings.is_published and settings.recompute_log_probs and done < len(plan.batches):
            trainer.recompute_log_probs([unit for unit in inputs.units() if unit.expert == expert])
        _update_all(work, trainer, plan, done)
    return Trained(trainer.averages(), trainer.unmoved())


def _update_all(work: Work, trainer: ExpertTrainer, plan: RankPlan, done: int) -> None:
    """The updates of an expert after the first `done`, with their checkpoints and metrics."""
    stage, rank, total = work.inputs.rollouts.stage, work.world.data_rank, len(plan.batches)
    folder = stage.trainer_dir(trainer.name)
    for number in range(done, total):
        _end_if_asked(work.checkpoints, folder, trainer, number)
        following = plan.of_rank(number + 1, rank)[0].unit if number + 1 < total else None
        metrics = trainer.update(plan.batches[number], plan.of_rank(number, rank), following)
        work.require_claim()
        names = {"iteration": stage.iteration, "expert": trainer.name, "update": number + 1}
        if work.log:
            work.log.add(names | {"total_updates": trainer.state.updates} | metrics)
        if (number + 1) % work.config.train.save_every == 0 or number + 1 == total:
            work.checkpoints.save(folder, trainer.state, number + 1)
        if work.progress:
            work.progress(number + 1, total, "updates", f"{trainer.name}, loss {metrics['loss']:.4g}")
    if not total:
        work.checkpoints.save(folder, trainer.state, 0)


def _end_if_asked(checkpoints: Checkpoints, folder: Path, trainer: ExpertTrainer, done: int) -> None:
    """Stopped, on all ranks after the same update, when a signal asked for the end; first that update is kept."""
    found = agreed()
    if found:
        checkpoints.save(folder, trainer.state, done)
        checkpoints.wait()
        trainer.world.part()
        raise stopped(found, f"after update {done} of the {trainer.name} expert")


def _restore(trainer: ExpertTrainer, folder: Path, start: Path | None) -> int:
    """Take the state of the last checkpoint, or, at the first update of an iteration, the optimizer of the one before.

    Returns the number of updates of this iteration that are done.
    """
    files = trainer.inputs.rollouts.stage.files
    found = checkpoint.latest(folder, files)
    if found is not None:
        checkpoint.load(found[1], trainer.state)
        trainer.masters.publish()
        trainer.moved = found[0] > 0
        return found[0]
    before = checkpoint.latest(trainer_dir(start, trainer.name), files) if start else None
    if before is not None:
        masters = checkpoint.load(before[1], trainer.state, weights=False)
        with trainer.world.together():
            trainer.masters.take(masters, before[1])
    return 0


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
        source = f"{start} holds a LoRA" if start else f"model.lora = {config.model.lora}"
        hint = "begin a new run" if start else "name it in model.base_lora instead, which merges it into the model"
        raise UserError(f"train.full trains all weights, but {source}", hint)
    if not settings.full and policy.experts.is_full:
        source = str(start or config.model.lora)
        raise UserError(f"train.full is off, but {source} holds all weights", "set train.full = true, as it was before")
    if settings.full:
        policy.experts.train_all()
    elif not policy.experts.has_lora:
        policy.experts.add_lora(settings.lora_rank, settings.lora_alpha, config.rollout.seed)


def _check_lag(settings: TrainConfig, lag: int) -> None:
    """Older shards bring their log-probs, but not the means that RatioNorm compares with."""
    if lag > 0 and settings.ratio_norm and not settings.recompute_log_probs and settings.objective == "grpo":
        raise UserError(
            f"train.ratio_norm needs the means of the policy that sampled the shards, but that is {lag} policies old",
            "set train.recompute_log_probs = true, or train.ratio_norm = false",
        )
