"""VideoAlign: equal to the reference on its golden numbers, in every mode, alone and in a batch."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from score.videoalign import VideoAlign
from score.videoalign.network import BfloatVisionRotary
from score.videoalign.reward import Recent
from score.videoalign.text import chat, read_template
from score.videoalign.video import Request, frame_count, frame_indices, patchify, prepare, resized_shape
from shards.video import load_video
from tests.support.videoalign_fixtures import (  # noqa: F401 - fixtures count as used
    CLIP,
    GOLDEN,
    PREFIX,
    PROMPTS,
    RELEASED,
    build_fixture,
    copied,
    one_thread_fixture,
    source,
    stored_fixture,
    template_fixture,
)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])
def test_golden_scores(case: dict[str, Any], build: Callable[..., VideoAlign]) -> None:
    asked = {key: case[key] for key in ("mode", "step", "fps", "num_frames", "max_pixels")}
    reward = build(batch_size=case["batch"], **asked)
    scores = reward.score_videos([source(name) for name in case["videos"]], [PROMPTS[i] for i in case["prompt_idx"]])
    tolerance = GOLDEN["meta"]["suggested_tolerances"][case["mode"]]
    assert len(scores) == len(case["raw"])
    for found, raw, normalised in zip(scores, case["raw"], case["normalised"], strict=True):
        assert set(found) == set(VideoAlign.components)
        for dimension in ("VQ", "MQ", "TA"):
            assert found[f"{dimension}_raw"] == pytest.approx(raw[dimension], abs=tolerance)
            assert found[dimension] == pytest.approx(normalised[dimension], abs=tolerance)
        assert found["Overall_raw"] == found["VQ_raw"] + found["MQ_raw"] + found["TA_raw"]
        assert found["Overall"] == pytest.approx(normalised["Overall"], abs=3 * tolerance)


def test_modes_differ_more_than_the_tolerance() -> None:
    cases = {case["id"]: case["raw"][0] for case in GOLDEN["cases"]}
    by_mode = [cases[name]["TA"] for name in ("fp32_single_v1", "roundedrope_single_v1", "officialrope_single_v1")]
    assert min(abs(a - b) for a in by_mode for b in by_mode if a != b) > 10 * 5e-4  # so the golden test can tell them


def test_pixels_and_tokens_are_the_reference_s_bit_for_bit(build: Callable[..., VideoAlign], template: str) -> None:
    for name in ("v0", "v1"):
        golden = GOLDEN["intermediates"][name]
        video = source(golden["video"])
        frames, rate = video if isinstance(video, tuple) else load_video(video)
        clip = prepare(frames, rate, RELEASED)
        assert clip.grid == tuple(golden["video_grid_thw"][0])
        assert hashlib.sha256(clip.patches.numpy().tobytes()).hexdigest() == golden["pixel_values_videos_sha256"]
        text = chat(read_template(template), PROMPTS[golden["prompt_idx"]], clip.tokens)
        assert build().tokenizer.encode(text) == golden["input_ids"]
        one = chat(read_template(template), PROMPTS[golden["prompt_idx"]], 1)
        assert hashlib.sha256(one.encode()).hexdigest() == golden["chat_text_sha256"]


def test_container_states_the_rate_of_a_file() -> None:
    golden = GOLDEN["intermediates"]["v1"]
    frames, rate = load_video(CLIP)
    assert rate == golden["video_fps"]
    assert hashlib.sha256(frames.tobytes()).hexdigest() == golden["all_frames_sha256_rgb24"]


def test_frames_sampled_are_the_reference_s() -> None:
    for total, rate, request, count, indices in GOLDEN["sampling_table"]["rows"]:
        assert frame_count(total, rate, Request(request["fps"], None, 200704)) == count
        assert indices in (None, frame_indices(total, count))


@pytest.mark.parametrize(("asked", "count"), [(5, 4), (7, 8), (2, 2), (3, 4), (100, 10)])
def test_number_of_frames_rounds_ties_to_the_even_pair(asked: int, count: int) -> None:
    assert frame_count(10, 16.0, Request(2.0, asked, 200704)) == count


def test_sizes_are_the_reference_s() -> None:
    for height, width, max_pixels, resized in GOLDEN["resize_table"]["rows"]:
        assert resized_shape(height, width, max_pixels) == tuple(resized)
    assert {resized_shape(h, w, 200704) for h, w in ((480, 832), (720, 1280), (544, 960))} == {(336, 588)}
    assert resized_shape(64, 64, 50_000) == (336, 336)  # below the minimum the maximum does not count


@given(st.integers(2, 2000), st.floats(1, 120), st.floats(0.1, 60))
def test_sampling_is_even_and_spans_the_video(total: int, rate: float, fps: float) -> None:
    count = frame_count(total, rate, Request(fps, None, 200704))
    indices = frame_indices(total, count)
    assert count % 2 == 0
    assert 2 <= count <= min(768, total)
    assert (indices[0], indices[-1], len(set(indices))) == (0, total - 1, count)
    assert indices == sorted(indices)


@given(st.integers(20, 3000), st.integers(20, 3000))
def test_sizes_are_whole_tokens_within_the_limits(height: int, width: int) -> None:
    high, wide = resized_shape(height, width, 200704)
    assert high % 28 == wide % 28 == 0
    assert high * wide <= 200704 or (height * width < 100352)
    assert high * wide >= 100352 or high * wide >= 0.6 * 100352


@settings(max_examples=20)
@given(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3))
def test_patches_of_a_token_lie_together(pairs: int, rows: int, columns: int) -> None:
    frames = torch.arange(pairs * 2 * 3 * rows * 28 * columns * 28.0).view(pairs * 2, 3, rows * 28, columns * 28)
    cut = patchify(frames).view(pairs, rows, columns, 2, 2, 3, 2, 14, 14)
    assert torch.equal(cut[-1, -1, -1, 1, 0, 2, 1], frames[-1, 2, -14:, -28:-14])  # lower left patch, blue, last frame


def test_batch_equals_single(build: Callable[..., VideoAlign]) -> None:
    short = np.random.default_rng(0).integers(0, 256, (6, 96, 160, 3), dtype=np.uint8), 8.0
    videos, prompts = [short, CLIP, source("v0")], PROMPTS[2:5]
    together = build(batch_size=3).score_videos(videos, prompts)
    alone = build(batch_size=1).score_videos(videos, prompts)
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert abs(together[0]["TA"] - together[1]["TA"]) > 0.01


def test_rotary_of_the_vision_tower_rounds_every_step() -> None:
    positions = torch.tensor([[3, 5], [40, 41]])
    inv_freq = torch.tensor([1.0, 0.3])
    cos, sin = BfloatVisionRotary(inv_freq)(torch.zeros(1), positions)
    angle = (positions[1, 1].bfloat16() * inv_freq[1].bfloat16()).bfloat16()
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (2, 8)
    assert cos[1, 3] == cos[1, 7] == angle.cos().float()
    assert sin[1, 0] == (positions[1, 0].bfloat16()).sin().float()


def test_vq_and_mq_are_kept_over_prompts(build: Callable[..., VideoAlign], monkeypatch: pytest.MonkeyPatch) -> None:
    reward = build(batch_size=2, fps=1.5)
    seen: list[bytes] = []
    see = reward.network.see
    monkeypatch.setattr(reward.network, "see", lambda clip: seen.append(clip.digest) or see(clip))
    scores = reward.score_videos([CLIP] * 3, PROMPTS[:3])
    reward.network.rm_head.weight.mul_(2)  # what is computed from here on shows it
    again = reward.score_videos([CLIP], PROMPTS[:1])[0]
    assert len(seen) == 1
    assert len({(s["VQ_raw"], s["MQ_raw"]) for s in (*scores, again)}) == 1
    assert len({s["TA_raw"] for s in scores}) == 3
    assert again["TA_raw"] == pytest.approx(2 * scores[0]["TA_raw"], abs=1e-4)


def test_other_frames_are_another_video(build: Callable[..., VideoAlign]) -> None:
    frames, rate = source("v0")
    first, second = build().score_videos([(frames, rate), (frames[::-1].copy(), rate)], PROMPTS[:1] * 2)
    assert abs(first["VQ"] - second["VQ"]) > 1e-3


def test_recent_forgets_the_oldest() -> None:
    recent: Recent[int] = Recent(2)
    recent.keep("a", 1), recent.keep("b", 2), recent.get("a"), recent.keep("c", 3)
    assert [recent.get(key) for key in "abc"] == [1, None, 3]


def test_without_normalisation(build: Callable[..., VideoAlign]) -> None:
    scores = build(use_norm=False).score_videos([source("v0")], PROMPTS[:1])[0]
    assert all(scores[name] == scores[f"{name}_raw"] for name in ("VQ", "MQ", "TA", "Overall"))


def test_no_constants_means_no_normalisation_and_is_said(
    tmp_path: Path, build: Callable[..., VideoAlign], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = copied(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "model_config.json").read_text())
    del config["inference_config"]
    (tmp_path / "c" / "model_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        scores = build(checkpoint=checkpoint).score_videos([source("v0")], PROMPTS[:1])[0]
    assert scores["VQ"] == scores["VQ_raw"] == pytest.approx(GOLDEN["cases"][0]["raw"][0]["VQ"], abs=5e-4)
    assert caplog.messages == [f"{checkpoint}/model_config.json has no inference_config: scores are not normalised"]


def test_head_of_three_reads_its_diagonal(
    tmp_path: Path, build: Callable[..., VideoAlign], stored: dict[str, torch.Tensor]
) -> None:
    head = stored[f"{PREFIX}rm_head.weight"]
    weights = stored | {f"{PREFIX}rm_head.weight": torch.cat([head, 2 * head, -head])}
    checkpoint = copied(tmp_path / "c", weights, model_config__output_dim=3)
    scores = build(checkpoint=checkpoint).score_videos([source("v0")], PROMPTS[:1])[0]
    raw = GOLDEN["cases"][0]["raw"][0]
    assert [scores["VQ_raw"], scores["MQ_raw"], scores["TA_raw"]] == pytest.approx(
        [raw["VQ"], 2 * raw["MQ"], -raw["TA"]], abs=1e-3
    )
