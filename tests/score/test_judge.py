"""`rushes judge`: what it prints of a video file, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cli
from score.judge import json_line, judge, parse_reward
from score.reward import Scored, Video
from shards.errors import UserError
from shards.video import encode_mp4
from tests.score.test_ocr import FRAMES
from tests.support.videoalign_fixtures import CLIP, DATA, GOLDEN, PROMPTS, template_fixture  # noqa: F401 - a fixture

OWN = f"{__name__}:Length"
Judge = Callable[..., tuple[int, list[dict[str, Any]], str]]


class Length:
    """Frames, frame rate and words of the prompt; fails on videos of one frame."""

    name, version, components = "length", "1", ("frames", "fps", "words")

    def __init__(self, scale: float = 1.0, note: str = "") -> None:
        self.scale, self.note = scale, note

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        return [self.one(video) for video in videos]

    def one(self, video: Video) -> Scored:
        if len(video.frames) == 1:
            raise ValueError("a picture")
        number = len(video.frames) * self.scale
        return Scored({"frames": number, "fps": video.fps, "words": float(len(video.prompt.split()))})


@pytest.fixture
def rushes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Judge:
    """Run `rushes judge` in this process: exit code, the lines on stdout, and what stderr says."""

    def run(*arguments: str | Path) -> tuple[int, list[dict[str, Any]], str]:
        monkeypatch.setattr(sys, "argv", ["rushes", "judge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        code = ended.value.code
        return int(code or 0), [json.loads(line) for line in captured.out.splitlines()], captured.err

    return run


def write(path: Path, frames: int = 5, fps: int = 12) -> Path:
    """A small video file."""
    pixels = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 9 + np.zeros((1, 32, 64, 3), np.uint8)
    path.write_bytes(encode_mp4(pixels, fps))
    return path


@pytest.mark.parametrize("name", ["fp32_single_v1", "fp32_fps8", "roundedrope_single_v1"])
def test_golden_numbers_through_the_command_line(rushes: Judge, template: str, name: str) -> None:
    case = next(case for case in GOLDEN["cases"] if case["id"] == name)
    options = (
        f"checkpoint={DATA / 'checkpoint'},base_model={DATA / 'base_model'},template={template},mode={case['mode']}"
    )
    options += f",fps={case['fps']}" if case["fps"] else ""
    code, lines, _ = rushes(CLIP, "--prompt", PROMPTS[case["prompt_idx"][0]], "--reward", f"videoalign:{options}")
    assert (code, len(lines)) == (0, 1)
    assert (lines[0]["file"], lines[0]["fps"], lines[0]["frames"]) == (str(CLIP), 16.0, 81)
    verdict = lines[0]["rewards"][0]
    assert (verdict["reward"], verdict["status"]) == ("videoalign", "ok")
    for dimension in ("VQ", "MQ", "TA"):
        assert verdict["components"][dimension] == pytest.approx(case["normalised"][0][dimension], abs=5e-4)
        assert verdict["components"][f"{dimension}_raw"] == pytest.approx(case["raw"][0][dimension], abs=5e-4)
    assert verdict["value"] == verdict["components"]["Overall"]
    assert len(verdict["frames_used"]) == (40 if case["fps"] else 10)
    assert verdict["frames_used"][-1] == 80


def test_ocr_prints_the_text_of_each_frame_with_its_confidence(rushes: Judge, tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(encode_mp4(np.stack([FRAMES[0]] * 5 + [FRAMES[1]] * 4), 16, crf=1))
    code, lines, _ = rushes(path, "--prompt", 'a sign "FILM"', "--reward", "ocr")
    assert code == 0
    verdict = lines[0]["rewards"][0]
    assert verdict["frames_used"] == [0, 4, 8]
    assert [(item["frame"], item["text"]) for item in verdict["text"]] == [(0, "FILM"), (4, "FILM"), (8, "OPEN")]
    assert all(0.5 < item["confidence"] <= 1 for item in verdict["text"])
    assert verdict["components"]["exact"] == pytest.approx(2 / 3)
    assert verdict["value"] == verdict["components"]["similarity"]


class Reader:
    """Says what its option names, in the types that a user's own reward may well give."""

    name, version, components = "reader", "1", ("value",)

    def __init__(self, says: str) -> None:
        self.scored = {
            "numpy": Scored({"value": np.float32(0.5)}, np.array(["A"]), "", None, np.float32([0.25]), np.array([1])),
            "huge": Scored({"value": -2e100}),
            "unequal": Scored({"value": 1.0}, ["A", "B"], confidence=[0.5]),
            "unsure": Scored({"value": 1.0}, ["A"], confidence=[math.nan]),
            "both": Scored(reason="ill", text=["A", "B"], confidence=[0.5]),
        }[says]

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        return [self.scored for _ in videos]


