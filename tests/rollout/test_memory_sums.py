"""Predicted memory against sums made by hand from the shapes of the layers, without building any of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout.memory import estimate as memory_model
from rollout.memory import needs as memory_needs
from rollout.plan import batch_size, stage_plan
from rollout.policy import Policy
from rollout.policy.sizes import decode_bytes, text_parameters
from rollout.preview import preview
from shards.errors import UserError
from shards.reader import open_shard
from shards.run import Run
from tests.rollout.test_memory import COMMON, CONFIGS, UMT5, config_run, size_of, write_configs
from tests.support import training
from train.run import train

RANK = 32


def linear(inputs: int, outputs: int) -> int:
    """Weights and biases of a linear layer."""
    return inputs * outputs + outputs


def by_hand(config: dict[str, Any]) -> tuple[int, int, int]:
    """(parameters, of them kept in fp32, of an adapter) of a Wan transformer, layer by layer."""
    d = config["num_attention_heads"] * config["attention_head_dim"]
    f, layers, frequencies, text = config["ffn_dim"], config["num_layers"], config["freq_dim"], config["text_dim"]
    patch = 4  # 1 x 2 x 2
    time = linear(frequencies, d) + linear(d, d)
    attention = 4 * linear(d, d) + 2 * d  # q, k, v, out, and the norms of q and k
    block = 2 * attention + linear(d, f) + linear(f, d) + 2 * d + 6 * d  # cross-attention's norm, the modulation table
    ends = linear(config["in_channels"] * patch, d) + linear(d, config["out_channels"] * patch) + 2 * d
    parameters = ends + time + linear(d, 6 * d) + linear(text, d) + linear(d, d) + layers * block
    kept = time + 2 * d + layers * (2 * d + 6 * d)
    return parameters, kept, layers * RANK * (8 * 2 * d + 2 * (d + f))


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_by_hand(name: str) -> None:
    size = size_of(name)
    assert (size.parameters, size.kept, size.lora) == by_hand({**COMMON, **CONFIGS[name]})


def test_the_text_encoder_by_hand() -> None:
    d, inner, f = UMT5["d_model"], UMT5["num_heads"] * UMT5["d_kv"], UMT5["d_ff"]
    layer = 4 * d * inner + 3 * d * f + 2 * d + 32 * UMT5["num_heads"]  # gated feed-forward, 32 buckets of distance
    assert text_parameters(UMT5) == UMT5["vocab_size"] * d + UMT5["num_layers"] * layer + d


def test_activations_by_hand(tmp_path: Path) -> None:
    """What a block saves for each token: with checkpointing its input, without it the inputs of all its products."""
    model = write_configs(tmp_path / "model", "1.3B")
    run = Run.open(config_run(tmp_path / "run", "wan21-1.3b", model, "train.kl_beta=0.0"))
    other = Run.open(run.path, ["train.kl_beta=0.0", "train.gradient_checkpointing=false"])
    needs = {saving: memory_needs.train_need(one).parts for saving, one in ((True, run), (False, other))}
    video, config = run.config.rollout, {**COMMON, **CONFIGS["1.3B"]}
    d, f, layers = config["num_attention_heads"] * 128, config["ffn_dim"], config["num_layers"]
    tokens = ((video.frames - 1) // 4 + 1) * (video.height // 16) * (video.width // 16)
    passes = 2  # guidance
    assert needs[True]["block inputs"] == passes * layers * tokens * d * 2
    each = needs[False]["working"] / (passes * layers * tokens * 2)
    # q, k, v and the result of both attentions, their inputs, and the feed-forward's two wide products at least
    assert 10 * d + 2 * f < each < 40 * d + 6 * f
    recomputed = needs[True]["working"]
    assert recomputed < 3 * passes * tokens * 2 * (40 * d + 6 * f)  # one block at a time, and the ends of the model


def test_decoding_by_hand() -> None:
    """The VAE's widest maps: four frames of 96 channels at full size in fp32, some of them at once, and the video."""
    height, width, frames = 480, 832, 81
    wide, video = 4 * 96 * height * width * 4, 3 * height * width * frames * 4
    found = decode_bytes({}, (16, 21, height // 8, width // 8))
    assert video + 2 * wide < found < 2 * video + 16 * wide


@pytest.mark.parametrize(("limit", "batch"), [(None, 1), (5000, 1), (6240, 1), (12480, 2), (10**6, 16)])
def test_a_batch_by_tokens_is_planned_as_it_is_rolled_out(limit: int | None, batch: int, tmp_path: Path) -> None:
    """480x832 of 13 frames is 4 x 30 x 52 = 6240 tokens; 5 frames are half of them."""
    model = write_configs(tmp_path / "model", "A14B", boundary_ratio=0.875)
    sets = [] if limit is None else [f"rollout.batch_tokens={limit}"]
    sets += ["rollout.frames=5"] if limit == 5000 else []
    run = Run.open(config_run(tmp_path / "run", "wan22-a14b", model, *sets))
    found = memory_model.read_model(run.config)
    assert found.layout.tokens(480, 832, 13) == 6240
    assert found.forward().batch == batch


def test_a_batch_by_tokens_is_frozen_in_the_plan_and_replayed(tiny_t2v: Path, tmp_path: Path) -> None:
    """16x16 of 5 frames is 2 tokens: 5 tokens hold two videos, and a group of three makes batches of 2 and 1."""
    policy = Policy.load(tiny_t2v, device="cpu", text_length=training.TEXT_LENGTH)
    run = training.make_run(tmp_path / "run", tiny_t2v, batch_size=1, batch_tokens=5, low_steps=0, group_size=3)
    stage = training.roll(run, 0, policy)
    plan = stage.plan()
    assert plan is not None
    assert plan.batch_size == 2
    chunks = [open_shard(stage, 0).meta(key)["chunk"] for key in open_shard(stage, 0).keys]
    assert chunks == [[0, 2], [0, 2], [2, 1]]
    training.advise(stage)
    assert train(run, 0, policy).replay == 0.0
    assert "batch: 2 (videos in one forward pass, 2 tokens each)" in preview(run, stage)
    assert "batch 2" in memory_needs.render(run, [])
    wide = Run.open(run.path, ["rollout.batch_tokens=1000"])
    assert batch_size(wide.config.rollout, policy.layout) == 3  # never more than a group
    again = stage_plan(wide, stage, policy.layout)
    assert again.batch_size == 3
    with pytest.raises(UserError, match="batch_size"):  # a stage keeps the batches it began with
        stage.publish_plan(replace(again, policy=plan.policy))


@pytest.mark.parametrize(("form", "told"), [("euler-maruyama", True), ("exact", False)])
def test_a_step_with_more_noise_than_its_state_may_hold_is_told(
    form: str, told: bool, tiny_t2v: Path, tmp_path: Path
) -> None:
    """dance-sde as published adds sqrt(D) eta however small sigma is; its exact form cannot exceed it."""
    loud = {"law": "dance-sde", "eta": 1.2, "form": form, "first_step": 4, "high_steps": 1, "low_steps": 0}
    run = training.make_run(tmp_path / "run", tiny_t2v, **loud)
    notes = [line for line in preview(run, run.iteration(0)).splitlines() if line.startswith("note: step 4 adds noise")]
    assert len(notes) == told
    if told:
        std, limit = (float(part) for part in re.findall(r"\d\.\d{3}", notes[0]))
        assert std > limit > 0
        assert "rollout.form=exact" in notes[0]
