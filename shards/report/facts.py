"""The numbers of a report: what a run's files say about rewards, updates, guards and costs. Reads, never writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shards import diagnosis, sidecar
from shards.diagnosis import Limits, Move
from shards.inspect import table
from shards.measures import read_metrics
from shards.reader import read_manifest
from shards.report.points import Point
from shards.run import Run, Stage
from shards.settings.frozen import of_training

if TYPE_CHECKING:
    import pandas

    from shards.config import TrainConfig
    from shards.records.updates import Update

GUARDS = "guards"
KINDS = ("rollout", "eval")


@dataclass(frozen=True)
class Cost:
    """What one stage took; None is not recorded."""

    stage: str
    work: str
    videos: int | None
    seconds: float | None
    bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Facts:
    """Everything the page is made from, but the videos."""

    run: Run
    samples: pandas.DataFrame
    updates: list[Update]
    costs: list[Cost]
    stages: dict[str, Stage]
    moves: list[Move]
    settings: dict[int, TrainConfig]
    """What each iteration with updates was trained with."""
    limits: dict[int, Limits]
    """What the updates of each iteration are judged by."""
    places: dict[str, dict[int, float]]
    """Where iterations lie on other axes: `videos`, `updates` and `hours` that were spent before each."""

    def of(self, kind: str) -> pandas.DataFrame:
        """Rows of the rollouts ("rollout") or of the evaluations ("eval")."""
        return self.samples[self.samples["kind"] == kind]

    def stage(self, kind: str, iteration: int) -> Stage:
        """A stage by what its rows say."""
        return self.stages[f"{'eval/' if kind == 'eval' else ''}iter-{iteration:04d}"]


def gather(run: Run) -> Facts:
    """Read a run. Raises UserError when it has no shard yet, Damaged for a broken file."""
    samples = table.samples(run.path, files=run.files)
    stages = [run.iteration(k) for k in run.iterations()] + [run.evaluation(k) for k in run.evaluations()]
    stages = [stage for stage in stages if stage.shards()]
    updates = [record for k in run.iterations() for record in read_metrics(run.iteration(k))]
    costs = [cost for stage in stages for cost in _costs(stage, samples)]
    trained = sorted({record["iteration"] for record in updates})
    settings = {k: of_training(run.iteration(k)) or run.config.train for k in trained}
    return Facts(
        run,
        samples,
        updates,
        costs,
        {stage.name: stage for stage in stages},
        guard_moves(samples),
        settings,
        {k: Limits.of(settings[k], _lag(run.iteration(k))) for k in trained},
        _places(run, samples, updates),
    )


def components(samples: pandas.DataFrame) -> list[str]:
    """Columns with a reward component, guards and each scorer's repeated first component left out."""
    names = [name for name in samples.columns if "." in name and not name.endswith((".text", ".reward"))]
    return [name for name in names if not name.startswith(f"{GUARDS}.") and samples[name].notna().any()]


def guards(samples: pandas.DataFrame) -> list[str]:
    """Columns with a guard metric."""
    return [name for name in samples.columns if name.startswith(f"{GUARDS}.") and name != f"{GUARDS}.reward"]


def by_iteration(samples: pandas.DataFrame) -> list[tuple[int, pandas.DataFrame]]:
    """The rows of each iteration, ascending."""
    return [(int(str(iteration)), rows) for iteration, rows in samples.groupby("iteration")]


def middle_points(samples: pandas.DataFrame, column: str) -> list[Point]:
    """Mean by iteration with the range of the middle 80 % of the samples."""
    points = []
    for iteration, rows in by_iteration(samples):
        values = rows[column].dropna()
        if len(values):
            low, high = values.quantile([0.1, 0.9])
            points.append(Point(float(iteration), float(values.mean()), float(low), float(high)))
    return points


def error_points(samples: pandas.DataFrame, column: str) -> list[Point]:
    """Mean by iteration with one standard error on both sides."""
    points = []
    for iteration, rows in by_iteration(samples):
        values = rows[column].dropna()
        if len(values):
            mean, error = float(values.mean()), standard_error(values)
            points.append(Point(float(iteration), mean, mean - error, mean + error))
    return points


def mean_points(samples: pandas.DataFrame, column: str) -> list[Point]:
    """Mean by iteration."""
    return [Point(p.x, p.y) for p in error_points(samples, column)]


def spread_points(samples: pandas.DataFrame) -> list[Point]:
    """Standard deviation of the reward inside a group, averaged over groups, by iteration."""
    by = samples.groupby(["iteration", "group"])["reward"].std(ddof=0).groupby("iteration").mean()
    return [Point(float(str(iteration)), float(value)) for iteration, value in by.items()]


def used_points(samples: pandas.DataFrame) -> list[Point]:
    """Share of the groups that gave an advantage, by iteration; only where advantages exist."""
    judged = samples[samples["weight"].notna()]
    by = judged.groupby(["iteration", "group"])["weight"].max().gt(0).groupby("iteration").mean()
    return [Point(float(str(iteration)), float(value)) for iteration, value in by.items()]


def update_points(updates: Sequence[Update], expert: str, name: str, base: float = 0.0) -> list[Point]:
    """A metric minus `base` by update, at iteration + the part of its updates that came before.

    A metric NAME_mean has NAME_min and NAME_max as its spread.
    """
    mine = [record for record in updates if record["expert"] == expert and name in record]
    count: dict[int, int] = {}
    for record in mine:
        count[record["iteration"]] = max(count.get(record["iteration"], 0), record["update"])
    points = []
    for record in mine:
        x = record["iteration"] + (record["update"] - 1) / count[record["iteration"]]
        low, high = (record.get(name.replace("_mean", end)) for end in ("_min", "_max"))
        note = f"iteration {record['iteration']}, update {record['update']}"
        if name.endswith("_mean") and low is not None and high is not None:
            points.append(Point(x, record[name] - base, low - base, high - base, note))
        else:
            points.append(Point(x, record[name] - base, note=note))
    return points


