"""The OCR reward on drawn frames, with the real networks; EasyOCR's own reader is what ours is compared with."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from score.ocr import OCR, networks
from score.ocr.networks import WEIGHTS, load_networks, weights_folder
from score.ocr.reading import TextReader
from score.ocr.reading_order import reading_order, tilt
from score.ocr.reward import as_uint8
from score.process import judge_all
from score.reward import Video
from shards.errors import UserError

WHITE, BLUE = (255, 255, 255), (20, 20, 60)
PROMPT = 'A sign that reads "FILM"'


def draw(*words: tuple[str, int, int], size: int = 18, shape: tuple[int, int] = (32, 64), **colours: Any) -> Any:
    """One frame [H, W, 3] with words at (text, x, y)."""
    image = Image.new("RGB", shape[::-1], colours.get("back", BLUE))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for text, x, y in words:
        pen.text((x, y), text, font=font, fill=colours.get("ink", WHITE))
    return np.asarray(image)


def video(frames: Sequence[Any], prompt: str = PROMPT, target: str | None = None) -> Video:
    return Video("i000000-p000000-s00", np.stack(list(frames)), prompt, target)


@pytest.fixture(scope="session")
def reader() -> TextReader:
    load_networks()
    return TextReader()


FILM = draw(("FILM", 8, 5))
FRAMES = [draw((word, 6, 5)) for word in ("FILM", "OPEN", "GATE", "SALE")]


@pytest.fixture(scope="session")
def plain_reader(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """EasyOCR as it comes, its custom networks in a folder of the test."""
    import easyocr

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantize_dynamic.*|.*torch.ao.quantization.*|.*migrate.*")
        return easyocr.Reader(
            ["en"],
            gpu=False,
            quantize=False,
            download_enabled=False,
            verbose=False,
            model_storage_directory=str(weights_folder()),
            user_network_directory=str(tmp_path_factory.mktemp("networks")),
        )


def test_reads_the_same_as_easyocr_frame_by_frame(reader: TextReader, plain_reader: Any) -> None:
    grey = draw(("OPEN", 6, 4), ("NOW", 6, 34), size=20, shape=(64, 96), back=(40, 40, 40))
    slanted = np.asarray(Image.fromarray(draw(("TILTED", 20, 50), size=30, shape=(128, 160))).rotate(12))
    for frame, smallest in ((grey, 5), (slanted, 20), (FRAMES[1], 5)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            expected = plain_reader.readtext(frame, min_size=smallest)
        boxes = reader.read([frame])[0]
        assert [box.text for box in boxes] == [text for _, text, _ in expected] != []
        for box, (corners, _, _) in zip(boxes, expected, strict=True):
            np.testing.assert_allclose(box.corners, np.asarray(corners, dtype=float), atol=1e-6)
    assert [box.confidence for box in reader.read([grey])[0]] == pytest.approx(
        [confidence for _, _, confidence in plain_reader_read(plain_reader, grey)], abs=1e-4
    )


def plain_reader_read(plain_reader: Any, frame: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        return plain_reader.readtext(frame, min_size=5)


def test_many_frames_of_two_sizes_at_once_equal_one_by_one(reader: TextReader) -> None:
    frames = [*FRAMES, draw(("HELLO", 8, 10), size=24, shape=(48, 128))]
    together = reader.read(frames)
    for frame, boxes in zip(frames, together, strict=True):
        alone = reader.read([frame])[0]
        assert [box.text for box in boxes] == [box.text for box in alone] != []
        assert [box.confidence for box in boxes] == pytest.approx([box.confidence for box in alone], abs=1e-4)
    assert reader.lines(frames) == ["FILM", "OPEN", "GATE", "SALE", "HELLO"]


def test_equal_frames_are_read_once(reader: TextReader, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    detect = TextReader._detect_batch
    monkeypatch.setattr(TextReader, "_detect_batch", lambda self, f: (seen.append(len(f)), detect(self, f))[1])
    assert reader.lines([FRAMES[0], FRAMES[1], FRAMES[0].copy(), FRAMES[0]]) == ["FILM", "OPEN", "FILM", "FILM"]
    assert seen == [2]
    almost = FRAMES[0].copy()
    almost[0, 0, 0] += 1
    reader.lines([FRAMES[0], almost])
    assert seen == [2, 2]


def test_grey_is_made_from_rgb(reader: TextReader) -> None:
    # with red and blue exchanged these two colours have the same grey, and nothing can be read
    assert reader.lines([draw(("FILM", 8, 5), ink=(0, 130, 0), back=(0, 0, 255))]) == ["FILM"]


def test_a_full_clip_scores_one_and_keeps_its_text(reader: TextReader) -> None:
    scored = OCR()([video([FILM] * 9)])[0]
    assert scored.text == ["FILM"] * 3
    assert dict(scored.components) == {"similarity": 1, "exact": 1, "positive": 1, "empty": 0, "length_ratio": 1}


def test_blank_frames_count(reader: TextReader) -> None:
    blank = np.zeros_like(FILM)
    scored = OCR()([video([FILM] + [blank] * 8), video([blank])])
    assert [one.components["similarity"] for one in scored] == pytest.approx([1 / 3, 0])
    assert scored[1].components["empty"] == 1


def test_several_videos_together_equal_each_alone(reader: TextReader) -> None:
    videos = [
        video([frame] * 5, f'a "{word}"') for frame, word in zip(FRAMES, ("FILM", "OPAN", "GA", "X"), strict=True)
    ]
    together = OCR()(videos)
    assert [one.components for one in together] == [OCR()([each])[0].components for each in videos]
    assert [one.components["similarity"] for one in together] == [1.0, 0.75, 0.0, 0.0]


def test_a_prompt_without_target_has_no_score_and_a_reason(reader: TextReader) -> None:
    scored = OCR()([video([FILM], "no text wanted"), video([FILM])])
    assert scored[0].reason == "the prompt has no quoted text"
    assert not scored[0].components
    assert scored[1].components["similarity"] == 1


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (1, {}, [0]),
        (5, {}, [0, 4]),
        (6, {}, [0, 4]),
        (33, {"max_frames": 3}, [0, 16, 32]),
        (7, {"interval": 3}, [0, 3, 6]),
        (21, {"mode": "flow_grpo_image"}, [0]),
        (3, {"interval": 1, "max_frames": 1}, [0]),
    ],
)
def test_which_frames_are_read(count: int, options: dict[str, Any], expected: list[int]) -> None:
    assert OCR(**options).pick(count) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"interval": 0}, "interval is 0"),
        ({"max_frames": -1}, "max_frames is -1"),
        ({"min_size": -5}, "min_size is -5"),
        ({"canvas_size": 0}, "canvas_size is 0"),
        ({"batch_pixels": 0}, "batch_pixels is 0"),
        ({"min_confidence": 1.0}, "min_confidence is 1"),
        ({"min_confidence": -0.1}, "min_confidence is -0.1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        OCR(**options)


def test_floating_and_channel_first_frames_are_the_same_video() -> None:
    frames = np.arange(256, dtype=np.uint8).repeat(6).reshape(2, 16, 16, 3)
    floating = frames.astype(np.float32) / 255
    np.testing.assert_array_equal(as_uint8(floating), frames)
    np.testing.assert_array_equal(as_uint8(floating - np.float32(0.001)), frames)  # rounded, not cut
    np.testing.assert_array_equal(as_uint8(floating.transpose(0, 3, 1, 2)), frames)
    floating[0, 0, 0], floating[0, 0, 1] = 1.01, -0.01
    assert as_uint8(floating)[0, 0, :2].tolist() == [[255] * 3, [0] * 3]
    assert (as_uint8(floating)[1] == frames[1]).all()


@pytest.mark.parametrize(
    "frames",
    [np.zeros((1, 4, 4, 4)), np.zeros((4, 4, 3)), np.full((1, 4, 4, 3), 200.0), np.full((1, 4, 4, 3), np.nan)],
)
def test_other_arrays_are_refused(frames: Any) -> None:
    with pytest.raises(ValueError, match="frames"):
        as_uint8(frames)


def test_overshoot_does_not_blacken_a_clip(reader: TextReader) -> None:
    frames = np.stack([FILM]).astype(np.float32) / 255
    frames[0, 0, 0, 0] = 1.0001
    scored = OCR()([Video("k", frames, PROMPT)])[0]  # type: ignore[arg-type]
    assert scored.components["similarity"] == 1


def boxes_of(words: Sequence[tuple[float, float, float, float]], degrees: float = 0.0) -> list[Any]:
    """Corners of upright boxes (x, y, width, height), turned about the origin."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return [np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]], dtype=float) @ turn for x, y, w, h in words]