def test_numpy_and_line_separators_are_plain_in_the_line(rushes: Judge, tmp_path: Path) -> None:
    options = ("--prompt", "two\u2028lines", "--reward", f"{__name__}:Reader:says=numpy")
    code, lines, _ = rushes(write(tmp_path / "a.mp4"), *options)
    assert [line["prompt"] for line in lines] == ["two\u2028lines"]
    verdict = lines[0]["rewards"][0]
    assert (code, verdict["value"], verdict["frames_used"]) == (0, 0.5, [1])
    assert verdict["text"] == [{"frame": 1, "text": "A", "confidence": 0.25}]


@pytest.mark.parametrize(
    ("says", "status", "text"),
    [
        ("huge", "value is -2e+100, more than 1e+100", None),
        ("unequal", "there are 2 texts, 1 confidences and 2 frames", ["A", "B"]),
        ("unsure", "a confidence is not a number", ["A"]),
        ("both", "ill", ["A", "B"]),
    ],
)
def test_a_score_that_cannot_be_kept_is_missing(
    rushes: Judge, tmp_path: Path, says: str, status: str, text: list[str] | None
) -> None:
    options = ("--prompt", "p", "--reward", f"{__name__}:Reader:says={says}")
    code, lines, _ = rushes(write(tmp_path / "a.mp4"), *options)
    verdict = lines[0]["rewards"][0]
    assert (code, verdict["status"], verdict["value"], verdict.get("text")) == (1, status, None, text)


@pytest.mark.parametrize(
    ("prompt", "encoding", "plain"),
    [
        ("caf\u00e9 \u732b", "utf-8", True),
        ("caf\u00e9 \u732b", "latin-1", False),
        ("caf\u00e9", "latin-1", True),
        ("a line\u2028and another", "utf-8", False),
        ("an odd byte \udcff", "utf-8", False),
        ("in a StringIO \u732b", None, True),
    ],
)
def test_a_record_is_one_line_in_any_encoding(prompt: str, encoding: str | None, plain: bool) -> None:
    line = json_line({"prompt": prompt}, encoding)
    assert json.loads(line) == {"prompt": prompt}
    assert line.isascii() != plain
    assert len(line.encode(encoding or "utf-8").decode(encoding or "utf-8").splitlines()) == 1


class Wanted:
    """Scores the length of the target it was given, and none without."""

    name, version, components = "wanted", "1", ("length",)

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        return [Scored({"length": float(len(v.target))}) if v.target else Scored(reason="none") for v in videos]


@pytest.mark.parametrize(
    ("prompt", "given", "target"),
    [
        ('a sign "FILM"', [], "FILM"),
        ('a sign "FILM" over a "REEL"', [], "FILM REEL"),
        ('a sign "FILM"', ["--target", "OPEN"], "OPEN"),
        ("a cat", ["--target", "OPEN"], "OPEN"),
        ("a cat", [], None),
        ('a 12" screen', [], None),
    ],
)
def test_the_target_that_is_used_is_printed(
    rushes: Judge, tmp_path: Path, prompt: str, given: list[str], target: str | None
) -> None:
    options = ("--prompt", prompt, *given, "--reward", f"{__name__}:Wanted")
    code, lines, talk = rushes(write(tmp_path / "a.mp4"), *options)
    assert lines[0]["target"] == target
    assert lines[0]["rewards"][0]["value"] == (len(target) if target else None)
    assert code == (0 if target else 1)
    assert ("1 score is missing" in talk) == (not target)


def test_several_videos_prompts_and_rewards(rushes: Judge, tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.mp4", 5, 12), write(tmp_path / "b.mp4", 7, 24)
    options = ("--reward", OWN, "--reward", f"{OWN}:scale=2,note=a,b:c", "--reward", "guards")
    code, lines, _ = rushes(first, second, "--prompt", "one", "--prompt", "one two", *options)
    assert code == 0
    assert [line["prompt"] for line in lines] == ["one", "one two"]
    assert [line["rewards"][0]["components"] for line in lines] == [
        {"frames": 5, "fps": 12, "words": 1},
        {"frames": 7, "fps": 24, "words": 2},
    ]
    assert [line["rewards"][1]["value"] for line in lines] == [10, 14]
    assert lines[0]["rewards"][0]["scorer"] != lines[0]["rewards"][1]["scorer"]
    assert lines[0]["rewards"][0]["frames_used"] == [0, 1, 2, 3, 4]
    assert "text" not in lines[0]["rewards"][0]
    both = rushes(first, second, "--prompt", "one", *options)[1]
    assert [line["prompt"] for line in both] == ["one", "one"]


def test_the_rate_is_that_of_the_container(tmp_path: Path) -> None:
    from fractions import Fraction

    import av

    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(24000, 1001))
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    record = next(judge([path], ["x"], [OWN]))
    assert math.isclose(record["fps"], 24000 / 1001)
    assert record["rewards"][0]["components"]["fps"] == record["fps"]