def experts(updates: Sequence[Update]) -> list[str]:
    """Names of the experts that were trained, in the order they first appear."""
    return list(dict.fromkeys(record["expert"] for record in updates))


def standard_error(values: pandas.Series[float]) -> float:
    """Standard error of a mean; 0 for one value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def guard_moves(samples: pandas.DataFrame) -> list[Move]:
    """For each guard and kind the largest move beyond GUARD_LIMIT from the first iteration, if there is one.

    It is an alarm when it is also larger than some standard errors, taken over the means of groups: an iteration draws
    few prompts, and prompts differ. With one group there is no error to compare with, and any such move is an alarm.
    """
    moves = []
    for kind in KINDS:
        rows = samples[samples["kind"] == kind]
        for name in guards(rows):
            by_group = rows.dropna(subset=[name]).groupby(["iteration", "group"])[name].mean()
            series = {int(str(k)): values for k, values in by_group.groupby("iteration")}
            found = [_move(name, kind, k, series[min(series)], series[k]) for k in series]
            moves += sorted((one for one in found if one), key=lambda one: (one.alarm, abs(one.share)))[-1:]
    return sorted(moves, key=lambda one: (not one.alarm, -abs(one.share)))


def _move(name: str, kind: str, iteration: int, first: pandas.Series[float], now: pandas.Series[float]) -> Move | None:
    error = math.hypot(standard_error(first), standard_error(now))
    guard = name.removeprefix(f"{GUARDS}.")
    return Move.beyond(guard, kind, iteration, float(first.mean()), float(now.mean()), error)


def alarms(facts: Facts) -> list[str]:
    """What a careful reader of all the numbers would say first, in plain words."""
    rollouts = facts.of("rollout")
    found = diagnosis.alarm_moves(facts.moves)
    found += diagnosis.alarm_groups([(point.x, point.y) for point in used_points(rollouts)])
    missing = rollouts[~rollouts["status"].isin(["ok", table.NOT_SCORED])]
    for iteration, rows in missing.groupby("iteration"):
        found.append(diagnosis.alarm_missing(iteration, len(rows), rows["status"].mode()[0]))
    return found + diagnosis.alarm_updates(facts.updates, facts.limits)


def _lag(stage: Stage) -> int:
    """Policies between the one that sampled an iteration and the one that it trains."""
    plan = stage.plan()
    return stage.iteration - plan.policy.lag_of if plan else 0


def _places(run: Run, samples: pandas.DataFrame, updates: Sequence[Update]) -> dict[str, dict[int, float]]:
    """What was spent before the policy after K iterations was there, by K.

    No hours where the times of the files are not in the order of the iterations, as in a copy of a run.
    """
    videos = samples[samples["kind"] == "rollout"].groupby("iteration").size()
    found: dict[str, dict[int, float]] = {"videos": {0: 0.0}, "updates": {0: 0.0}, "hours": {0: 0.0}}
    began = _written(run.iteration(0).plan_path)
    for k in run.iterations():
        found["videos"][k + 1] = found["videos"].get(k, 0.0) + float(videos.get(k, 0))
        mine = sum(record["iteration"] == k for record in updates)
        found["updates"][k + 1] = found["updates"].get(k, 0.0) + mine
        ended = _written(run.iteration(k).policy_record_path)
        if began and ended:
            found["hours"][k + 1] = (ended - began) / 3600
    if [*found["hours"].values()] != sorted(found["hours"].values()):
        found["hours"] = {}
    return found


def _written(path: Path) -> float | None:
    return path.stat().st_mtime if path.exists() else None


def _costs(stage: Stage, samples: pandas.DataFrame) -> list[Cost]:
    manifests = [read_manifest(stage, shard) for shard in stage.shards()]
    mine = samples[(samples["kind"] == stage.kind) & (samples["iteration"] == stage.iteration)]
    infos = [manifest.info for manifest in manifests]
    seconds = [info.get("seconds") for info in infos]
    told = [float(one) for one in seconds if isinstance(one, int | float)]
    took = sum(told) if len(told) == len(seconds) else float(mine["seconds"].sum())
    work = "eval" if stage.kind == "eval" else "rollout"
    size = sum(manifest.tar.bytes for manifest in manifests)
    costs = [Cost(stage.name, work, len(mine), took, size, _peak(infos))]
    costs += [_scoring_cost(stage, scorer) for scorer in sidecar.scorers(stage)]
    records = read_metrics(stage)
    if records:
        trained = sum(record.get("seconds", 0.0) for record in records)
        costs.append(Cost(stage.name, "train", None, trained, None, _peak(records)))
    return costs


def _scoring_cost(stage: Stage, scorer: str) -> Cost:
    """Time and memory of one reward; tables that do not say what they took leave a gap."""
    shards = [shard for shard in stage.shards() if stage.score_path(scorer, shard).exists()]
    records = [sidecar.score_metadata(stage, shard, scorer) for shard in shards]
    times = [found for record in records if (found := _finite(record.get("seconds"))) is not None]
    seconds = sum(times) if len(times) == len(records) else None
    videos = sum(len(stage.keys(shard)) for shard in shards)
    return Cost(stage.name, f"score {scorer.rpartition('-')[0]}", videos, seconds, None, _peak(records))


def _peak(records: Sequence[Update]) -> int | None:
    found = [value for record in records if (value := _finite(record.get("peak_memory_bytes"))) is not None]
    return int(max(found)) if found else None


def _finite(value: object) -> float | None:
    """A number, or the text of one in a table's metadata; None for anything else."""
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
