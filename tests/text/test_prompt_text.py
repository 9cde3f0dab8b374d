"""One cleaning of prompts, that of diffusers; what is stored is what the text encoder reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given
from hypothesis import strategies as st

from rollout.policy import Policy
from rollout.prompts.load import load_prompts
from rollout.run import rollout
from shards.reader import open_shard
from shards.run import Run
from shards.run_toml import parse_config
from shards.text.cleaning import clean
from tests.support import training
from tests.support.tiny_models import TEXT_LENGTH

PIECES = st.sampled_from(
    ["&quot;", "&amp;", "&amp;amp;", "&ldquo;", "&#8217;", "&lt;b&gt;", "<b>", "AT&T", "“", "’", "\u2028", "\t", " ",
     "é", "Ã©", "ﬁ", "Ｆ", "＂", "\ufeff", "\xa0", "営", "a", "\x1f", "&#x1f;", "\x0b", "…"]
)  # fmt: skip


@given(st.lists(PIECES, max_size=12).map("".join))
def test_cleaning_is_that_of_diffusers(text: str) -> None:
    assert clean(text) == prompt_clean(text)


def test_characters_are_cleaned_as_diffusers_does() -> None:
    for start in (*range(0, 0x3400, 256), *range(0xF900, 0x10000, 256), *range(0x1F000, 0x20000, 256)):
        text = " a".join(map(chr, range(start, start + 256)))
        assert clean(text) == prompt_clean(text)


@pytest.mark.parametrize(("text", "cleaned", "target"), [
    ("a sign that says &quot;OPEN&quot;", 'a sign that says "OPEN"', "OPEN"),
    ('an &amp;lt;old&amp;gt; "AT&amp;T"  shop', 'an <old> "AT&T" shop', "AT&T"),
    ("ein „Café“", 'ein "Café"', "Café"),
    ("a &ldquo;sign&rdquo; in <b>", "a “sign” in <b>", "sign"),
])  # fmt: skip
def test_prompt_and_target_are_the_same_text(text: str, cleaned: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": text, "negative": "a &amp; b"}), encoding="utf-8")
    prompt = load_prompts(path, True)[0]
    assert (prompt.text, prompt.target, prompt.negative) == (cleaned, target, "a & b")
    path.write_text(json.dumps({"prompt": "x", "target": "AT&amp;T"}), encoding="utf-8")
    assert load_prompts(path, True)[0].target == "AT&T"


def test_records_hold_what_the_encoder_reads(tiny_t2v: Path, tmp_path: Path) -> None:
    """Stored text, encoded as it stands, gives the stored embedding: that of the text as it was written, too."""
    run = training.make_run(tmp_path / "run", tiny_t2v, negative_prompt="a  &amp; b", prompts_per_iteration=3)
    written = ["a &quot;A&quot;", "an  “&lt;b&gt;”", "<i> &ldquo;C&rdquo;"]
    prompts = Path(run.config.rollout.prompts)
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in written), encoding="utf-8")
    policy = Policy.load(tiny_t2v, device="cpu", text_length=TEXT_LENGTH)
    stage = run.iteration(0)
    rollout(run, stage, policy)
    plan = stage.plan()
    assert plan is not None
    assert plan.negative_prompt == "a & b"
    texts = {group.prompt_id: (group.prompt, group.target) for group in plan.groups}
    assert texts == {0: ('a "A"', "A"), 1: ('an "<b>"', "<b>"), 2: ("<i> “C”", "C")}
    for number in stage.shards():
        with open_shard(stage, number) as shard:
            for key in shard.keys:
                meta = shard.meta(key)
                assert (meta["prompt"], meta["target"]) == texts[meta["prompt_id"]]
                tensors = shard.group(meta["text"])
                (raw,) = policy.text.encode([written[meta["prompt_id"]]])
                (stored,) = policy.text.encode([meta["prompt"]], cleaned=True)
                assert torch.equal(tensors["prompt"], raw)
                assert torch.equal(tensors["prompt"], stored)
                assert torch.equal(tensors["negative"], policy.text.encode(["a & b"])[0])


def test_a_clean_prompt_is_encoded_as_before(tiny_t2v: Path) -> None:
    policy = Policy.load(tiny_t2v, device="cpu", text_length=TEXT_LENGTH)
    for text in ('"FILM" in cyan', "", "a cat"):
        assert torch.equal(policy.text.encode([text])[0], policy.text.encode([text], cleaned=True)[0])


def test_the_prompts_of_a_run_may_stand_in_another_column(tiny_t2v: Path, tmp_path: Path) -> None:
    """`rollout.prompt_column` and `eval.prompt_column` hold each for its file."""
    from rollout.plan import check_stage, stage_prompts

    run = training.make_run(tmp_path / "run", tiny_t2v, prompts_per_iteration=1, prompt_column="caption")
    Path(run.config.rollout.prompts).write_text('{"caption": "a \\"B\\"", "prompt": "no"}\n', encoding="utf-8")
    (tmp_path / "eval.csv").write_text("text,prompt\n\"a 'C'\",no\n", encoding="utf-8")
    values = run.config.model_dump(by_alias=True)
    values["eval"] |= {"prompts": str(tmp_path / "eval.csv"), "prompt_column": "text"}
    both = Run.create(tmp_path / "both", parse_config(values, "here"))
    for stage in (both.iteration(0), both.evaluation(0)):
        assert check_stage(both, stage) == []
    assert [stage_prompts(both, stage)[0].target for stage in (both.iteration(0), both.evaluation(0))] == ["B", "C"]
