"""plan.json as records: written as it always was, and read with every field checked."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shards.errors import UserError
from shards.files import to_json
from shards.plan import Chunk, RolloutPlan
from shards.run import Run
from shards.verify.shards import verify
from tests.support.cost import in_python
from tests.support.shard_fixtures import make_plan, plan_of

Edit = Callable[[dict[str, Any]], object]


def changed(*path: str | int, value: Any) -> Edit:
    """An edit of one field of a plan, found by the way to it."""

    def edit(content: dict[str, Any]) -> None:
        at: Any = content
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = value

    return edit


def without(*path: str | int) -> Edit:
    def edit(content: dict[str, Any]) -> None:
        at: Any = content
        for name in path[:-1]:
            at = at[name]
        del at[path[-1]]

    return edit


def test_a_plan_is_written_as_it_was_read() -> None:
    content = make_plan(3, groups=3, group_size=5, groups_per_shard=2)
    content["groups"][1] |= {"negative_prompt": "blurry", "image": "first.png", "target": None, "window": []}
    assert to_json(plan_of(content).to_dict(), "plan.json") == to_json(content, "plan.json")


def test_a_group_has_its_own_negative_prompt_or_that_of_the_plan() -> None:
    content = make_plan(negative_prompt="ugly")
    content["groups"][1]["negative_prompt"] = ""
    plan = plan_of(content)
    assert [plan.negative_of(group.key) for group in plan.groups] == ["ugly", ""]


def test_chunks_and_keys_follow_from_the_plan() -> None:
    plan = plan_of(make_plan(groups=2, group_size=3, batch_size=2, groups_per_shard=2))
    first, second = plan.shards[0]
    assert plan.chunks(plan.shards[0]) == [
        Chunk(tuple((group, sample) for sample in samples)) for group in (first, second) for samples in ((0, 1), (2,))
    ]
    assert plan.chunks([second])[1].keys == ["i000000-p000001-s02"]
    assert plan.keys(0) == [key for chunk in plan.chunks(plan.shards[0]) for key in chunk.keys]
    assert (plan.samples, plan.shard_sizes, plan.video.size) == (6, {0: 6}, (32, 64, 5))


def test_chunks_across_groups_are_cut_within_the_shard_and_between_images() -> None:
    plan = plan_of(make_plan(kind="eval", groups=4, group_size=2, batch_size=3, groups_per_shard=4))
    assert [chunk.count for chunk in plan.chunks(plan.shards[0])] == [2, 2, 2, 2]
    assert plan.place("i000000-p000002", 1) == (1, 2)
    plan = replace(plan, batch_across_groups=True)
    chunks = plan.chunks(plan.shards[0])
    assert [chunk.samples for chunk in chunks] == [(0, 1, 0), (1, 0, 1), (0, 1)]
    assert [key for chunk in chunks for key in chunk.keys] == plan.keys(0)
    assert chunks[1].parts == [("i000000-p000001", 1), ("i000000-p000002", 2)]
    assert plan.place("i000000-p000002", 1) == (5, 8)
    with_image = tuple(replace(group, image="first.png") if n == 1 else group for n, group in enumerate(plan.groups))
    cut = replace(plan, groups=with_image).chunks(plan.shards[0])
    assert [chunk.parts for chunk in cut] == [
        [("i000000-p000000", 2)], [("i000000-p000001", 2)], [("i000000-p000002", 2), ("i000000-p000003", 1)],
        [("i000000-p000003", 1)],
    ]  # fmt: skip


def test_a_plan_has_only_what_differs_from_older_ones() -> None:
    plan = plan_of(make_plan(kind="eval"))
    assert not {"batch_across_groups", "arithmetic"} & plan.to_dict().keys()
    assert "preset" not in plan.to_dict()["video"]
    other = replace(plan, batch_across_groups=True, video=replace(plan.video, preset="veryfast"))
    assert other.to_dict()["batch_across_groups"] is True
    assert other.to_dict()["video"]["preset"] == "veryfast"
    assert plan_of(other.to_dict()) == other


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (without("seed"), "is damaged: it has no seed"),
        (without("groups", 1, "window"), "is damaged: it has no groups.1.window"),
        (without("policy", "base"), "is damaged: it has no policy.base"),
        (without("sampler", "eta"), "is damaged: it has no sampler.eta"),
        (changed("colour", value=1), "is damaged: it has an unknown field colour"),
        (changed("groups", 0, "colour", value=1), "is damaged: it has an unknown field groups.0.colour"),
        (changed("group_size", value="3"), "is damaged: group_size: input should be a valid integer, but it is '3'"),
        (changed("group_size", value=True), "is damaged: group_size: input should be a valid integer, but it is True"),
        (changed("group_size", value=0), "group_size is 0, not from 1 to"),
        (changed("seed", value=2**63), "seed is 9223372036854775808, not from 0 to 9223372036854775807"),
        (changed("kind", value="test"), "is damaged: kind: input should be 'rollout' or 'eval', but it is 'test'"),
        (changed("storage_dtype", value="int8"), "is damaged: storage_dtype: input should be 'float32'"),
        (changed("policy", value=None), "is damaged: policy: input should be"),
        (changed("policy", "fingerprint", value="x"), "policy.fingerprint is 'x', not a sha256"),
        (changed("sampler", "eta", value="much"), "is damaged: sampler.eta: input should be a valid number"),
        (changed("sampler", "law", value="flow"), "is damaged: sampler.law: input should be 'ode'"),
        (changed("sampler", "sigmas", 1, value=float("nan")), "is damaged: sampler.sigmas.1: input should be a finite"),
        (changed("sampler", "sigmas", 1, value=0.1), "bad sampler plan: sigmas must fall strictly"),
        (changed("groups", 0, "prompt", value=7), "is damaged: groups.0.prompt: input should be a valid string"),
        (changed("groups", 0, "prompt_id", value=5), "groups.0.key is 'i000000-p000000', but its prompt_id is 5"),
        (changed("groups", 0, "window", value=[2, 1]), "groups.0.window is [2, 1], but the sampler has 4 steps"),
        (changed("groups", 0, "window", value=[-1, 2]), "groups.0.window is [-1, 2], but the sampler has 4 steps"),
        (changed("video", "crf", value=52), "video.crf is 52, not from 0 to 51"),
        (changed("video", "preset", value="quick"), "is damaged: video.preset: input should be 'ultrafast'"),
        (changed("batch_across_groups", value=True), "batch_across_groups is true, but it is a rollout"),
        (changed("groups", 0, "window", value=[3]), "groups.0.window is [3], but the sampler has 4 steps"),
        (changed("shards", value=[]), "its shards do not hold each of its groups once"),
        (changed("schema", value=2), "has schema 2; this version reads 1"),
        (without("schema"), "is damaged: it has no schema"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_file_and_field(tmp_path: Path, edit: Edit, told: str) -> None:
    content = copy.deepcopy(make_plan())
    edit(content)
    stage = Run(tmp_path).iteration(0)
    stage.path.mkdir()
    stage.plan_path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        stage.plan()
    assert caught.value.problem.startswith(str(stage.plan_path))
    assert told in caught.value.problem
    assert caught.value.hint
    assert any(told in problem.problem for problem in verify(stage.path))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\xff", '{"schema": 1}'])
def test_what_is_no_plan_at_all_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^here/plan\.json is damaged: "):
        RolloutPlan.from_json(text.encode("latin-1"), "here/plan.json")


def test_another_schema_is_told_before_what_it_changed() -> None:
    with pytest.raises(UserError, match="has schema 2; this version reads 1"):
        plan_of({"schema": 2, "news": []})


def test_a_plan_is_read_without_torch() -> None:
    code = (
        "import sys, json\nfrom shards.plan import RolloutPlan\n"
        f"RolloutPlan.from_json({json.dumps(make_plan()).encode()!r}, 'plan.json')\n"
        "sys.exit(bool({'torch', 'numpy', 'pandas'} & sys.modules.keys()))"
    )
    assert in_python(code).returncode == 0
