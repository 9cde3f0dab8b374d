"""The replay gate: before the first update, recomputed log-probs must equal those of the rollout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rollout.schedule import EXPERT_NAMES
from rollout.step import step_log_prob
from shards.errors import RunFailed
from train.data import Chunk, Rollouts, read_chunk
from train.freeze import check_policy, starting_policy
from train.order import Unit, generator

if TYPE_CHECKING:
    from rollout.policy import Policy
    from shards.progress import Progress
    from shards.run import Run


@dataclass(frozen=True)
class Replayed:
    """What the gate found."""

    largest: float
    """Largest |log-ratio|; 0.0 when nothing had to be proven."""
    transitions: int
    """Transitions recomputed."""
    per_expert: dict[str, float]
    """Largest |log-ratio| of each expert."""


def replay_limit(policy: Policy, gpu_limit: float) -> float:
    """What the gate accepts: bitwise equality on a CPU, `gpu_limit` (train.replay_limit) elsewhere."""
    return 0.0 if torch.device(policy.device).type == "cpu" else gpu_limit


def prove(
    policy: Policy,
    rollouts: Rollouts,
    *,
    samples: int,
    limit: float,
    progress: Progress | None = None,
) -> Replayed:
    """Recompute the log-probs of at least `samples` transitions of each expert and shard with the policy as it is.

    The very chunks of the rollout are run again, so that the batch shape is the same. The low-noise expert goes
    first, which leaves the other one in memory for training. Raises RunFailed at the first |log-ratio| above `limit`.
    """
    chosen = sample_units(rollouts, samples)
    per_expert: dict[str, float] = {}
    transitions = 0
    for expert in reversed(policy.expert_ids):
        mine = [unit for unit in chosen if unit.expert == expert]
        if mine:
            policy.use(expert)
        worst = 0.0
        for unit in mine:
            worst = max(worst, _replay_unit(policy, rollouts, unit, limit))
            transitions += unit.size
            if progress:
                progress(transitions, sum(unit.size for unit in chosen), "transitions", "replaying the rollouts")
        per_expert[EXPERT_NAMES[expert]] = worst
    return Replayed(max(per_expert.values(), default=0.0), transitions, per_expert)


def prove_iteration(run: Run, iteration: int, policy: Policy, progress: Progress | None = None) -> float:
    """Prove every committed transition of an iteration with the policy that sampled it; the largest |log-ratio|.

    For `rushes verify --replay`. The policy takes on the weights the iteration was rolled out with. Raises RunFailed
    above the limit, UserError when those weights are not there any more.
    """
    rollouts = Rollouts.open(run.iteration(iteration), partial=True)
    start = starting_policy(run, iteration)
    policy.become(start)
    check_policy(rollouts, policy, policy.fingerprint(start)["fingerprint"], run.config.train)
    limit = replay_limit(policy, run.config.train.replay_limit)
    everything = sum(unit.size for unit in rollouts.units())
    return prove(policy, rollouts, samples=everything, limit=limit, progress=progress).largest


def sample_units(rollouts: Rollouts, samples: int) -> list[Unit]:
    """For each shard and expert, units drawn until they hold `samples` transitions; a pure function of the plan."""
    chosen: list[Unit] = []
    units = rollouts.units()
    for shard, expert in sorted({(unit.shard, unit.expert) for unit in units}):
        mine = sorted(unit for unit in units if (unit.shard, unit.expert) == (shard, expert))
        seed = int(rollouts.plan["seed"])
        taken = 0
        for index in generator(seed, "replay", rollouts.stage.iteration, shard, expert).permutation(len(mine)):
            if taken >= samples:
                break
            chosen.append(mine[index])
            taken += mine[index].size
    return chosen


@torch.no_grad()
def log_probs(policy: Policy, rollouts: Rollouts, chunk: Chunk) -> torch.Tensor:
    """[B] fp32 log-probs of a chunk under the policy as it is; its expert must be in memory."""
    scored = step_log_prob(
        policy, rollouts.schedule, chunk.unit.step, chunk.x, chunk.x_next, chunk.prompt, chunk.negative, **chunk.extra
    )
    return scored.log_prob


def _replay_unit(policy: Policy, rollouts: Rollouts, unit: Unit, limit: float) -> float:
    chunk = read_chunk(rollouts, policy, unit)
    ratios = (log_probs(policy, rollouts, chunk) - chunk.log_prob).abs().tolist()
    worst = max(ratios, key=lambda value: math.inf if math.isnan(value) else value)
    if not worst <= limit:
        raise RunFailed(
            f"replay failed: |log-ratio| {worst:.3g} is above {limit:g} for {chunk.keys[ratios.index(worst)]}, "
            f"step {unit.step}, {EXPERT_NAMES[unit.expert]} expert, {rollouts.stage.shard_path(unit.shard)}",
            "this policy does not repeat the rollout: check [model] in run.toml and that no weight changed, or, for "
            "shards of other hardware, set train.recompute_log_probs",
        )
    return worst
