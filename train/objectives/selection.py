"""Which samples of a group an objective trains on, and with what weight: pure functions of advantages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from shards.errors import UserError
from shards.plan import group_of, sample_of

if TYPE_CHECKING:
    from shards.config import TrainConfig

Advantages = Mapping[str, tuple[float, float]]
"""(advantage, weight) of each sample key; weight 0 means that the sample is not trained on."""
Pair = tuple[int, int]
"""Numbers of two samples of a group: the winner and the loser."""


class Selected(NamedTuple):
    """What an objective makes of advantages."""

    advantages: Advantages
    pairs: dict[str, list[Pair]]
    """Pairs of each group, by group key; empty for objectives without pairs."""


def select_samples(advantages: Advantages, config: TrainConfig) -> Selected:
    """The samples that `train.objective` trains on; those it leaves out have weight 0.

    grpo, nft: all as they are. sft: the `sft_best` best of each group, a sample in two groups of equal merit by its
    number; with `sft_weight = "advantage"` those above the mean, weighted by advantage times weight. dpo: the samples
    of pairs, each weighted by the number of its pairs. Groups without spread give nothing. Raises UserError when
    nothing is left to train on.
    """
    if config.objective == "sft":
        return _best(advantages, config)
    if config.objective == "dpo":
        return _pairs(advantages, config)
    return Selected(advantages, {})


def _best(advantages: Advantages, config: TrainConfig) -> Selected:
    weights: dict[str, float] = {}
    for ranked in _ranked(advantages).values():
        for key in ranked[: config.sft_best]:
            advantage, weight = advantages[key]
            weights[key] = weight * (max(advantage, 0.0) if config.sft_weight == "advantage" else 1.0)
    if not any(weights.values()):
        raise UserError("no group has a video above its mean to train on", "sample more groups, or other prompts")
    return Selected(_weighted(advantages, weights), {})


def _pairs(advantages: Advantages, config: TrainConfig) -> Selected:
    pairs: dict[str, list[Pair]] = {}
    weights: dict[str, float] = {}
    for group, ranked in _ranked(advantages).items():
        found = [(ranked[0], ranked[-1])] if config.pairs == "best-worst" else _beyond(ranked, advantages, config)
        if found:
            pairs[group] = [(sample_of(winner), sample_of(loser)) for winner, loser in found]
        for pair in found:
            for key in pair:
                weights[key] = weights.get(key, 0.0) + 1.0
    if not pairs:
        problem = "no group has two videos that make a pair"
        if config.pairs == "margin":
            problem += f" whose advantages differ by train.pair_margin = {config.pair_margin:g}"
        raise UserError(problem, "lower train.pair_margin, or sample larger groups or other prompts")
    return Selected(_weighted(advantages, weights), pairs)


def _beyond(ranked: list[str], advantages: Advantages, config: TrainConfig) -> list[tuple[str, str]]:
    """All pairs, better first, whose advantages differ by `pair_margin` at least, and at all."""
    return [
        (winner, loser)
        for position, winner in enumerate(ranked)
        for loser in ranked[position + 1 :]
        if advantages[winner][0] - advantages[loser][0] >= max(config.pair_margin, 1e-9)
    ]


def _ranked(advantages: Advantages) -> dict[str, list[str]]:
    """Keys of each group with spread, those of weight above 0, from the best to the worst."""
    groups: dict[str, list[str]] = {}
    for key, (_, weight) in sorted(advantages.items()):
        if weight > 0:
            groups.setdefault(group_of(key), []).append(key)
    ranked = {group: sorted(keys, key=lambda key: -advantages[key][0]) for group, keys in groups.items()}
    return {group: keys for group, keys in ranked.items() if advantages[keys[0]][0] > advantages[keys[-1]][0]}


def _weighted(advantages: Advantages, weights: Mapping[str, float]) -> Advantages:
    return {key: (advantage, weights.get(key, 0.0)) for key, (advantage, _) in advantages.items()}
