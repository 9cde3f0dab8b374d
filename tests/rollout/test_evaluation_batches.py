"""Batches of an evaluation reach over its prompts: each video is what it would be beside its own group alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rollout.plan import stage_plan
from rollout.policy import Policy
from rollout.run import regenerate, rollout
from rollout.sampler import Sampler
from shards.plan import RolloutPlan
from shards.reader import open_shard
from shards.run import Run, Stage
from shards.verify.shards import verify
from tests.rollout.test_rollout import contents, differences, make_run

SIZES = {"tiny_t2v2": 32, "tiny_i2v2": 32, "tiny_ti2v": 64}
IMAGES = {"tiny_t2v2": [False] * 5, "tiny_i2v2": [True] * 5, "tiny_ti2v": [True, True, False, False, True]}


def evaluation(model: str, folder: Path, request: pytest.FixtureRequest) -> tuple[Run, Stage, Policy]:
    """An evaluation of five prompts, each with a negative prompt of its own, with two videos each in batches of 3."""
    rows, size = [], SIZES[model]
    for number, image in enumerate(IMAGES[model]):
        rows.append({"prompt": f'a sign "{number}"', "negative": "bad " * number})
        if image:
            rows[-1]["image"] = f"{number}.png"
            Image.new("RGB", (size, size), (50 * number, 200 - 40 * number, 90)).save(folder / f"{number}.png")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = make_run(folder, request.getfixturevalue(model), prompts=prompts, height=size, width=size, batch_size=3)
    run = Run.open(run.path, ["eval.videos_per_prompt=2", "eval.limit=5"])
    return run, run.evaluation(0), Policy.of(run.config.model)


def latents(stage: Stage) -> dict[str, Tensor]:
    """The final latents of every sample."""
    found = {}
    for number in stage.shards():
        with open_shard(stage, number) as shard:
            found |= {key: shard.trajectory(key)["latents"] for key in shard.keys}
    return found


def by_groups(plan: RolloutPlan, policy: Policy) -> dict[str, Tensor]:
    """The final latents, each group sampled in batches of its own."""
    sampler, found = Sampler(policy, replace(plan, batch_across_groups=False), ""), {}
    shared = sampler.group_tensors([*plan.by_key])
    for chunk in sampler.plan.chunks(plan.by_key):
        state = sampler.start(chunk)
        for expert, steps in sampler.phases:
            policy.experts.use(expert)
            sampler.advance(chunk, state, shared, steps)
        found |= {key: state.x[number : number + 1] for number, key in enumerate(chunk.keys)}
    return found


@pytest.mark.parametrize("model", SIZES)
def test_a_video_does_not_depend_on_the_prompts_beside_it(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """But for rounding: kernels take another way for another number of rows."""
    run, stage, policy = evaluation(model, tmp_path, request)
    assert rollout(run, stage, policy).done == 10
    plan = stage.plan()
    assert plan is not None
    assert plan.batch_across_groups
    assert len({plan.negative_of(group) for group in plan.by_key}) == 5
    counts = [[len(chunk.parts) for chunk in plan.chunks(shard)] for shard in plan.shards]
    # shards of three groups and of two; a batch never holds prompts with an image and without one
    assert counts == {"tiny_ti2v": [[2, 1, 1], [1, 1]]}.get(model, [[2, 2], [2, 1]])
    found, wanted = latents(stage), by_groups(plan, policy)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4)
    videos = list(found.values())
    assert all((one - other).abs().max() > 0.1 for n, one in enumerate(videos) for other in videos[:n])
    assert verify(run.path) == []


def test_a_sample_of_a_batch_of_several_prompts_is_made_again(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run, stage, policy = evaluation("tiny_t2v2", tmp_path, request)
    rollout(run, stage, policy)
    stored = contents(stage)
    key = "i000000-p000001-s00"  # the last one of a batch that the group before it began
    assert stored[key][0]["chunk"] == [0, 3]
    again = regenerate(run, stage, key, policy)
    record = {name: value for name, value in again.meta.items() if name not in ("seconds", "host")}
    assert differences((json.loads(json.dumps(record)), again.video, dict(again.tensors)), stored[key]) == []


def test_a_killed_evaluation_continues_with_the_same_bytes(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    run, whole, policy = evaluation("tiny_t2v2", tmp_path / "whole", request)
    rollout(run, whole, policy)
    (tmp_path / "killed").mkdir()
    run, stage, _ = evaluation("tiny_t2v2", tmp_path / "killed", request)
    advance, calls = Sampler.advance, []

    def dying(self: Sampler, *arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise RuntimeError("killed")
        advance(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "advance", dying)
        with pytest.raises(RuntimeError, match="killed"):
            rollout(run, stage, policy)
    assert rollout(run, stage, policy).done == 7  # all but the first batch
    assert differences(contents(stage), contents(whole)) == []


def test_an_evaluation_that_an_older_version_began_keeps_its_batches(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run, stage, policy = evaluation("tiny_t2v2", tmp_path, request)
    identity = policy.experts.fingerprint(None)
    plan = stage_plan(run, stage, policy.layout, identity)
    older = replace(plan, batch_across_groups=False, shards=((*plan.shards[0], *plan.shards[1]),))
    assert "batch_across_groups" not in older.to_dict()
    one_shard = Run.open(run.path, ["eval.videos_per_prompt=2", "eval.limit=5", "rollout.groups_per_shard=4"])
    stage = one_shard.evaluation(0)
    stage.publish_plan(older)
    assert rollout(one_shard, stage, policy).done == 10
    assert {tuple(contents(stage)[key][0]["chunk"]) for key in stage.keys(0)} == {(0, 2)}
