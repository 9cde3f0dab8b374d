"""What is worth a look after an iteration, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shards import diagnosis
from shards.measures import read_metrics
from shards.plan import group_of
from shards.records.kinds import read_summary
from shards.run import EXPERT_NAMES
from shards.sidecar import specifications
from train.data import Inputs
from train.metrics import Record

if TYPE_CHECKING:
    from shards.run import Run, Stage


def diagnose(
    run: Run, inputs: Inputs, records: Sequence[Record], unmoved: Mapping[int, Sequence[str]], lag: int
) -> list[str]:
    """Sentences on an iteration that is trained: its metrics (`records`), and layers of each expert that never moved.

    `lag` is the number of policies between the one that sampled and the one that was trained.
    """
    rollouts, settings = inputs.rollouts, run.config.train
    groups = {group_of(key): False for key in inputs.advantages}
    for key, (advantage, weight) in inputs.advantages.items():
        groups[group_of(key)] |= weight > 0 and advantage != 0
    sentences = diagnosis.note_groups(sum(not alive for alive in groups.values()), len(groups))
    steps = {unit.expert for unit in rollouts.units()}
    sentences += [f"{EXPERT_NAMES[one]}: no step of it was sampled with noise, so it was not trained"
                  for one in unmoved if one not in steps]  # fmt: skip
    for expert, names in unmoved.items():
        mine = [record for record in records if record["expert"] == EXPERT_NAMES[expert]]
        sentences += [f"{EXPERT_NAMES[expert]}: {text}" for text in diagnosis.note_unmoved(mine, names)]
    sentences += diagnosis.note_ratio_norm(settings)
    sentences += history(run, rollouts.stage.iteration, records)
    return sentences + diagnosis.note_updates(records, diagnosis.Limits.of(settings, lag))


def history(run: Run, iteration: int, records: Sequence[Record]) -> list[str]:
    """A word when the distance to the reference rose since the iteration before while the guard measurements fell.

    `records` are the metrics of `iteration`. The measurements are those of the videos it was trained on, against
    iteration 0. Silent without a KL term, without guards, and at iteration 0.
    """
    if iteration == 0:
        return []
    before, now = read_metrics(run.iteration(iteration - 1)), list(records)
    return diagnosis.note_drift(
        _distance(before), _distance(now), _guards(run.iteration(0)), _guards(run.iteration(iteration))
    )


def _distance(records: Sequence[Record]) -> float:
    """Mean distance to the reference after the first update, which is where an iteration begins."""
    known = [record for record in records if "kl" in record]
    values = [record["kl"] for record in known if record["update"] > 1] or [record["kl"] for record in known]
    return sum(values) / len(values) if values else 0.0


def _guards(stage: Stage) -> dict[str, float]:
    """Mean guard measurements of the videos of a stage; empty where none were taken. All specifications share them."""
    for name in specifications(stage):
        path = stage.summary_path(name)
        guards = read_summary(path).guards if path.exists() else None
        if guards:
            return {key: value for key, value in guards.items() if value is not None}
    return {}
