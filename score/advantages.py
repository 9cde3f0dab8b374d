"""Advantages from rewards: pure functions of tables, so that other weights cost seconds and no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

Combine = Literal["normalise-first", "sum-first"]
Spread = Literal["group", "global", "largest-group"]
Values = NDArray[np.float64]
MISSING, NO_SPREAD, NOT_CHOSEN = "missing", "no spread", "not among best and worst"


@dataclass(frozen=True)
class Specification:
    """How advantages follow from rewards; the names are those of [score] in run.toml."""

    weights: Mapping[str, float]
    combine: Combine = "normalise-first"
    spread: Spread = "group"
    min_spread: float = 1e-4
    best_of_n: int = 0


def advantages(rewards: pd.DataFrame, specification: Specification) -> pd.DataFrame:
    """Advantage of every sample among those of its prompt.

    `rewards` has the columns key, prompt_id, sample, group and one per name in `specification.weights` (NaN = missing).
    Returns, in the same row order, key, prompt_id, sample, advantage, weight, reward, reason; weight is 0 for samples
    that must not be trained on and `reason` says why ("" for the others); `reward` is the weighted sum or NaN.

    A = (r - mean of the group) / standard deviation, with the population formula (ddof 0) and nothing added to the
    divisor, so a group that is kept has mean 0 and, for `spread="group"`, standard deviation 1. "normalise-first" does
    this for each reward and sums the results with the weights (GenRL); "sum-first" sums the rewards first. The divisor
    is that of the group, of all samples (UniRL's `adv_use_global_std`), or the largest of all groups (GenRL).
    """
    if specification.best_of_n % 2 or specification.best_of_n < 0:
        raise UserError(
            f"best_of_n is {specification.best_of_n}", "half of it is best, half worst: take an even number"
        )
    frame = rewards.sort_values("key", kind="stable")  # sums must not depend on the order in which rows came
    weights = {name: weight for name, weight in specification.weights.items() if weight != 0.0}
    if not weights:
        raise UserError("all rewards have weight 0", "give one of [score].rewards a weight")
    groups = _codes(frame["group"])
    columns = {name: frame[name].to_numpy(np.float64) for name in weights}
    total = sum((weight * columns[name] for name, weight in weights.items()), np.zeros(len(frame)))
    present = np.isfinite(total)
    if specification.combine == "sum-first":
        columns, weights = {"": total}, {"": 1.0}
    advantage, has_spread = np.zeros(len(frame)), np.zeros(len(frame), dtype=bool)
    for name, weight in weights.items():
        normalised, kept = _normalise(columns[name], present, groups, specification)
        advantage += weight * normalised
        has_spread |= kept
    reason = np.where(~present, MISSING, np.where(~has_spread, NO_SPREAD, "")).astype(object)
    if specification.best_of_n:
        reason[(reason == "") & ~_best_and_worst(advantage, reason == "", groups, specification.best_of_n)] = NOT_CHOSEN
    result = frame[["key", "prompt_id", "sample"]].copy()
    result["advantage"], result["weight"] = advantage, (reason == "").astype(np.float64)
    result["reward"], result["reason"] = np.where(present, total, np.nan), reason.astype(str)
    return result.loc[rewards.index]


def _codes(groups: pd.Series) -> NDArray[np.int64]:
    """0, 1, 2, … for the group of every row."""
    return np.unique(groups.to_numpy(str), return_inverse=True)[1].astype(np.int64)


def _normalise(
    values: Values, present: NDArray[np.bool_], groups: NDArray[np.int64], specification: Specification
) -> tuple[Values, NDArray[np.bool_]]:
    """(value - group mean) / divisor of every row, 0 where missing or without spread; and whether it is there."""
    mean, deviation = group_statistics(values, present, groups)
    kept_groups = (deviation > 0) & (deviation >= specification.min_spread)
    kept = present & kept_groups[groups]
    if not kept.any():
        return np.zeros(len(values)), kept
    divisor = deviation[groups]
    if specification.spread == "global":
        divisor = np.full(len(values), values[present].std())
    elif specification.spread == "largest-group":
        divisor = np.full(len(values), deviation.max())
    normalised = np.zeros(len(values))
    normalised[kept] = (values[kept] - mean[groups][kept]) / divisor[kept]
    return normalised, kept


def group_statistics(values: Values, present: NDArray[np.bool_], groups: NDArray[np.int64]) -> tuple[Values, Values]:
    """Mean and standard deviation [G] (ddof 0) of every group over the rows that are present; 0 for an empty group.

    values, present, groups: [N], one a row; `groups` numbers the groups from 0.

    The deviation of equal values is exactly 0, which the two-pass formula alone does not promise (three times 0.1).
    """
    count = int(groups.max(initial=-1)) + 1
    members = np.maximum(np.bincount(groups[present], minlength=count), 1)
    mean = np.bincount(groups[present], weights=values[present], minlength=count) / members
    squares = np.square(values[present] - mean[groups[present]])
    deviation = np.sqrt(np.bincount(groups[present], weights=squares, minlength=count) / members)
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, groups[present], values[present])
    np.maximum.at(high, groups[present], values[present])
    deviation[~(high > low)] = 0.0
    return mean, deviation


def _best_and_worst(
    advantage: Values, usable: NDArray[np.bool_], groups: NDArray[np.int64], best_of_n: int
) -> NDArray[np.bool_]:
    """The n/2 best and n/2 worst of every group (DanceGRPO's best-of-n), ties by key; small groups are kept whole."""
    chosen = np.zeros(len(advantage), dtype=bool)
    order = np.lexsort((np.arange(len(advantage)), advantage, groups))
    order = order[usable[order]]
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        half = best_of_n // 2
        picked = members if len(members) <= best_of_n else np.concatenate((members[:half], members[-half:]))
        chosen[picked] = True
    return chosen