JITTERED = [(200, 6, 60, 20), (0, 4, 80, 20), (100, 0, 70, 22), (0, 40, 90, 20), (110, 36, 50, 20)]


@pytest.mark.parametrize("degrees", [0, 4, -4, 10, 20, -20])
def test_jittered_and_tilted_lines_are_read_in_order(degrees: float) -> None:
    boxes = boxes_of(JITTERED, degrees)
    assert reading_order(boxes) == [1, 2, 0, 3, 4]
    assert tilt(boxes) == pytest.approx(np.deg2rad(degrees))


def test_reading_order_of_little() -> None:
    assert reading_order([]) == []
    assert reading_order(boxes_of([(0, 0, 5, 9)])) == [0]
    assert reading_order(boxes_of([(0, 30, 8, 20), (0, 0, 8, 20)])) == [1, 0]  # two tall letters: no angle


def test_a_tilted_line_scores_fully(reader: TextReader) -> None:
    level = draw(("OPEN", 20, 70), ("NOW", 160, 70), size=34, shape=(160, 288))
    words = video([np.asarray(Image.fromarray(level).rotate(10, resample=Image.Resampling.BICUBIC))], '"OPEN NOW"')
    assert OCR()([words])[0].components["similarity"] == 1
    assert OCR(mode="flow_grpo_video")([words])[0].text == ["NOW OPEN"]


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match="no mode 'strict'"):
        OCR(mode="strict")
    with pytest.raises(UserError, match="interval"):
        OCR(interval=0)


@pytest.mark.parametrize("device", ["tpx", "cuda:64"])
def test_a_device_that_is_not_there_ends_the_stage_and_is_no_missing_reward(device: str) -> None:
    video = Video("one", np.zeros((1, 32, 64, 3), np.uint8), 'a sign "A"')
    with pytest.raises(UserError, match=rf"^there is no device '{device}' here \(hint: give the reward auto, "):
        judge_all(OCR(device=device), [video], OCR.components)


def test_altered_and_missing_weights_are_refused(tmp_path: Path) -> None:
    name = "english_g2.pth"
    with pytest.raises(UserError, match=name):
        networks.english_weights(tmp_path, name)
    data = bytearray((weights_folder() / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=WEIGHTS[name][:12]):
        networks.english_weights(tmp_path, name)


def test_loading_leaves_nothing_behind(reader: TextReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    program = "import os, score.ocr.networks as n; n.load_networks(); print(os.environ.get('LRU_CACHE_CAPACITY'))"
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("LRU_CACHE_CAPACITY", None)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    assert not (tmp_path / ".EasyOCR").exists()


def test_bfloat16_detector_reads_the_same_clear_text(reader: TextReader) -> None:
    assert TextReader(detector_bf16=True).lines(FRAMES[:2]) == ["FILM", "OPEN"]
