"""One expert through all updates of an iteration: from where its last checkpoint left off to weights on the disk."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rollout.policy import Policy
from rollout.ranks.world import World
from shards.process.signals import stopped
from shards.run import trainer_dir
from train import checkpoint
from train.checkpoint import Checkpoints
from train.data import Inputs
from train.metrics import MetricsLog
from train.order import RankPlan, plan_ranks
from train.publish import Trained, write_expert
from train.ranks import agreed
from train.trainer import ExpertTrainer

if TYPE_CHECKING:
    from shards.config import RunConfig
    from shards.process.progress import Progress
    from shards.workers.claims import Claim


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
    held: list[Claim]
    """The claims on these experts, on the rank that holds them."""

    def require_claim(self) -> None:
        """Raise RunFailed on all ranks when another process trains in our place, as after a sleep of this machine: what
        that one writes, or has published, must not be touched."""
        with self.world.together():
            for one in self.held:
                one.require()


def all_updates(work: Work, expert: int, replay: float | None) -> Trained:
    """All updates of one expert, from where its last checkpoint left off; then its weights are on the disk.

    `replay` is what the gate found, None when it did not run.
    """
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
    averages, unmoved = trainer.averages(), trainer.unmoved()
    del trainer  # its optimizer and averages, before the other expert needs the room
    work.require_claim()
    adapters, average = write_expert(work.policy, stage, expert, averages if settings.ema > 0 else None, world)
    return Trained(adapters, average, unmoved, replay)


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
