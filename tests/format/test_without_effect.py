"""Settings without effect are named: of a section that a command does not read, or of a stage that has its plan."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import get_args

import pytest

from rollout.transitions import resolve_form
from shards.records.schedule import Law
from shards.run import Run, Stage
from shards.settings.frozen import TWO_FORMS
from shards.settings.without_effect import without_effect
from tests.support.shard_fixtures import make_plan, planned_stage, write_train_plan

SINGLE = struct.unpack("f", struct.pack("f", 4.1))[0]  # as a plan has it


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A stage whose plan holds what those of `rollout` hold, made by the run.toml beside it."""
    sampler = make_plan()["sampler"] | {"guidance": [4.0, 4.0, SINGLE, SINGLE]}
    made = planned_stage(tmp_path, groups=2, group_size=2, sampler=sampler)
    video = made.plan().video
    lines = [
        "schema = 1", "[rollout]", "seed = 0", "group_size = 2", 'form = "exact"', "eta = 0.7", "steps = 4",
        "guidance_scale = 4.0", "guidance_scale_2 = 4.1", "video_crf = 12",
        *(f"{name} = {getattr(video, name)}" for name in ("height", "width", "frames", "fps")),
    ]  # fmt: skip
    (tmp_path / "run.toml").write_text("\n".join(lines) + "\n")
    return made


def said(stage: Stage, command: str, *sets: str, advantages_only: bool = False) -> str:
    return without_effect(Run(stage.run_path, sets), stage, command, advantages_only)


@pytest.mark.parametrize(
    ("command", "setting", "reason"),
    [
        ("train", "rollout.guidance_scale=2.0", "the plan of the stage is made"),
        ("train", "rollout.guidance_scale_2=2.0", "the plan of the stage is made"),
        ("train", "rollout.shift=9.0", "the plan of the stage is made"),
        ("train", "eval.steps=9", "`train` does not read it"),
        ("score", "train.lora_rank=9", "`score` does not read it"),
        ("score", "rollout.shift=9.0", "`score` does not read it"),
        ("rollout", "train.lora_rank=9", "`rollout` does not read it"),
        ("eval", "train.lora_rank=9", "`eval` does not read it"),
        ("loop", "eval.steps=9", "`loop` does not read it"),
        ("score", "rollout.eta=0.9", "the plan of the stage is made"),
    ],
)
def test_a_setting_of_this_call_without_effect_is_named(stage: Stage, command: str, setting: str, reason: str) -> None:
    assert said(stage, command, setting) == f"iter-0000: without effect: {setting.partition('=')[0]} ({reason})"


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        ("train", "train.lora_rank=9"),
        ("loop", "train.lora_rank=9"),
        ("train", "rollout.ulysses=2"),
        ("train", "rollout.eta=0.7"),  # the value that it has
        ("score", "score.min_spread=0.5"),
        ("score", "score.workers=2"),
        ("rollout", "rollout.eta=0.9"),  # of a stage that is not complete: the rollout refuses it
    ],
)
def test_what_has_an_effect_is_not_named(stage: Stage, command: str, setting: str) -> None:
    assert said(stage, command, setting) == ""


def test_a_form_that_its_law_does_not_have_is_not_named(stage: Stage) -> None:
    """The plan says `exact` of those laws, and run.toml may say anything."""
    laws = [law for law in get_args(Law) if resolve_form(law, "euler-maruyama") == "euler-maruyama"]
    assert set(TWO_FORMS) == set(laws)
    path = stage.run_path / "run.toml"
    text = path.read_text().replace('form = "exact"', 'form = "euler-maruyama"\nlaw = "cps"')
    path.write_text(text)
    stage.plan_path.write_text(stage.plan_path.read_text().replace('"flow-sde"', '"cps"'))
    assert said(stage, "train") == ""


def test_what_was_edited_after_the_plan_is_named(stage: Stage) -> None:
    path = stage.run_path / "run.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 6").replace("eta = 0.7", "eta = 0.25"))
    line = "iter-0000: without effect: rollout.seed, rollout.eta (the plan of the stage is made)"
    assert [said(stage, command) for command in ("score", "train")] == [line, line]
    assert said(stage, "rollout") == ""


def test_nothing_is_scored_for_advantages_alone(stage: Stage) -> None:
    assert said(stage, "score", "score.workers=2", advantages_only=True) == (
        "iter-0000: without effect: score.workers (with --advantages-only nothing is scored)"
    )


def test_a_trained_policy_keeps_its_settings(stage: Stage) -> None:
    write_train_plan(stage, train={"lora_rank": 4, "clip_range": 1e-3})
    assert said(stage, "train", "train.lora_rank=8") == ""  # training refuses it
    stage.policy_dir.mkdir()
    (stage.policy_dir / "policy.json").write_text("{}")
    assert said(stage, "train", "train.lora_rank=8") == (
        "iter-0000: without effect: train.lora_rank (the policy is trained)"
    )
