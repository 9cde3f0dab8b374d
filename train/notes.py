"""What is worth a look after an iteration, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shards.run import EXPERT_NAMES, group_of
from train.data import Inputs
from train.history import guard_history
from train.metrics import Clips, Record, guard, guard_groups, guard_unmoved
from train.settings import is_published

if TYPE_CHECKING:
    from shards.run import Run


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
    on_policy = settings.clip_range / 10 if lag == 0 and is_published(settings) else float("inf")
    clips: Clips = "both" if is_published(settings) else "high" if settings.objective == "grpo" else "none"
    return sentences + guard(records, epsilon=settings.epsilon, on_policy_limit=on_policy, clips=clips)
