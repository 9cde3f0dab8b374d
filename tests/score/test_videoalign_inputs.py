"""VideoAlign as a reward: its options, and the prompts, videos and templates it refuses."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from score.reward import Video, choose
from score.videoalign import VideoAlign
from score.videoalign.reward import score_videos
from score.videoalign.text import TEMPLATE_SHA256, read_template
from score.videoalign.video import Request
from shards.errors import UserError
from shards.video import load_video
from tests.support.videoalign_fixtures import (  # noqa: F401 - fixtures count as used
    CLIP,
    DATA,
    GOLDEN,
    PREFIX,
    PROMPTS,
    STEP,
    TEMPLATE_HINT,
    build_fixture,
    copied,
    fails,
    one_thread_fixture,
    source,
    stored_fixture,
    template_fixture,
    write_video,
)


def test_as_a_reward(build: Callable[..., VideoAlign], template: str) -> None:
    options = {"checkpoint": str(DATA / "checkpoint"), "base_model": str(DATA / "base_model"), "template": template}
    chosen = choose("score.videoalign:VideoAlign", options)
    assert chosen.components == VideoAlign.components
    assert chosen.components[0] == "Overall"
    assert chosen.neutral == ("device", "batch_size")
    frames, rate = load_video(CLIP)
    video = Video("i000000-p000000-s00", frames, PROMPTS[1], fps=rate)
    scored = build()([video, Video("other", frames, PROMPTS[1], fps=2 * rate)])
    assert scored[0].components == pytest.approx(build().score_videos([CLIP], PROMPTS[1:2])[0], abs=1e-5)
    assert scored[1].components["VQ"] != scored[0].components["VQ"]  # other frames were sampled


def test_score_that_is_not_finite_is_missing(
    tmp_path: Path, build: Callable[..., VideoAlign], stored: dict[str, torch.Tensor]
) -> None:
    head = f"{PREFIX}rm_head.weight"
    reward = build(checkpoint=copied(tmp_path / "c", stored | {head: stored[head] * math.inf}))
    frames, rate = source("v0")
    scored = reward([Video("key", frames, "A dog.", fps=rate)])
    assert (scored[0].components, scored[0].reason) == ({}, "score is not finite")
    with pytest.raises(UserError, match=r"^video 0: a score is not finite: "):
        reward.score_videos([(frames, rate)], ["A dog."])


def test_options_may_come_as_text(build: Callable[..., VideoAlign]) -> None:
    reward = build(step="11352", batch_size="2", use_norm="false", num_frames="6", max_pixels="150528")
    assert (reward.batch_size, reward.norm, reward.request) == (2, {}, Request(2.0, 6.0, 150528))
    assert reward.checkpoint.folder.name == STEP


def test_a_configuration_may_ask_for_frames_instead_of_a_rate(tmp_path: Path, build: Callable[..., VideoAlign]) -> None:
    reward = build(checkpoint=copied(tmp_path / "c", data_config__num_frames=8, data_config__fps=None))
    assert reward.request.num_frames == 8
    assert build(checkpoint=str(tmp_path / "c"), num_frames=6).request.num_frames == 6


def test_one_call_from_files_to_scores(template: str) -> None:
    options = {"checkpoint": DATA / "checkpoint" / STEP, "base_model": DATA / "base_model", "template": template}
    scores = score_videos([str(CLIP)], PROMPTS[1:2], mode="official_rope_float32_math", **options)
    golden = next(case for case in GOLDEN["cases"] if case["id"] == "officialrope_single_v1")
    assert scores[0]["TA_raw"] == pytest.approx(golden["raw"][0]["TA"], abs=5e-4)
    assert VideoAlign(**options).mode == VideoAlign(**options, mode="official_rope_float32_math").mode


@pytest.mark.parametrize(
    ("options", "problem", "hint"),
    [
        (
            {"mode": "bfloat61"},
            "videoalign has no mode 'bfloat61'",
            "did you mean 'bfloat16'? there are float32, bfloat16_weights_float32_math, official_rope_float32_math, "
            "bfloat16",
        ),
        ({"device": "tpx"}, "there is no device 'tpx' here", "give the reward auto, cpu, cuda or cuda:N for `device`"),
        (
            {"batch_size": 0},
            "videoalign: batch_size is 0, not a positive number",
            "give batch_size a number above 0",
        ),
        ({"fps": "two"}, "videoalign: fps is 'two', not a positive number", "give fps a number above 0"),
        ({"fps": -1.0}, "videoalign: fps is -1.0, not a positive number", "give fps a number above 0"),
        (
            {"max_pixels": 1.5},
            "videoalign: max_pixels is 1.5, not a positive number",
            "give max_pixels a number above 0",
        ),
        (
            {"fps": 2.0, "num_frames": 8},
            "videoalign takes fps or num_frames, not both",
            "drop one; the checkpoint says None",
        ),
        (
            {"use_norm": "maybe"},
            "videoalign: use_norm is 'maybe', neither true nor false",
            "write use_norm = true or false",
        ),
        (
            {"step": "last"},
            "videoalign: step is 'last', not the number of a checkpoint",
            "leave it out for the newest",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options: dict[str, Any], problem: str, hint: str, build: Callable[..., VideoAlign]) -> None:
    fails(lambda: build(**options), problem, hint)


def test_prompt_with_a_special_token(build: Callable[..., VideoAlign]) -> None:
    for token in ("<|VQ_reward|>", "<|video_pad|>", "<|TA_reward|>", "<|im_end|>", "<|endoftext|>"):
        fails(
            lambda token=token: build().score_videos([CLIP], [f"A dog {token} runs."]),
            f"{CLIP}: the prompt holds the special token {token}",
            "remove it from the prompt",
        )
    fails(
        lambda: build()([Video("i000000-p000000-s00", np.zeros((4, 64, 64, 3), np.uint8), "<|MQ_reward|>")]),
        "i000000-p000000-s00: the prompt holds the special token <|MQ_reward|>",
        "remove it from the prompt",
    )


def test_videos_it_cannot_take(tmp_path: Path, build: Callable[..., VideoAlign]) -> None:
    frames = np.zeros((4, 64, 64, 3), np.uint8)

    def check(video: Any, problem: str, hint: str, **options: Any) -> None:
        fails(lambda: build(**options).score_videos([video], ["A dog."]), problem, hint)

    one = write_video(tmp_path / "one.mp4", 1)
    check(one, f"{one} has 1 frame, VideoAlign needs at least 2", "score videos, not images")
    check(
        (frames[:1], 16.0), "video 0 has 1 frame, VideoAlign needs at least 2", "score videos, not images", num_frames=2
    )
    check((frames, None), "video 0 has no frame rate", "give the true frames per second of the video")
    check((frames, 0.0), "video 0 has no frame rate", "give the true frames per second of the video")
    check(frames, "video 0 is neither a file nor frames with a frame rate", "give (frames, fps)")
    shape = "not uint8 [T, H, W, 3]"
    check((frames / 255, 8.0), f"video 0: frames are float64 [4, 64, 64, 3], {shape}", "give RGB frames from 0 to 255")
    moved = frames.transpose(0, 3, 1, 2)
    check((moved, 8.0), f"video 0: frames are uint8 [4, 3, 64, 64], {shape}", "give RGB frames from 0 to 255")
    check((frames[:3], 8.0), "video 0 has 3 frames and num_frames = 4 would take all of them, an odd number",
          "ask for num_frames = 2 or fewer", num_frames=4)  # fmt: skip
    check((frames, 8.0), "num_frames = 1 takes fewer than 2 frames", "ask for 2 or more", num_frames=1)
    wide = np.zeros((4, 2, 402, 3), np.uint8)
    check((wide, 8.0), "video 0 is 402x2: one side is more than 200 times the other", "crop it")
    check((frames, 8.0), "video 0 is 64x64 and max_pixels = 1000 would make it 28x28",
          "leave max_pixels at the checkpoint's own value", max_pixels=1000)  # fmt: skip


def test_files_it_cannot_read(tmp_path: Path) -> None:
    fails(lambda: load_video("no.mp4"), "no video file at no.mp4", "give the path of an existing file")
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    with pytest.raises(UserError) as caught:
        load_video(text)
    assert caught.value.problem.startswith(f"{text} cannot be decoded as a video: ")
    assert caught.value.hint == "write the file again"
    timeless = write_video(tmp_path / "timeless.nut", 4, codec="mpeg4")
    fails(
        lambda: load_video(timeless),
        f"{timeless} states no frame rate",
        "write the video with its true frames per second",
    )
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    fails(lambda: load_video(sound), f"{sound} holds no video stream", "give a video file")


def test_one_prompt_for_each_video(build: Callable[..., VideoAlign]) -> None:
    hint = "give one prompt for each video"
    fails(lambda: build().score_videos([CLIP], ["a", "b"]), "there are 1 videos and 2 prompts", hint)
    fails(lambda: build().score_videos([CLIP] * 3, "abc"), "there are 3 videos and 1 prompts", hint)
    assert build().score_videos([], []) == []


def test_template_of_a_checkout_is_parsed_and_never_run(template: str, tmp_path: Path) -> None:
    text = Path(template).read_text()
    code = f"import nowhere\nX = 1\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = {text!r}\nraise SystemExit('was run')\n"
    (tmp_path / "prompt_template.py").write_text(code)
    assert read_template(tmp_path) == read_template(tmp_path / "prompt_template.py") == text


def test_other_template_is_accepted_with_one_warning(
    template: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(Path(template).read_text().rstrip("\n"))
    digest = hashlib.sha256(other.read_bytes()).hexdigest()
    with caplog.at_level(logging.WARNING):
        assert read_template(other) == read_template(other) == other.read_text()
        read_template(template)
    assert caplog.messages == [
        f"{other}: this is not the released prompt template (sha256 {digest}, released {TEMPLATE_SHA256}); scores will "
        "differ from the released model's. Blanks at line ends and the outer line ends belong to it."
    ]


def test_templates_that_cannot_serve(tmp_path: Path) -> None:
    def check(name: str, text: str, problem: str, hint: str = TEMPLATE_HINT) -> None:
        (tmp_path / name).write_text(text)
        fails(lambda: read_template(tmp_path / name), f"{tmp_path / name}{problem}", hint)

    order = "<|VQ_reward|>, <|MQ_reward|>, {text_prompt}, <|TA_reward|>"
    good = order.replace(", ", " ")
    wrong = f": the template must hold {order} once each, in this order"
    check("a.txt", good.replace("{text_prompt}", ""), wrong)
    check("b.txt", f"{good} <|VQ_reward|>", wrong)
    check("c.txt", "{text_prompt} <|VQ_reward|> <|MQ_reward|> <|TA_reward|>", wrong)
    check("d.txt", f"{good} {{dimension_name}}", wrong)
    check("e.txt", f"{good} }}", ": the template is not a format string: Single '}' encountered in format string")
    checkout = "take the file from a VideoAlign checkout"
    check("f.py", "X = 'x'", " assigns no string to DETAILED_PROMPT_WITH_SPECIAL_TOKEN", checkout)
    check("g.py", "DETAILED_PROMPT_WITH_SPECIAL_TOKEN = open('x')",
          " assigns no string to DETAILED_PROMPT_WITH_SPECIAL_TOKEN", checkout)  # fmt: skip
    check("h.py", "def", " is not Python: invalid syntax (<unknown>, line 1)", checkout)
    fails(
        lambda: read_template(tmp_path / "none.txt"),
        f"cannot read VideoAlign's prompt template at {tmp_path}/none.txt: "
        f"[Errno 2] No such file or directory: '{tmp_path}/none.txt'",
        "give `template` the folder of a VideoAlign checkout, or a text file that holds the template",
    )
