"""The replay gate: before the first update, recomputed log-probs must equal those of the rollout."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rollout.lineage import check_committed, starting_policy
from rollout.ranks.world import World
from rollout.step import step_log_prob
from shards.errors import RunFailed
from shards.run import EXPERT_NAMES
from train.data import Batch, Rollouts, keys_of, read_batch
from train.inputs import check_policy
from train.order import Unit, deal, generator
from train.ranks import check

if TYPE_CHECKING:
    from rollout.policy import Policy
    from shards.process.progress import Progress
    from shards.run import Run

AT_ONCE = 8
"""Units that are replayed before the host looks at what came out: each look waits for the device."""


BINS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
"""Upper ends of the bins in which |log-ratios| are counted; one more holds the rest."""


@dataclass(frozen=True)
class StepRatios:
    """|log-ratios| of one step of one expert."""

    expert: str
    step: int
    transitions: int
    largest: float
    mean: float
    histogram: tuple[int, ...]
    """Transitions in each of BINS, then those above the last."""


@dataclass(frozen=True)
class Replayed:
    """What the gate found."""

    largest: float
    """Largest |log-ratio|; 0.0 when nothing had to be proven."""
    transitions: int
    """Transitions recomputed."""
    per_expert: dict[str, float]
    """Largest |log-ratio| of each expert."""
    per_step: tuple[StepRatios, ...]
    """By expert and step, in the order of sampling."""


def replay_limit(policy: Policy, limit: float, ulysses: int = 1) -> float:
    """What the gate accepts: bitwise equality on a CPU, sharded or not, `limit` (train.replay_limit) elsewhere.

    With Ulysses each rank multiplies a part of the tokens, and a matrix of another height may be rounded otherwise, on
    a CPU too (measured: 6e-8 in the log-prob).
    """
    return 0.0 if torch.device(policy.device).type == "cpu" and ulysses == 1 else limit


def prove(
    policy: Policy,
    rollouts: Rollouts,
    *,
    samples: int,
    limit: float,
    progress: Progress | None = None,
    world: World | None = None,
    experts: Sequence[int] | None = None,
) -> Replayed:
    """Recompute the log-probs of at least `samples` transitions of each expert and shard with the policy as it is.

    `experts` are those to be proven, all if absent. The very chunks of the rollout are run again, so that the batch
    shape is the same; ranks take them in turn, and all find the same. The low-noise expert goes first, which leaves the
    other one in memory for training. Raises RunFailed at the first |log-ratio| above `limit`.
    """
    world = world or World()
    experts = policy.layout.expert_ids if experts is None else experts
    chosen = [unit for unit in sample_units(rollouts, samples) if unit.expert in experts]
    per_expert: dict[str, float] = {}
    per_step: dict[tuple[int, int], list[float]] = {}
    transitions = 0
    for expert in sorted(experts, reverse=True):
        mine = [unit for unit in chosen if unit.expert == expert]
        if mine:
            policy.experts.use(expert)
        worst = 0.0
        turns = deal(len(mine), world.data_parallel).tolist()
        for some in (turns[first : first + AT_ONCE] for first in range(0, len(turns), AT_ONCE)):
            own = [mine[max(turn[world.data_rank], 0)] for turn in some]
            found = _replay_units(policy, rollouts, own, world)
            for turn, everyone in zip(some, zip(*world.gather_data(found), strict=True), strict=True):
                units = [mine[position] for position in turn if position >= 0]
                for unit, ratios in zip(units, everyone, strict=False):  # without the padding
                    ratio = max(ratios, key=_badness)
                    if not ratio <= limit:
                        key = keys_of(unit)[ratios.index(ratio)]
                        raise world.one_voice(_failure(rollouts, unit, key, ratio, limit))
                    worst = max(worst, ratio)
                    per_step.setdefault((expert, unit.step), []).extend(ratios)
                transitions += sum(unit.size for unit in units)
            if progress:
                progress(transitions, sum(unit.size for unit in chosen), "transitions", "replaying the rollouts")
        per_expert[EXPERT_NAMES[expert]] = worst
    steps = tuple(_step_ratios(*place, ratios) for place, ratios in sorted(per_step.items()))
    return Replayed(max(per_expert.values(), default=0.0), transitions, per_expert, steps)


def prove_iteration(run: Run, iteration: int, policy: Policy, progress: Progress | None = None) -> Replayed:
    """Prove every committed transition of an iteration with the policy that sampled it.

    For `rushes verify --replay`. The policy takes on the weights the iteration was rolled out with. Raises RunFailed
    above the limit, UserError when those weights are not there any more.
    """
    rollouts = Rollouts.open(run.iteration(iteration), partial=True)
    policy.check_model(run.path / "model.json")
    start = starting_policy(run, iteration)
    identity = policy.experts.fingerprint(start)
    if start is not None:
        check_committed(start, identity)
    policy.experts.become(start)
    policy.experts.compute_as(rollouts.plan.arithmetic)
    check_policy(rollouts, identity["fingerprint"], run.config.train)
    limit = replay_limit(policy, run.config.train.replay_limit, run.config.rollout.ulysses)
    everything = sum(unit.size for unit in rollouts.units())
    return prove(policy, rollouts, samples=everything, limit=limit, progress=progress)


def render_ratios(replayed: Replayed) -> str:
    """A table in 80 columns: a line for each expert and step, with the counts of its histogram."""
    ends = ["≤0", *(f"1e{round(math.log10(end))}" for end in BINS[1:]), "more"]
    lines = [f"  {'expert':<10} {'step':>4} {'largest':>8} {'mean':>8} " + " ".join(f"{end:>5}" for end in ends)]
    for one in replayed.per_step:
        counts = " ".join(f"{count or '·':>5}" for count in one.histogram)
        lines.append(f"  {one.expert:<10} {one.step:>4} {one.largest:>8.2g} {one.mean:>8.2g} {counts}")
    return "\n".join(lines)


def sample_units(rollouts: Rollouts, samples: int) -> list[Unit]:
    """For each shard and expert, units drawn until they hold `samples` transitions; a pure function of the plan."""
    chosen: list[Unit] = []
    units = rollouts.units()
    for shard, expert in sorted({(unit.shard, unit.expert) for unit in units}):
        mine = sorted(unit for unit in units if (unit.shard, unit.expert) == (shard, expert))
        seed = rollouts.plan.seed
        taken = 0
        for index in generator(seed, "replay", rollouts.stage.iteration, shard, expert).permutation(len(mine)):
            if taken >= samples:
                break
            chosen.append(mine[index])
            taken += mine[index].size
    return chosen


@torch.no_grad()
def log_probs(policy: Policy, rollouts: Rollouts, batch: Batch) -> torch.Tensor:
    """[B] fp32 log-probs of a batch under the policy as it is; its expert must be in memory."""
    return step_log_prob(policy, rollouts.schedule, batch.unit.step, batch.inputs(batch.x), batch.x_next).log_prob


def _replay_units(policy: Policy, rollouts: Rollouts, units: list[Unit], world: World) -> list[list[float]]:
    """Of each unit the |log-ratios| of its samples. The host waits for the device once."""
    found = []
    for unit in units:
        check("while it replayed the rollouts")
        with world.together():
            batch = read_batch(rollouts, policy, unit)
        found.append((log_probs(policy, rollouts, batch) - batch.log_prob).abs())
    ratios = torch.cat(found).cpu().split([unit.size for unit in units])
    return [_of_whole(rollouts, unit, one.tolist()) for unit, one in zip(units, ratios, strict=True)]


def _of_whole(rollouts: Rollouts, unit: Unit, ratios: list[float]) -> list[float]:
    """The ratios with 0 for samples that failed in the rollout: they are stored as zeros and have nothing to prove."""
    rows = [rollouts.shards[unit.shard].row(key) for key in keys_of(unit)]
    return [ratio if row["status"] == "ok" else 0.0 for ratio, row in zip(ratios, rows, strict=True)]


def _badness(ratio: float) -> float:
    """For comparisons: a ratio that is not a number is the largest."""
    return math.inf if math.isnan(ratio) else ratio


def _step_ratios(expert: int, step: int, ratios: list[float]) -> StepRatios:
    counts = [0] * (len(BINS) + 1)
    for ratio in ratios:
        counts[bisect_left(BINS, ratio)] += 1
    mean = math.fsum(ratios) / len(ratios)
    return StepRatios(EXPERT_NAMES[expert], step, len(ratios), max(ratios), mean, tuple(counts))


def _failure(rollouts: Rollouts, unit: Unit, key: str, ratio: float, limit: float) -> RunFailed:
    return RunFailed(
        f"replay failed: |log-ratio| {ratio:.3g} is above {limit:g} for {key}, "
        f"step {unit.step}, {EXPERT_NAMES[unit.expert]} expert, {rollouts.stage.shard_path(unit.shard)}",
        "this policy does not repeat the rollout: check [model] in run.toml and that no weight changed, or, for "
        "shards of other hardware, set train.recompute_log_probs",
    )
