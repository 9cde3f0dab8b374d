"""Training one iteration: prove the rollouts, update each expert in turn, publish the next policy."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rollout.policy import Policy
from rollout.schedule import EXPERT_NAMES
from shards.errors import StillBusy, UserError
from shards.files import publish_new, to_json
from shards.run import Stage, claim
from train import checkpoint
from train.data import Inputs, Rollouts
from train.freeze import check_policy, freeze, policy_record, starting_policy
from train.history import guard_history
from train.metrics import MetricsLog, guard, guard_groups, guard_unmoved
from train.order import minibatches
from train.replay import prove, replay_limit
from train.update import ExpertTrainer

if TYPE_CHECKING:
    from shards.config import RunConfig, TrainConfig
    from shards.progress import Progress
    from shards.run import Run

SCHEMA = 1


@dataclass(frozen=True)
class Trained:
    """What became of one expert."""

    averages: dict[str, Tensor]
    """Averaged weights by name, on the host; empty without `train.ema`."""
    unmoved: list[str]
    """Layers that no gradient reached."""


@dataclass(frozen=True)
class TrainReport:
    """What `train` did."""

    skipped: bool
    """True when the policy was there already and nothing was done."""
    fingerprint: str
    """Of the policy that is there now."""
    updates: dict[str, int] = field(default_factory=dict)
    """Optimizer steps of each expert in this iteration."""
    replay: float | None = None
    """Largest |log-ratio| of the replay gate; None when it did not run."""
    warnings: list[str] = field(default_factory=list)
    """What is worth a look, in plain words."""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.skipped:
            return f"nothing to do: policy {self.fingerprint[:12]} is there"
        proof = "" if self.replay is None else f", largest |log-ratio| of the replay {self.replay:.3g}"
        steps = ", ".join(f"{count} updates of {name}" for name, count in self.updates.items())
        words = "".join(f"\n  note: {sentence}" for sentence in self.warnings)
        return f"{steps}{proof}; policy {self.fingerprint[:12]}; {self.seconds:.1f} s{words}"


def train(
    run: Run, iteration: int, policy: Policy | None = None, progress: Progress | None = None, advantage: str = ""
) -> TrainReport:
    """Train the policy of one iteration on its shards and advantages and publish it; a second call does nothing.

    `policy` is a loaded model to use instead of loading one; its weights are set from the files. `advantage` names the
    specification to train on, when there are several. Killed at any moment
    and called again, it goes on from its last checkpoint and ends with the weights of an undisturbed run (on a CPU, bit
    for bit). Raises UserError for incomplete, stale or changed inputs, RunFailed when the replay gate fails, StillBusy
    when another process trains this iteration.
    """
    stage = run.iteration(iteration)
    record = policy_record(stage)
    if record is not None:
        return TrainReport(skipped=True, fingerprint=record["fingerprint"])
    _check_settings(run.config)
    with claim(stage, 0, "train") as ours:
        if not ours:
            raise StillBusy(f"{stage.path} is being trained by another process", "wait for it, or stop it")
        return _train(run, stage, policy, progress, advantage)


def prove_iteration(run: Run, iteration: int, policy: Policy | None = None, progress: Progress | None = None) -> float:
    """Replay every transition of an iteration with the policy that made it; returns the largest |log-ratio|.

    Raises UserError for a policy that is not the one of the shards, RunFailed where a log-prob comes out otherwise.
    """
    rollouts = Rollouts.open(run.iteration(iteration), partial=True)
    policy = policy or Policy.of(run.config.model)
    start = starting_policy(run, iteration)
    policy.become(start)
    check_policy(rollouts, policy, policy.fingerprint(start)["fingerprint"], run.config.train)
    limit = replay_limit(policy, run.config.train.replay_limit)
    return prove(
        policy, rollouts, samples=len(rollouts.keys()) * rollouts.schedule.steps, limit=limit, progress=progress
    ).largest


def _train(run: Run, stage: Stage, policy: Policy | None, progress: Progress | None, advantage: str) -> TrainReport:
    started = time.monotonic()
    config = run.config
    inputs = freeze(run, stage, advantage)
    policy = policy or Policy.of(config.model)
    start = starting_policy(run, stage.iteration)
    policy.become(start)
    lag = check_policy(inputs.rollouts, policy, policy.fingerprint(start)["fingerprint"], config.train)
    _check_lag(config.train, lag)
    _make_trainable(policy, config, start)
    covered = {name: found[0] for name in EXPERT_NAMES if (found := checkpoint.latest(_trainer_dir(stage, name)))}
    replayed = None
    if not covered and _must_prove(config.train, inputs.rollouts, lag):
        limit = replay_limit(policy, config.train.replay_limit)
        replayed = prove(policy, inputs.rollouts, samples=config.train.replay_samples, limit=limit, progress=progress)
    log = MetricsLog(stage.policy_dir, covered)
    try:
        trained = {
            expert: _train_expert(policy, inputs, config, expert, start, log, progress) for expert in policy.expert_ids
        }
    finally:
        log.close()
    fingerprint = _publish(policy, stage, {expert: one.averages for expert, one in trained.items()})
    updates = {name: sum(record["expert"] == name for record in log.records) for name in EXPERT_NAMES}
    return TrainReport(
        skipped=False,
        fingerprint=fingerprint,
        updates={EXPERT_NAMES[expert]: updates[EXPERT_NAMES[expert]] for expert in policy.expert_ids},
        replay=replayed.largest if replayed else None,
        warnings=_warnings(run, inputs, log, trained, lag),
        seconds=time.monotonic() - started,
    )


def _train_expert(
    policy: Policy,
    inputs: Inputs,
    config: RunConfig,
    expert: int,
    start: Path | None,
    log: MetricsLog,
    progress: Progress | None,
) -> Trained:
    """All updates of one expert, from where its last checkpoint left off."""
    stage, settings = inputs.rollouts.stage, config.train
    trainer = ExpertTrainer(policy, inputs, settings, expert)
    folder = _trainer_dir(stage, trainer.name)
    done = _restore(trainer, folder, start)
    batches = minibatches(
        inputs.units(),
        seed=inputs.rollouts.plan["seed"],
        iteration=stage.iteration,
        expert=expert,
        updates=settings.updates_per_rollout,
    )
    if settings.recompute_log_probs and done < len(batches):
        trainer.recompute_log_probs([unit for unit in inputs.units() if unit.expert == expert])
    for number in range(done, len(batches)):
        metrics = trainer.update(batches[number])
        names = {"iteration": stage.iteration, "expert": trainer.name, "update": number + 1}
        log.add(names | {"total_updates": trainer.state.updates} | metrics)
        if (number + 1) % settings.save_every == 0 or number + 1 == len(batches):
            checkpoint.save(folder, trainer.state, number + 1)
        if progress:
            progress(number + 1, len(batches), "updates", f"{trainer.name}, loss {metrics['loss']:.4g}")
    if not batches:
        checkpoint.save(folder, trainer.state, 0)
    trainer.finish()
    averages = {name: value.cpu() for name, value in trainer.state.ema.items()}
    return Trained(averages, trainer.unmoved())


def _restore(trainer: ExpertTrainer, folder: Path, start: Path | None) -> int:
    """Take the state of the last checkpoint, or, at the first update of an iteration, the optimizer of the one before.

    Returns the number of updates of this iteration that are done.
    """
    found = checkpoint.latest(folder)
    if found is not None:
        checkpoint.load(found[1], trainer.state)
        trainer.masters.publish()
        trainer.moved = found[0] > 0
        return found[0]
    before = checkpoint.latest(start / "trainer" / trainer.name) if start else None
    if before is not None:
        masters = checkpoint.load(before[1], trainer.state, weights=False)
        if trainer.policy.is_full:
            trainer.masters.take(masters, before[1])
    return 0


def _publish(policy: Policy, stage: Stage, averages: dict[int, dict[str, Tensor]]) -> str:
    """Write what was trained, its average beside it, and policy.json last; returns the fingerprint."""
    policy.use(None)
    policy.save(stage.policy_dir)
    if any(averages.values()):
        _save_averages(policy, stage.policy_dir / "ema", averages)
    identity = policy.fingerprint(stage.policy_dir)
    path = stage.policy_dir / "policy.json"
    publish_new(path, to_json({"schema": SCHEMA, "iteration": stage.iteration, **identity}, path))
    return str(identity["fingerprint"])


def _save_averages(policy: Policy, folder: Path, averages: dict[int, dict[str, Tensor]]) -> None:
    """Save the averaged weights through the policy's own writer, by putting them into the experts for a moment."""
    weights = {expert: {name: value.data for name, value in policy.trainable(expert)} for expert in averages}
    try:
        for expert, average in averages.items():
            for name, parameter in policy.trainable(expert):
                parameter.data = average[name].to(parameter.data)
        policy.save(folder)
    finally:
        for expert, kept in weights.items():
            for name, parameter in policy.trainable(expert):
                parameter.data = kept[name]


