"""Advantages: the properties that hold for every table, and small tables worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from score.advantages import Specification, advantages
from shards.errors import UserError

patient = settings(deadline=None, max_examples=50)  # a busy machine is no failure
NAN = math.nan


def table(groups: list[list[float]], **more: list[list[float]]) -> pd.DataFrame:
    """One row per number: reward `a`, and further rewards by name."""
    rows = [
        {
            "key": f"i000000-p{prompt:06d}-s{sample:02d}",
            "prompt_id": prompt,
            "sample": sample,
            "group": f"i000000-p{prompt:06d}",
            "a": value,
            **{name: values[prompt][sample] for name, values in more.items()},
        }
        for prompt, members in enumerate(groups)
        for sample, value in enumerate(members)
    ]
    return pd.DataFrame(rows)


def one(groups: list[list[float]], **options: object) -> pd.DataFrame:
    return advantages(table(groups), Specification({"a": 1.0}, **options))  # type: ignore[arg-type]


values = st.floats(-3, 3).map(lambda value: round(value, 3))
tables = st.lists(st.lists(st.one_of(values, st.just(NAN)), min_size=1, max_size=6), min_size=1, max_size=5)


@patient
@given(tables, st.sampled_from(["normalise-first", "sum-first"]))
def test_kept_groups_have_mean_0_and_deviation_1(groups: list[list[float]], combine: str) -> None:
    result = one(groups, combine=combine)
    for _, members in result[result["weight"] > 0].groupby("prompt_id"):
        assert members["advantage"].mean() == pytest.approx(0, abs=1e-9)
        assert members["advantage"].std(ddof=0) == pytest.approx(1, abs=1e-9)


@patient
@given(tables)
def test_missing_rewards_are_left_out_and_change_nothing_for_the_others(groups: list[list[float]]) -> None:
    result = one(groups)
    frame = table(groups)
    absent = frame["a"].isna()
    assert (result.loc[absent, "reason"] == "missing").all()
    assert (result.loc[absent, ["advantage", "weight"]] == 0).all(axis=None)
    assert result.loc[absent, "reward"].isna().all()
    without = advantages(frame[~absent].reset_index(drop=True), Specification({"a": 1.0}))
    np.testing.assert_allclose(result.loc[~absent, "advantage"], without["advantage"], rtol=0, atol=1e-12)
    assert np.isfinite(result[["advantage", "weight"]].to_numpy()).all()


@patient
@given(tables, st.randoms(use_true_random=False), st.sampled_from(["group", "global", "largest-group"]))
def test_the_order_of_rows_changes_no_bit(groups: list[list[float]], random: object, spread: str) -> None:
    frame = table(groups)
    shuffled = frame.sample(frac=1, random_state=random.randrange(2**32))  # type: ignore[attr-defined]
    specification = Specification({"a": 1.0}, spread=spread, best_of_n=2)  # type: ignore[arg-type]
    left, right = advantages(frame, specification), advantages(shuffled, specification)
    pd.testing.assert_frame_equal(left, right.sort_index(), check_exact=True)
    assert list(right["key"]) == list(shuffled["key"])


@patient
@given(st.floats(-1e3, 1e3), st.integers(2, 9), st.sampled_from(["normalise-first", "sum-first"]))
def test_equal_rewards_have_no_spread_even_without_a_limit(value: float, size: int, combine: str) -> None:
    result = one([[value] * size], min_spread=0.0, combine=combine)
    assert (result["reason"] == "no spread").all()
    assert (result[["advantage", "weight"]] == 0).all(axis=None)


def test_groups_below_the_limit_are_dropped_and_the_others_kept() -> None:
    result = one([[0.5, 0.50001], [0.0, 1.0], [0.7]])
    assert list(result["reason"]) == ["no spread", "no spread", "", "", "no spread"]
    assert list(result["advantage"]) == [0, 0, -1, 1, 0]


def test_a_group_at_the_limit_is_kept() -> None:
    assert list(one([[0.0, 1.0]], min_spread=0.5)["weight"]) == [1, 1]
    assert list(one([[0.0, 1.0]], min_spread=0.5000001)["weight"]) == [0, 0]


# By hand: [0, 0, 3, 3] has mean 1.5 and deviation 1.5; [1, 2, 3] mean 2 and deviation sqrt(2/3).
TWO = [[0.0, 0.0, 3.0, 3.0], [1.0, 2.0, 3.0]]
# All seven: mean 12/7, squares 0+0+9+9+1+4+9 = 32, variance 32/7 - 144/49 = 80/49.
GLOBAL = math.sqrt(80) / 7


@pytest.mark.parametrize(
    ("spread", "first", "second"),
    [("group", 1.5, math.sqrt(2 / 3)), ("global", GLOBAL, GLOBAL), ("largest-group", 1.5, 1.5)],
)
def test_divisors_by_hand(spread: str, first: float, second: float) -> None:
    result = one(TWO, spread=spread)
    expected = [-1.5 / first, -1.5 / first, 1.5 / first, 1.5 / first, -1 / second, 0, 1 / second]
    np.testing.assert_allclose(result["advantage"], expected, atol=1e-12)


def test_a_group_without_spread_is_dropped_whatever_divides() -> None:
    assert list(one([[1.0, 1.0], [0.0, 4.0]], spread="global")["weight"]) == [0, 0, 1, 1]


# By hand: a = [0, 1] has mean 1/2, deviation 1/2: -1, 1. b = [10, 30]: -1, 1. c = [5, 1]: 1, -1.
def test_normalise_first_makes_scales_equal_and_sum_first_does_not() -> None:
    frame = table([[0.0, 1.0]], c=[[5.0, 1.0]])
    weights = {"a": 1.0, "c": 0.5}
    by_reward = advantages(frame, Specification(weights))
    np.testing.assert_allclose(by_reward["advantage"], [-0.5, 0.5])
    summed = advantages(frame, Specification(weights, combine="sum-first"))
    np.testing.assert_allclose(summed["reward"], [2.5, 1.5])
    np.testing.assert_allclose(summed["advantage"], [1, -1])
    np.testing.assert_allclose(by_reward["reward"], [2.5, 1.5])


def test_three_rewards_by_hand() -> None:
    frame = table([[1.0, 2.0, 3.0]], b=[[0.0, 0.0, 3.0]], c=[[7.0, 7.0, 7.0]])
    result = advantages(frame, Specification({"a": 2.0, "b": -1.0, "c": 5.0}))
    a = np.array([-1, 0, 1]) / math.sqrt(2 / 3)
    b = np.array([-1, -1, 2]) / math.sqrt(2)  # mean 1, variance (1 + 1 + 4) / 3 = 2
    np.testing.assert_allclose(result["advantage"], 2 * a - b, atol=1e-12)  # c has no spread and says nothing
    assert list(result["weight"]) == [1, 1, 1]  # the others have one


def test_a_sample_needs_every_weighted_reward_but_no_other() -> None:
    frame = table([[0.0, 1.0, 2.0]], b=[[1.0, NAN, 3.0]])
    assert list(advantages(frame, Specification({"a": 1.0, "b": 1.0}))["reason"]) == ["", "missing", ""]
    assert list(advantages(frame, Specification({"a": 1.0, "b": 0.0}))["reason"]) == ["", "", ""]


def test_best_and_worst_are_kept_with_the_advantages_of_the_whole_group() -> None:
    whole = one([[5.0, 1.0, 4.0, 2.0, 3.0]])
    best = one([[5.0, 1.0, 4.0, 2.0, 3.0]], best_of_n=2)
    assert list(best["weight"]) == [1, 1, 0, 0, 0]
    assert list(best["reason"]) == ["", "", *["not among best and worst"] * 3]
    np.testing.assert_array_equal(best["advantage"], whole["advantage"])
    assert list(one([[5.0, NAN, 4.0, 2.0, 3.0]], best_of_n=2)["weight"]) == [1, 0, 0, 1, 0]
    assert list(one([[5.0, 1.0]], best_of_n=4)["weight"]) == [1, 1]


@patient
@given(tables, st.sampled_from([2, 4]))
def test_best_of_n_keeps_at_most_n_and_the_extremes(groups: list[list[float]], n: int) -> None:
    result = one(groups, best_of_n=n)
    for _, members in result.groupby("prompt_id"):
        kept = members[members["weight"] > 0]["reward"]
        usable = members[members["reason"].isin(["", "not among best and worst"])]["reward"]
        assert len(kept) == min(n, len(usable))
        assert kept.empty or (kept.max(), kept.min()) == (usable.max(), usable.min())


@patient
@given(tables, st.floats(0.1, 10))
def test_advantages_do_not_depend_on_the_scale_of_a_reward(groups: list[list[float]], scale: float) -> None:
    plain = one(groups, min_spread=0.0)
    assume(np.nanmin(table(groups)["a"].to_numpy(), initial=0) > -1e3)
    scaled = one([[value * scale for value in members] for members in groups], min_spread=0.0)
    np.testing.assert_allclose(plain["advantage"], scaled["advantage"], atol=1e-6)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="even number"):
        one([[0.0, 1.0]], best_of_n=3)
    with pytest.raises(UserError, match="weight 0"):
        advantages(table([[0.0, 1.0]]), Specification({"a": 0.0}))
