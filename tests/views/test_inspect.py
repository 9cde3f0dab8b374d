"""`rushes inspect`: questions to the table of samples, and one sample in full."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

import cli
from shards import sidecar
from shards.config import ScoreConfig
from shards.errors import UserError
from shards.inspect import query, sample, table
from shards.reader import open_shard
from shards.run import Stage
from shards.video import decode_mp4
from tests.support.shard_fixtures import advantage_frame, committed_stage, score_frame, write_train_plan


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations and one evaluation, two groups of three each; the reward is the sample number / 10."""
    path = tmp_path_factory.mktemp("inspect") / "run"
    for number, evaluation in ((0, False), (1, False), (0, True)):
        stage = committed_stage(path, number, evaluation=evaluation)
        for shard in stage.shards():
            sidecar.write_scores(stage, shard, "ocr-1a2b3c4d", score_frame(stage, shard), {})
            sidecar.write_advantages(stage, shard, "0123abcd", advantage_frame(stage, shard), {})
    (path / "run.toml").write_text('schema = 1\npreset = "words"\n', encoding="utf-8")
    return path


@pytest.fixture
def frame(run: Path) -> pandas.DataFrame:
    return query.of_kind(table.samples(run), False)


def test_rollouts_and_evaluations_are_told_apart(run: Path) -> None:
    both = table.samples(run)
    assert len(both) == 18
    assert set(query.of_kind(both, False)["kind"]) == {"rollout"}
    assert len(query.of_kind(both, True)) == 6
    with pytest.raises(UserError, match="no evaluations"):
        query.of_kind(both[both["kind"] == "rollout"], True)


def test_a_pipe_or_a_link_is_written_to_and_stays_what_it_is(run: Path, tmp_path: Path) -> None:
    """A rename would put a plain file in place of /dev/stdout."""
    frame = query.select(table.samples(run), columns="key")
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    query.emit(frame, "csv", pipe, io.StringIO())
    assert os.read(end, 2**16).decode() == frame.to_csv(index=False)
    os.close(end)
    assert pipe.is_fifo()
    link.symlink_to(file)
    query.emit(frame, "csv", link, io.StringIO())
    assert link.is_symlink()
    assert file.read_text() == frame.to_csv(index=False)


def add_advantages(stage: Stage, specification: str, advantage: float, weights: dict[str, float], hour: int) -> None:
    """Advantages that are all `advantage`, written at an hour of 1970."""
    for shard in stage.shards():
        frame = advantage_frame(stage, shard).assign(advantage=advantage)
        sidecar.write_advantages(stage, shard, specification, frame, {})
    folder, settings = stage.advantage_dir(specification), ScoreConfig(rewards=weights).specification()
    summary = {"schema": 1, "specification": settings, "samples": 6, "mean_reward": 0.1}
    (folder / "_summary.json").write_text(json.dumps(summary), encoding="utf-8")
    os.utime(folder, (3600 * hour,) * 2)


def test_of_several_advantages_those_that_were_trained_on_are_shown(tmp_path: Path) -> None:
    """Scoring a finished iteration again must not change what its report says it learned from."""
    stage = committed_stage(tmp_path, 0)
    add_advantages(stage, "aaaaaaaa", 1.0, {"ocr": 1.0}, 1)
    add_advantages(stage, "bbbbbbbb", 2.0, {"ocr": 0.5}, 3)
    add_advantages(stage, "cccccccc", 3.0, {"motion": 1.0}, 2)
    (tmp_path / "run.toml").write_text("schema = 1\n[score]\nrewards = { ocr = 1.0 }\n", encoding="utf-8")
    assert set(table.samples(tmp_path)["advantage"]) == {2.0}  # not trained: the newest, which was just asked for
    stage.train_dir.mkdir()
    write_train_plan(stage, "aaaaaaaa")
    assert set(table.samples(tmp_path)["advantage"]) == {1.0}
    write_train_plan(stage, "dddddddd")  # deleted since
    assert set(table.samples(tmp_path)["advantage"]) == {2.0}


def test_of_several_advantages_of_an_evaluation_those_of_the_run_are_shown(tmp_path: Path) -> None:
    """Else a curve over iterations could mix two rewards."""
    stage = committed_stage(tmp_path, 0, evaluation=True)
    add_advantages(stage, "aaaaaaaa", 1.0, {"ocr": 1.0}, 1)
    add_advantages(stage, "bbbbbbbb", 2.0, {"ocr": 0.5}, 2)
    assert set(table.samples(tmp_path)["advantage"]) == {2.0}  # no run.toml to tell
    (tmp_path / "run.toml").write_text("schema = 1\n[score]\nrewards = { ocr = 1.0 }\n", encoding="utf-8")
    assert set(table.samples(tmp_path)["advantage"]) == {1.0}
    (tmp_path / "run.toml").write_text("schema = 1\n[score]\nrewards = { clip = 1.0 }\n", encoding="utf-8")
    assert set(table.samples(tmp_path)["advantage"]) == {2.0}