def test_a_missing_score_has_its_reason_and_exit_code_1(rushes: Judge, tmp_path: Path) -> None:
    code, lines, talk = rushes(
        write(tmp_path / "a.mp4", 1), write(tmp_path / "b.mp4"), "--prompt", "p", "--reward", OWN, "--reward", "motion"
    )
    assert code == 1
    assert [[verdict["status"] for verdict in line["rewards"]] for line in lines] == [
        ["ValueError: a picture", "motion needs 3 frames, the video has 1"],
        ["ok", "ok"],
    ]
    assert lines[0]["rewards"][0]["value"] is None
    assert lines[0]["rewards"][0]["components"] == {"frames": None, "fps": None, "words": None}
    assert "2 scores are missing" in talk


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.mp4", "--reward", "ocr"], "none.mp4: no such file"),
        (["{text}", "--reward", "brightness"], "notes.txt cannot be decoded as a video"),
        (["{video}", "--reward", "orc"], "no reward is called 'orc' (hint: did you mean 'ocr'?"),
        (["{video}", "--reward", "ocr:intervall=2"], "has no option 'intervall' (hint: did you mean 'interval'?"),
        (["{video}", "--reward", "ocr:interval=often"], "option 'interval' is 'often', not a whole number"),
        (["{video}", "--reward", "ocr:interval=0"], "interval is 0"),
        (["{video}", "--reward", "ocr:fold_confusables=maybe"], "is 'maybe', not true or false"),
        (["{video}", "--reward", "ocr:mode"], "--reward ocr:mode: not of the form NAME:option=value"),
        (["{video}", "--reward", "ocr:"], "--reward ocr:: not of the form NAME:option=value"),
        (["{video}", "--reward", "motion:size=9,size=8"], "option 'size' is given twice"),
        (["{video}", "--reward", "clip"], "needs the option 'model'"),
        (
            ["{video}", "{video}", "{video}", "--prompt", "two", "--reward", "ocr"],
            "--prompt is given 2 times for 3 videos",
        ),
        (["{video}", "--target", "A", "--target", "B", "--reward", "ocr"], "--target is given 2 times for 1 videos"),
    ],
)
def test_bad_input_is_named(rushes: Judge, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "notes.txt").write_text("no video")
    places = {"text": str(tmp_path / "notes.txt"), "video": str(write(tmp_path / "a.mp4"))}
    code, lines, talk = rushes(*(argument.format(**places) for argument in arguments), "--prompt", "p")
    assert code == 2
    assert not lines
    assert words in talk
    assert "Traceback" not in talk


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import nothing_of_that_name",
            "No module named 'nothing_of_that_name' (hint: install it, or give the command",
        ),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("1 / 0", "ZeroDivisionError: division by zero (hint: --debug says where)"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_one_line(
    rushes: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    name = f"own_reward_{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    code, _, talk = rushes(write(tmp_path / "a.mp4"), "--prompt", "p", "--reward", f"{name}:Own")
    assert code == 2
    assert f"cannot import {name}: {message}" in talk
    assert talk.count("\n") == 1


def test_names_and_options_are_told_apart() -> None:
    assert parse_reward("ocr").name == "ocr"
    assert parse_reward(OWN).name == OWN
    own = parse_reward(f"{OWN}:scale=0.5,note=x=1, y:2")
    assert (own.name, dict(own.options)) == (OWN, {"scale": 0.5, "note": "x=1, y:2"})
    remote = parse_reward("remote:url=http://host:80/score?a=1,frames=3")
    assert (remote.options["url"], remote.options["frames"]) == ("http://host:80/score?a=1", 3)
    with pytest.raises(UserError, match="no reward is given"):
        judge(["x"], ["p"], [])


def test_prompts_are_cleaned_as_in_a_run(rushes: Judge, tmp_path: Path) -> None:
    """The line shows the prompt as it was given; rewards and the target get it as the text encoder of a run does."""
    options = ("--prompt", "a  &quot;AT&amp;T&quot;\u2028sign", "--reward", f"{OWN}:scale=2")
    _, lines, _ = rushes(write(tmp_path / "a.mp4"), *options)
    assert (lines[0]["prompt"], lines[0]["target"]) == ("a  &quot;AT&amp;T&quot;\u2028sign", "AT&T")
    assert lines[0]["rewards"][0]["components"]["words"] == 3


def test_a_pointer_of_git_lfs_is_no_video(rushes: Judge, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    code, lines, said = rushes(tmp_path / "a.mp4", "--prompt", "a", "--reward", OWN)
    assert (code, lines) == (2, [])
    assert said == (
        f"rushes: {tmp_path}/a.mp4: a Git LFS pointer, not the file itself "
        f"(hint: fetch it: cd {tmp_path} && git lfs pull)\n"
    )