def _warnings(run: Run, inputs: Inputs, log: MetricsLog, trained: dict[int, Trained], lag: int) -> list[str]:
    rollouts, settings = inputs.rollouts, run.config.train
    groups = {key.rpartition("-")[0]: False for key in inputs.advantages}
    for key, (advantage, weight) in inputs.advantages.items():
        groups[key.rpartition("-")[0]] |= weight > 0 and advantage != 0
    sentences = guard_groups(sum(not alive for alive in groups.values()), len(groups))
    steps = {unit.expert for unit in rollouts.units()}
    sentences += [f"{EXPERT_NAMES[one]}: no step of it was sampled with noise, so it was not trained"
                  for one in trained if one not in steps]  # fmt: skip
    for expert, one in trained.items():
        mine = [record for record in log.records if record["expert"] == EXPERT_NAMES[expert]]
        sentences += [f"{EXPERT_NAMES[expert]}: {text}" for text in guard_unmoved(mine, one.unmoved)]
    sentences += guard_history(run, rollouts.stage.iteration, log.records)
    on_policy = settings.clip_range / 10 if lag == 0 and settings.objective == "grpo" else float("inf")
    clips = settings.objective == "grpo"
    return sentences + guard(log.records, epsilon=settings.epsilon, on_policy_limit=on_policy, clips=clips)


