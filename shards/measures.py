"""The mean reward of a stage with its standard error and its change since the first stage; the updates of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shards.records.kinds import SummaryValues, read_summary
from shards.records.updates import Update, read_updates
from shards.run import EXPERT_NAMES, Run, Stage
from shards.sidecar import specifications


@dataclass(frozen=True)
class Measure:
    """What the summary of a stage says about its rewards."""

    mean: float
    error: float
    """Standard error of the mean over `samples` videos."""
    samples: int
    """Videos that have a reward."""
    groups: int
    used_groups: int
    """Groups with an advantage; the others have rewards that are all alike, or none."""


@dataclass(frozen=True)
class StageReward:
    """The reward of one stage beside that of the first stage of its kind, for `status` and for the log."""

    stage: str
    kind: str
    now: Measure
    first_iteration: int | None
    """Number of that first stage; None when it is this one."""
    change: float | None
    """`now.mean` less its mean."""

    def __str__(self) -> str:
        since = f" ({self.change:+.3f} since iteration {self.first_iteration})" if self.change is not None else ""
        text = f"reward {self.now.mean:.3f} ± {self.now.error:.3f}{since}"
        # the groups of an evaluation need no spread, and mostly hold one video
        return text if self.kind == "eval" else f"{text}, {self.now.used_groups} of {self.now.groups} groups used"


def measure_of(summary: SummaryValues) -> Measure | None:
    """The measure that a summary holds; None where no video has a reward."""
    mean = summary.get("mean_reward")
    if mean is None:
        return None
    count = summary["samples"] - summary.get("missing", 0)
    error = (summary.get("std_reward") or 0.0) / max(1, count) ** 0.5
    return Measure(mean, error, count, summary.get("groups", 0), summary.get("used_groups", 0))


def measured(stage: Stage, weights: Mapping[str, float]) -> Measure | None:
    """The mean reward of a stage by these weights; None when it was not scored so. Raises UserError for a damaged
    summary.
    """
    for name in specifications(stage):
        path = stage.summary_path(name)
        summary = read_summary(path) if path.exists() else None
        if summary and summary.weights == dict(weights) and (found := measure_of(summary.to_dict())):
            return found
    return None


def stage_reward(
    run: Run, stage: Stage, weights: Mapping[str, float], now: Measure | None = None
) -> StageReward | None:
    """The reward of a stage and its change since the first stage of its kind that has one by the same weights.

    `now` is the measure of the stage where it is known already. None when the stage has none. Raises UserError for a
    damaged summary.
    """
    now = now or measured(stage, weights)
    if now is None:
        return None
    numbers = run.evaluations() if stage.kind == "eval" else run.iterations()
    of = run.evaluation if stage.kind == "eval" else run.iteration
    for number in (number for number in numbers if number < stage.iteration):
        if first := measured(of(number), weights):
            return StageReward(stage.name, stage.kind, now, number, now.mean - first.mean)
    return StageReward(stage.name, stage.kind, now, None, None)


def read_metrics(stage: Stage) -> list[Update]:
    """The updates of an iteration so far, as training wrote them down, those of the high-noise expert first.

    While the experts train in a process each, either has a log of its own, which counts instead of the lines of that
    expert in the common one. The common one is complete when the policy is there. Raises as `read_updates`.
    """
    own: dict[str, list[Update]] = {}
    if not stage.policy_record_path.exists():
        for name in EXPERT_NAMES:
            path = stage.expert_metrics_path(name)
            found = read_updates(path, stage.iteration)
            if found or path.exists():  # it goes when its lines are in the common log
                own[name] = found
    # read last: a log that was gone has its lines in this one by now
    common = [record for record in read_updates(stage.metrics_path, stage.iteration) if record["expert"] not in own]
    found = [*common, *(record for records in own.values() for record in records)]
    return sorted(found, key=_place)


def _place(record: Update) -> int:
    """Where an expert's updates stand among those of both; in the order of its own log."""
    return EXPERT_NAMES.index(record["expert"]) if record["expert"] in EXPERT_NAMES else 0
