"""Metrics of training: whole lines only, and warnings that say what to do."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards.config import RunConfig, TrainConfig
from shards.diagnosis import Limits, note_drift, note_groups, note_unmoved, note_updates
from shards.records.updates import read_updates
from shards.run import Run
from train.diagnosis import history
from train.metrics import MetricsLog

HEALTHY = Limits(ratio=1e-4, epsilon=1e-15, clips="both")


def record(update: int, expert: str = "high_noise", **values: Any) -> dict[str, Any]:
    healthy = {"ratio_min": 1.0, "ratio_max": 1.0, "clip_fraction": 0.2, "kl": 0.01, "gradient_norm": 0.5}
    names = {"iteration": 0, "expert": expert, "update": update, "total_updates": update}
    return names | healthy | {"gradient_rms": 1e-3, "loss": 0.5} | values


def test_a_resume_keeps_what_the_checkpoint_covers(tmp_path: Path) -> None:
    stage = Run(tmp_path).iteration(0)
    log = MetricsLog(stage, {})
    for update in (1, 2, 3):
        log.add(record(update))
    log.close()
    with stage.metrics_path.open("a") as file:
        file.write('{"expert": "high_no')  # a kill in the middle of a line
    assert [one["update"] for one in read_updates(stage.metrics_path)] == [1, 2, 3]
    log = MetricsLog(stage, {"high_noise": 2})
    log.add(record(3, loss=0.25))
    log.close()
    assert [one["loss"] for one in read_updates(stage.metrics_path)] == [0.5, 0.5, 0.25]


def test_tensorboard_shows_every_number_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stage = Run(tmp_path).iteration(0)
    MetricsLog(stage, {}).add(record(1))
    log = MetricsLog(stage, {"high_noise": 1})
    log.add(record(2, loss=0.25))
    log.close()
    events = EventAccumulator(str(stage.policy_dir / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("high_noise/loss")] == [(1, 0.5), (2, 0.25)]


def test_healthy_training_is_silent() -> None:
    assert note_updates([record(update) for update in range(1, 9)], HEALTHY) == []


def test_an_objective_without_a_ratio_hears_nothing_of_clipping() -> None:
    records = [record(update=number, clip_fraction=0.0) for number in range(1, 9)]
    assert any("clipped" in text for text in note_updates(records, HEALTHY))
    assert not note_updates(records, replace(HEALTHY, clips="none"))


@pytest.mark.parametrize(("records", "words"), [
    ([record(1, ratio_max=1.01)], "ratios up to 0.01 away from 1"),
    ([record(1, gradient_rms=5e-9)], r"5e-09 per weight\) drowns in train.epsilon = 1e-08"),
    ([record(1, gradient_norm=0.0)], "every gradient was 0"),
    ([record(n, clip_fraction=0.9) for n in range(1, 7)], "more than 40% of the samples are clipped"),
    ([record(n, clip_fraction=0.0) for n in range(1, 7)], "less than 5% of the samples are clipped"),
    ([record(n, kl=0.01 * 4**n) for n in range(1, 7)], "raise train.kl_beta"),
])  # fmt: skip
def test_each_fault_has_its_sentence(records: list[dict[str, Any]], words: str) -> None:
    import re

    sentences = note_updates(records, replace(HEALTHY, epsilon=1e-8))
    assert len(sentences) == 1
    assert re.search(words, sentences[0])
    assert sentences[0].startswith("high_noise: ")


def test_experts_are_judged_apart() -> None:
    records = [record(1), record(1, "low_noise", gradient_norm=0.0)]
    assert note_updates(records, HEALTHY) == [
        "low_noise: every gradient was 0, so nothing was learned; look at the advantages"
    ]


def test_dead_groups_are_told_when_they_are_the_majority() -> None:
    assert note_groups(2, 4) == []
    assert "3 of 4 groups have no advantage at all" in note_groups(3, 4)[0]
    assert note_groups(0, 0) == []


def test_layers_that_no_gradient_reached_are_named() -> None:
    assert note_unmoved([record(1)], []) == []
    assert note_unmoved([record(1, gradient_norm=0.0)], ["a", "b"]) == []  # nothing moved: another sentence says so
    assert note_unmoved([record(1)], ["blocks.0.attn1.to_q", "b"]) == [
        "blocks.0.attn1.to_q and 1 more did not move at all: no gradient reached what should be trained there"
    ]


@pytest.mark.parametrize(
    ("before", "now", "edges", "told"),
    [(0.01, 0.02, 0.07, True), (0.01, 0.02, 0.09, False), (0.02, 0.01, 0.07, False), (0.0, 0.02, 0.07, False)],
)
def test_a_rising_distance_with_falling_guards_is_told(
    before: float, now: float, edges: float, told: bool, tmp_path: Path
) -> None:
    first, last = {"edges": 0.1, "luma": 0.5, "motion": 0.0}, {"edges": edges, "luma": 0.1, "motion": 0.0}
    sentences = note_drift(before, now, first, last)
    assert [("edges 0.1 -> 0.07 since iteration 0" in one and "raise train.kl_beta" in one) for one in sentences] == (
        [True] if told else []
    )
    run = Run.create(tmp_path / "run", RunConfig())
    for iteration, distance, guards in ((0, before, first), (1, now, last)):
        folder = run.iteration(iteration).path
        summary: dict[str, Any] = {"schema": 1, "specification": {}, "samples": 2, "mean_reward": 0.5}
        MetricsLog(run.iteration(iteration), {}).add(record(2, kl=distance))
        (folder / "advantage" / "0a1b2c3d").mkdir(parents=True)
        (folder / "advantage" / "0a1b2c3d" / "_summary.json").write_text(json.dumps(summary | {"guards": guards}))
    assert history(run, 1, [record(1, kl=0.0), record(2, kl=now)]) == sentences
    assert history(run, 0, [record(2, kl=now)]) == []


def test_the_limits_of_an_iteration_follow_from_its_settings() -> None:
    published = TrainConfig(objective="grpo", estimator="noise", proximal=0.0, clip_range=1e-3, epsilon=1e-12)
    assert Limits.of(published, 0) == Limits(1e-4, 1e-12, "both")
    assert Limits.of(published, 1).ratio == math.inf  # another policy sampled
    assert Limits.of(published.model_copy(update={"proximal_2": 1.0}), 0) == Limits(math.inf, 1e-12, "high")
    assert Limits.of(published.model_copy(update={"objective": "nft"}), 0) == Limits(math.inf, 1e-12, "none")