def test_where_keeps_what_the_condition_says(frame: pandas.DataFrame) -> None:
    found = query.select(frame, "ocr.accuracy > 0.05 and iteration == 1 and target == 'FILM'")
    assert set(found["sample"]) == {1, 2}
    assert set(found["iteration"]) == {1}
    assert len(found) == 4
    assert query.select(frame, "prompt == 'ocr.accuracy'").empty  # a quoted name stays text


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("rewrad > 1", "no column rewrad.*did you mean reward"),
        ("reward", "not a condition"),
        ("reward >", "write a condition"),
        ("prompt < 3", "write a condition"),
        ("@secret > 1", "secret"),
    ],
)
def test_a_wrong_condition_is_explained(frame: pandas.DataFrame, where: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        query.select(frame, where)


def test_sorting_goes_both_ways_and_by_several_columns(frame: pandas.DataFrame) -> None:
    found = query.select(frame, sort="-reward,key", columns="key,reward")
    assert list(found.columns) == ["key", "reward"]
    assert found["reward"].is_monotonic_decreasing
    assert list(found["key"][:4]) == sorted(found["key"][:4])
    with pytest.raises(UserError, match="did you mean reward"):
        query.select(frame, sort="rewards")
    with pytest.raises(UserError, match="did you mean key"):
        query.select(frame, columns="keyy")


def test_grouping_counts_and_averages(frame: pandas.DataFrame) -> None:
    found = query.select(frame, group_by="prompt", columns="prompt,samples,used,missing,reward_mean,ocr.accuracy")
    assert list(found["samples"]) == [6, 6]
    assert list(found["used"]) == [6, 6]
    assert list(found["missing"]) == [0, 0]
    assert found["reward_mean"].to_list() == pytest.approx([0.1, 0.1])
    assert found["ocr.accuracy"].to_list() == pytest.approx([0.1, 0.1])
    assert len(query.select(frame, "sample < 2", group_by="iteration,prompt")) == 4
    with pytest.raises(UserError, match="not a number"):
        query.select(frame, group_by="prompt", columns="host")
    with pytest.raises(UserError, match="cannot group by window"):
        query.select(frame, group_by="window")


class Terminal(io.StringIO):
    """What says that it is one."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_columns_that_fit(
    frame: pandas.DataFrame, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    query.emit(frame, "table", None, terminal := Terminal())
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 90
    assert len(lines) == len(frame) + 1
    assert {"key", "prompt", "reward", "advantage"} <= set(lines[0].split())
    hidden = capsys.readouterr().err.partition(": ")[2].strip().split(", ")
    assert "log_prob" in hidden
    assert not set(hidden) & set(lines[0].split())
    query.emit(frame, "table", None, plain := io.StringIO())
    assert "log_prob" in plain.getvalue().splitlines()[0].split()
    query.emit(frame[["log_prob"]], "table", None, io.StringIO())  # a column of lists may stand alone


def test_every_format_reads_back(frame: pandas.DataFrame, tmp_path: Path) -> None:
    few = frame[["key", "reward"]]
    readers: dict[str, Any] = {
        "csv": pandas.read_csv,
        "parquet": pandas.read_parquet,
        "json": pandas.read_json,
        "jsonl": lambda path: pandas.read_json(path, lines=True),
    }
    for name, read in readers.items():
        out = tmp_path / name
        query.emit(few, name, out, io.StringIO())
        back = read(out)
        assert back["key"].to_list() == few["key"].to_list()
        assert back["reward"].to_list() == few["reward"].to_list()
    printed = io.StringIO()
    query.emit(few, "table", None, printed)
    assert len(printed.getvalue().splitlines()) == 1 + len(few)
    empty = io.StringIO()
    query.emit(few[:0], "table", None, empty)
    assert empty.getvalue() == "key  reward\n"
    with pytest.raises(UserError, match="no such format"):
        query.emit(few, "excel", None, io.StringIO())
    with pytest.raises(UserError, match="needs a file"):
        query.emit(few, "parquet", None, io.StringIO())


def test_json_keeps_every_bit(run: Path) -> None:
    """Seventeen digits, seeds beyond 2^53, lists: what is read back is what was written; NaN is null."""
    frame = table.samples(run).head(2)
    third = 1 / 3 + 1e-16
    frame["reward"] = [third, float("nan")]
    frame["noise_seed"] = [2**63 - 1, 0]
    frame["log_prob"] = [[-third, 1e-300], [float("inf"), float("-inf")]]
    for name in ("json", "jsonl"):
        text = table.write(frame, name).decode()
        rows = json.loads(text) if name == "json" else [json.loads(line) for line in text.splitlines()]
        assert [row["reward"] for row in rows] == [third, None]
        assert [row["noise_seed"] for row in rows] == [2**63 - 1, 0]
        assert [row["log_prob"] for row in rows] == [[-third, 1e-300], ["Infinity", "-Infinity"]]
        assert [row["window"] for row in rows] == frame["window"].to_list()
        assert [*rows[0]] == [*frame]
    assert json.loads(table.write(frame[:0], "json")) == []


def test_the_video_of_a_sample_is_written_as_it_is_stored(run: Path, tmp_path: Path) -> None:
    key, file = "i000001-p000001-s02", tmp_path / "one.mp4"
    cli.app(["inspect", str(run), key, "--video", str(file)], standalone_mode=False)
    assert file.read_bytes() == sample.read_video(run, key)
    assert not (run / "frames" / key).exists()  # which a command without --video writes
    with pytest.raises(UserError, match="--video needs the KEY"):
        cli.app(["inspect", str(run), "--video", str(file)], standalone_mode=False)


def test_one_sample_in_full(run: Path) -> None:
    key = "i000001-p000001-s02"
    found = sample.describe(run, key)
    assert found["record"]["key"] == key
    assert found["record"]["prompt"] == "a cat 1"
    assert found["judgement"] == {"reward": 0.2, "advantage": 1.0, "weight": 1.0, "reason": "", "status": "ok"}
    assert found["scores"] == {"ocr": {"reward": 0.2, "accuracy": 0.2}}
    assert found["text"] == {"ocr": ["FILM"]}
    log_probs = [step["log_prob"] for step in found["steps"]]
    assert log_probs == [None, -1.25, -1.75, None]
    assert [step["expert"] for step in found["steps"]] == ["high_noise", "high_noise", "low_noise", "low_noise"]
    text = sample.show(run, key)
    assert "FILM" in text
    assert "-1.250000" in text
    assert json.loads(sample.show(run, key, "json")) == found


def test_what_was_read_stands_in_words_frame_by_frame(run: Path) -> None:
    found = sample.describe(run, "i000001-p000001-s02")
    readings = [{"frame": 0, "text": "FILM", "confidence": 0.9731}, {"frame": 4, "text": "", "confidence": 0.0}, "bare"]
    lines = sample.to_text(found | {"text": {"ocr": readings}}).splitlines()
    start = lines.index("text read by ocr, one line a frame looked at") + 1
    assert [line.split() for line in lines[start : start + 3]] == [
        ["frame", "0", "FILM", "confidence", "0.97"],
        ["frame", "4", "(nothing)"],
        ["2", "bare"],
    ]


def test_the_frames_are_those_of_the_video(run: Path, tmp_path: Path) -> None:
    key = "i000000-p000000-s01"
    stage, shard = sample.find(run, key)
    with open_shard(stage, shard) as opened:
        expected = decode_mp4(opened.video(key))
    for folder in (None, tmp_path / "frames"):
        written = sample.write_frames(run, key, folder)
        assert [path.name for path in written] == [f"frame-{n:03d}.png" for n in range(5)]
        assert written[0].parent == (folder or run / "frames" / key)
        for path, frame in zip(written, expected, strict=True):
            assert np.array_equal(np.asarray(Image.open(path)), frame)


def test_the_same_key_means_another_sample_in_an_evaluation(run: Path) -> None:
    key = "i000000-p000000-s01"
    assert sample.find(run, key)[0].name == "iter-0000"
    assert sample.find(run, key, evaluation=True)[0].name == "eval/iter-0000"
    assert sample.find(run / "eval" / "iter-0000", key)[0].name == "eval/iter-0000"
    assert sample.write_frames(run, key, evaluation=True)[0].parent == run / "frames" / "eval" / key


@pytest.mark.parametrize("key", ["cat", "i000000-p000000-s03", "i000009-p000000-s00", "i000000-p000007-s00"])
def test_an_unknown_key_is_explained(run: Path, key: str) -> None:
    with pytest.raises(UserError, match=key):
        sample.find(run, key)


def test_control_characters_are_shown_and_data_keeps_them(tmp_path: Path) -> None:
    prompt = "\x1b[31mred\x07 \u202eeslaf"
    stage = committed_stage(tmp_path, prompt=prompt)
    frame = query.select(table.samples(tmp_path), columns="prompt")
    assert b"\\x1b[31mred\\x07 \\u202eeslaf 0" in table.write(frame, "table")
    shown = sample.show(tmp_path, stage.keys(0)[0])
    assert "\\x1b[31mred\\x07 \\u202eeslaf 0" in shown
    for text in (shown, sample.show(tmp_path, stage.keys(0)[0], "json"), table.write(frame, "jsonl").decode()):
        assert not set(text) & set("\x1b\x07\u202e")
    assert json.loads(table.write(frame, "json"))[0]["prompt"] == f"{prompt} 0"
    assert frame["prompt"][0] in table.write(frame, "csv").decode()