def _must_prove(settings: TrainConfig, rollouts: Rollouts, lag: int) -> bool:
    """The gate has nothing to say on recomputed log-probs, on shards known to be older, and without log-probs.

    It stands before DiffusionNFT too, whose old velocity must be that of the policy that sampled.
    """
    sampled = any(group["window"] for group in rollouts.groups.values())
    return sampled and not settings.recompute_log_probs and lag == 0


def _make_trainable(policy: Policy, config: RunConfig, start: Path | None) -> None:
    """Adapters, fresh ones where the start has none, or all weights; the kind cannot change within a run."""
    settings = config.train
    if settings.full and policy.has_lora:
        source = f"{start} holds a LoRA" if start else f"model.lora = {config.model.lora}"
        raise UserError(
            f"train.full trains all weights, but {source}",
            "fuse the LoRA into a model folder and begin with that",
        )
    if not settings.full and policy.is_full:
        source = str(start or config.model.lora)
        raise UserError(f"train.full is off, but {source} holds all weights", "set train.full = true, as it was before")
    if settings.full:
        policy.train_all()
    elif not policy.has_lora:
        policy.add_lora(settings.lora_rank, settings.lora_alpha, config.rollout.seed)


def _check_lag(settings: TrainConfig, lag: int) -> None:
    """Older shards bring their log-probs, but not the means that RatioNorm compares with."""
    if lag > 0 and settings.ratio_norm and not settings.recompute_log_probs and settings.objective == "grpo":
        raise UserError(
            f"train.ratio_norm needs the means of the policy that sampled the shards, but that is {lag} policies old",
            "set train.recompute_log_probs = true, or train.ratio_norm = false",
        )


def _check_settings(config: RunConfig) -> None:
    if config.train.objective == "grpo" and config.rollout.law == "ode":
        raise UserError(
            "rollout.law = ode has no log-probs to train on", "choose a stochastic law, or train.objective = nft"
        )


def _trainer_dir(stage: Stage, expert: str) -> Path:
    return stage.policy_dir / "trainer" / expert
