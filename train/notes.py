"""What is worth a look after an iteration, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shards.files import read_json, read_json_lines
from shards.plan import group_of
from shards.run import EXPERT_NAMES
from shards.sidecar import specifications
from train.data import Inputs
from train.metrics import Clips, Record, guard, guard_groups, guard_unmoved

if TYPE_CHECKING:
    from shards.run import Run, Stage

FALL = 0.2  # share of its first value that a measurement may lose before it is told
WATCHED = ("saturation", "edges", "entropy", "motion", "diversity")
"""Measurements of the reward `guards` that go down when a reward is hacked; `luma` and shares may move either way."""


def notes(
    run: Run, inputs: Inputs, records: Sequence[Record], unmoved: Mapping[int, Sequence[str]], lag: int
) -> list[str]:
    """Sentences on an iteration that is trained: its metrics (`records`), and layers of each expert that never moved.

    `lag` is the number of policies between the one that sampled and the one that was trained.
    """
    rollouts, settings = inputs.rollouts, run.config.train
    groups = {group_of(key): False for key in inputs.advantages}
    for key, (advantage, weight) in inputs.advantages.items():
        groups[group_of(key)] |= weight > 0 and advantage != 0
    sentences = guard_groups(sum(not alive for alive in groups.values()), len(groups))
    steps = {unit.expert for unit in rollouts.units()}
    sentences += [f"{EXPERT_NAMES[one]}: no step of it was sampled with noise, so it was not trained"
                  for one in unmoved if one not in steps]  # fmt: skip
    for expert, names in unmoved.items():
        mine = [record for record in records if record["expert"] == EXPERT_NAMES[expert]]
        sentences += [f"{EXPERT_NAMES[expert]}: {text}" for text in guard_unmoved(mine, names)]
    if settings.ratio_norm and settings.clip_range > 1e-5:
        small = "clips nothing of the small ratios of ratio_norm; GRPO-Guard has 2e-6 to 4e-6"
        sentences.append(f"clip_range {settings.clip_range:g} {small}")
    sentences += guard_history(run, rollouts.stage.iteration, records)
    on_policy = settings.clip_range / 10 if lag == 0 and settings.is_published else float("inf")
    clips: Clips = "both" if settings.is_published else "high" if settings.objective == "grpo" else "none"
    return sentences + guard(records, epsilon=settings.epsilon, on_policy_limit=on_policy, clips=clips)


def guard_history(run: Run, iteration: int, records: Sequence[Record]) -> list[str]:
    """A word when the distance to the reference rose since the iteration before while the guard measurements fell.

    `records` are the metrics of `iteration`. The measurements are those of the videos it was trained on, against
    iteration 0. Silent without a KL term, without guards, and at iteration 0.
    """
    if iteration == 0:
        return []
    before, now = read_json_lines(run.iteration(iteration - 1).policy_dir / "metrics.jsonl"), list(records)
    return guard_drift(_distance(before), _distance(now), _guards(run.iteration(0)), _guards(run.iteration(iteration)))


def guard_drift(kl_before: float, kl_now: float, first: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """The sentence itself, from the mean KL of two iterations and the guard measurements of the first and the last."""
    fallen = [
        f"{name} {first[name]:.3g} -> {now[name]:.3g}"
        for name in WATCHED
        if first.get(name, 0.0) > 0 and now.get(name, first[name]) < (1.0 - FALL) * first[name]
    ]
    if not fallen or not 0 < kl_before < kl_now:
        return []
    return [
        f"the distance to the reference rises while the videos get poorer ({', '.join(fallen)} since iteration 0); "
        "the reward is being hacked: raise train.kl_beta, and look at the videos"
    ]


def _distance(records: Sequence[Record]) -> float:
    """Mean distance to the reference after the first update, which is where an iteration begins."""
    values = [record["kl"] for record in records if record["update"] > 1] or [record["kl"] for record in records]
    return sum(values) / len(values) if values else 0.0


def _guards(stage: Stage) -> dict[str, float]:
    """Mean guard measurements of the videos of a stage; empty where none were taken. All specifications share them."""
    for name in specifications(stage):
        path = stage.summary_path(name)
        summary: dict[str, Any] = read_json(path) if path.exists() else {}
        if summary.get("guards"):
            return {key: value for key, value in summary["guards"].items() if value is not None}
    return {}
