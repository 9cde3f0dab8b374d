"""The scoring stage on real shards: what is missing is scored, failures are missing values, advantages follow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from score import process, tables
from score.guards import Guards, measure
from score.reward import Scored, Video, choose, known, split_name
from score.run import ScoreReport, score
from shards import sidecar
from shards.config import RunConfig, ScoreConfig
from shards.errors import RunFailed, StillBusy, UserError
from shards.run import Run, Stage
from shards.workers.claims import claim
from shards.writer import seal
from tests.support import shard_fixtures

OWN = f"{__name__}:Sample"
FLAKY = f"{__name__}:Flaky"


class Sample:
    """A reward that is the sample number, with a second component; counts how often it is asked."""

    name = "sample"
    version = "1"
    components = ("number", "half")
    calls: list[str] = []  # noqa: RUF012

    def __init__(self, offset: float = 0.0) -> None:
        self.offset = offset

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        Sample.calls += [video.key for video in videos]
        numbers = [float(video.key[-2:]) + self.offset for video in videos]
        return [Scored({"number": number, "half": -number / 2}) for number in numbers]


class Flaky:
    """A reward that fails on some samples: by an exception, by NaN, or by saying so."""

    name = "flaky"
    version = "1"
    components = ("value",)

    def __init__(self, bad: str = "", how: str = "raise") -> None:
        self.bad, self.how = bad.split(), how

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        return [self.one(video) for video in videos]

    def one(self, video: Video) -> Scored:
        if not any(video.key.endswith(bad) for bad in self.bad):
            return Scored({"value": float(video.frames.mean())})
        if self.how == "raise":
            raise RuntimeError("the judge\nis ill")
        return Scored({"value": np.nan}) if self.how == "nan" else Scored(reason="the judge declines")


class Mute:
    """A reward that cannot work at all."""

    name, version, components = "mute", "1", ("value",)

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        raise UserError("no weights here", "install them")


def make(path: Path, *, config: dict[str, Any] | None = None, **plan: Any) -> tuple[Run, Stage]:
    """A run with committed shards, 2 of 3 samples unless `plan` says otherwise."""
    settings = {"rewards": {OWN: 1.0}, "workers": 1} | (config or {})
    run = Run.create(path, RunConfig(score=ScoreConfig(**settings)))
    return run, shard_fixtures.committed_stage(path, **plan)


def files(stage: Stage) -> dict[str, tuple[int, int]]:
    """Every file of the score and advantage folders with its inode and time."""
    found = [p for part in ("score", "advantage") for p in (stage.path / part).rglob("*") if p.is_file()]
    return {str(p.relative_to(stage.path)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


def test_scores_and_advantages_of_a_stage(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run")
    report = score(run, stage)
    assert (report.done, report.skipped, report.pending, report.samples) == ([0, 1], [], [], 6)
    directory = choose(OWN).directory
    assert sorted(sidecar.scorers(stage)) == sorted([directory, choose("guards").directory])
    scores = sidecar.read_scores(stage, directory)
    assert list(scores["reward"]) == [0, 1, 2, 0, 1, 2]
    assert list(scores["half"]) == [0, -0.5, -1, 0, -0.5, -1]
    assert set(scores["status"]) == {"ok"}
    said = sidecar.score_metadata(stage, 1, directory)
    assert said["scorer"] == OWN
    assert float(said["seconds"]) >= 0
    assert int(said["peak_memory_bytes"]) > 2**24  # more than any Python with NumPy takes
    table = sidecar.read_advantages(stage, report.advantages)
    deviation = np.sqrt(2 / 3)
    np.testing.assert_allclose(table["advantage"], np.array([-1, 0, 1] * 2) / deviation)
    assert report.summary is not None
    assert report.summary["groups"] == report.summary["used_groups"] == 2
    assert (report.summary["missing"], report.summary["dropped_no_spread"]) == (0, 0)
    assert report.summary["mean_reward"] == pytest.approx(1)
    assert report.summary["rewards"][OWN]["components"]["half"] == pytest.approx(-0.5)
    assert 0 < report.summary["guards"]["luma"] < 1
    assert report.summary["guards"]["diversity"] > 0


def test_a_second_call_does_nothing_and_says_so(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run")
    first = score(run, stage)
    before, calls = files(stage), len(Sample.calls)
    second = score(run, stage)
    assert second.nothing_done
    assert str(second).startswith("nothing to do: 2 shards scored already, advantages ")
    assert second.summary == first.summary
    assert files(stage) == before
    assert len(Sample.calls) == calls


def test_pandas_reads_every_folder_of_tables(tmp_path: Path) -> None:
    """The summary lies among the advantages; its name keeps it out of sight."""
    run, stage = make(tmp_path / "run")
    report = score(run, stage)
    folders = [stage.index_path(0).parent, stage.advantage_dir(report.advantages)]
    folders += [stage.path / "score" / name for name in sidecar.scorers(stage)]
    keys = [key for shard in stage.shards() for key in stage.keys(shard)]
    assert [path.name for path in folders[1].iterdir() if path.suffix != ".parquet"] == ["_summary.json"]
    for folder in folders:
        assert pd.read_parquet(folder)["key"].tolist() == keys


def test_a_damaged_summary_is_written_again(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run")
    first = score(run, stage)
    path = stage.summary_path(first.advantages)
    before = path.read_bytes()
    path.write_bytes(before[:-9])
    again = score(run, stage)
    assert again.advantages_written
    assert again.summary == first.summary
    assert path.read_bytes() == before


def test_only_what_is_missing_is_scored(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run")
    score(run, stage)
    stage.score_path(choose(OWN).directory, 1).unlink()
    Sample.calls.clear()
    report = score(run, stage)
    assert (report.done, report.skipped) == ([1], [0])
    assert Sample.calls == [f"i000000-p000001-s0{n}" for n in range(3)]


def test_other_options_get_a_folder_of_their_own(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run", config={"options": {OWN: {"offset": 5.0}}})
    first = score(run, stage)
    again = score(Run(tmp_path / "run"), stage, {OWN: 1.0})
    assert again.nothing_done
    assert choose(OWN).directory != choose(OWN, {"offset": 5.0}).directory
    assert list(sidecar.read_scores(stage, choose(OWN, {"offset": 5.0}).directory)["reward"])[:2] == [5, 6]
    assert first.advantages == again.advantages


def test_other_weights_need_no_model_and_no_video(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run")
    first = score(run, stage)
    Sample.calls.clear()
    for shard in stage.shards():  # the videos could not even be read
        stage.shard_path(shard).write_bytes(b"")
    report = score(run, stage, {OWN: -1.0, f"{OWN}.half": 0.0}, advantages_only=True)
    assert str(report).startswith(f"2 shards there already, advantages {report.advantages} written; ")
    assert not Sample.calls
    assert report.advantages != first.advantages
    left, right = (sidecar.read_advantages(stage, one.advantages)["advantage"] for one in (first, report))
    np.testing.assert_allclose(left, -right)
    assert report.advantages_written
    assert score(run, stage, {OWN: -1.0, f"{OWN}.half": 0.0}, advantages_only=True).nothing_done


def test_re_weighting_imports_neither_torch_nor_easyocr(tmp_path: Path) -> None:
    config = {"rewards": {"brightness": 1.0, "contrast": 1.0}}
    run, stage = make(tmp_path / "run", config=config)
    score(run, stage)
    program = (
        "import sys; from shards.run import Run; from score.run import score; r = Run(sys.argv[1]);"
        "print(score(r, r.iteration(0), {'brightness': 2.0}, advantages_only=True).advantages_written,"
        "'torch' in sys.modules, 'easyocr' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")], capture_output=True, text=True, check=True, cwd="."
    )
    assert done.stdout.split() == ["True", "False", "False"]


def test_advantages_only_wants_all_scores(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run")
    with pytest.raises(UserError, match="shards 0, 1 are not sampled or not scored"):
        score(run, stage, advantages_only=True)


@pytest.mark.parametrize(
    ("how", "reason"),
    [("raise", "RuntimeError: the judge is ill"), ("nan", "value is not a number"), ("say", "the judge declines")],
)
def test_a_failed_sample_is_missing_and_the_others_are_not(tmp_path: Path, how: str, reason: str) -> None:
    options = {FLAKY: {"bad": "p000001-s01", "how": how}}
    run, stage = make(tmp_path / "run", config={"rewards": {FLAKY: 1.0}, "options": options})
    report = score(run, stage)
    scores = sidecar.read_scores(stage, choose(FLAKY, options[FLAKY]).directory)
    assert list(scores["status"]) == ["ok", "ok", "ok", "ok", reason, "ok"]
    assert list(scores["reward"].isna()) == [False] * 4 + [True, False]
    table = sidecar.read_advantages(stage, report.advantages)
    assert list(table["weight"]) == [1, 1, 1, 1, 0, 1]
    assert table["advantage"][3] == pytest.approx(-table["advantage"][5])
    assert report.summary is not None
    assert report.summary["missing_reasons"] == {reason: 1}


def test_too_many_failures_stop_the_stage_and_nothing_false_is_kept(tmp_path: Path) -> None:
    options = {FLAKY: {"bad": "s00"}}  # one sample of the first shard is within the limit, two of two shards are not
    run, stage = make(tmp_path / "run", config={"rewards": {FLAKY: 1.0}, "options": options}, groups=3)
    with pytest.raises(RunFailed, match=r"2 of 9 samples have no reward.*the judge is ill"):
        score(run, stage)
    assert not sidecar.scorers(stage)
    healed = {FLAKY: {"bad": ""}}
    run.__dict__["config"] = RunConfig(score=ScoreConfig(rewards={FLAKY: 1.0}, options=healed))
    assert score(run, stage).done == [0, 1, 2]


def test_a_reward_that_cannot_work_is_an_error_and_not_a_missing_value(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run", config={"rewards": {f"{__name__}:Mute": 1.0}})
    with pytest.raises(UserError, match=r"^no weights here") as raised:
        score(run, stage)
    assert raised.type is UserError
    assert not sidecar.scorers(stage)


def test_a_video_that_cannot_be_decoded_is_missing(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", RunConfig(score=ScoreConfig(rewards={"brightness": 1.0})))
    stage = shard_fixtures.planned_stage(tmp_path / "run", groups=1, group_size=6)
    group = stage.groups(0)[0]
    broken = shard_fixtures.make_sample(stage, group, 2, video=b"not a video")
    shard_fixtures.write_samples(stage, 0, broken)
    shard_fixtures.fill(stage, 0)
    seal(stage, 0, {})
    report = score(run, stage)
    scores = sidecar.read_scores(stage, choose("brightness").directory)
    assert "cannot be decoded" in scores["status"][2]
    assert report.missing == 1


def test_a_stage_that_is_still_being_sampled(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", RunConfig(score=ScoreConfig(rewards={OWN: 1.0})))
    with pytest.raises(UserError, match=r"no plan\.json"):
        score(run, run.iteration(0))
    stage = shard_fixtures.planned_stage(tmp_path / "run")
    with pytest.raises(StillBusy, match="shards 0, 1 are not sampled"):
        score(run, stage)
    shard_fixtures.fill(stage, 0)
    seal(stage, 0, {})
    report = score(run, stage)
    assert (report.done, report.pending, report.summary) == ([0], [1], None)
    assert not sidecar.specifications(stage)


def test_workers_share_the_shards(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run", groups=3)
    with claim(stage, 1, "score"):
        first = score(run, stage, worker=(0, 2))
    assert (first.done, first.pending, first.summary) == ([0, 2], [1], None)
    second = score(run, stage, worker=(1, 2))
    assert (second.done, second.pending) == ([1], [])
    assert second.advantages_written


def test_a_worker_goes_on_with_the_share_of_another(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run", groups=3)
    assert score(run, stage, worker=(1, 2)).done == [1, 0, 2]


def test_a_claimed_shard_is_left_to_its_worker(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run")
    with claim(stage, 0, "score") as held:
        assert held
        assert score(run, stage).done == [1]
        with pytest.raises(StillBusy):
            score(run, stage)
    assert score(run, stage).done == [0]


def test_processes_give_the_same_tables_as_one(tmp_path: Path) -> None:
    rewards = {"brightness": 1.0, "contrast": 0.5}
    reports: list[ScoreReport] = []
    stages: list[Stage] = []
    for workers in (1, 2):
        run, stage = make(tmp_path / f"run{workers}", config={"rewards": rewards, "workers": workers}, groups=3)
        reports.append(score(run, stage))
        stages.append(stage)
    process.processes.discard()
    for name in [choose(reward).directory for reward in ("brightness", "contrast", "guards")]:
        left, right = (sidecar.read_scores(stage, name) for stage in stages)
        pd.testing.assert_frame_equal(left, right, check_exact=True)
    assert reports[0].summary == reports[1].summary
    assert reports[0].done == reports[1].done == [0, 1, 2]


def test_progress_counts_videos(tmp_path: Path) -> None:
    run, stage = make(tmp_path / "run")
    seen: list[tuple[int, int, str]] = []
    score(run, stage, progress=lambda done, total, unit, note="": seen.append((done, total, unit)))
    assert seen[-2:] == [(3, 6, "videos"), (6, 6, "videos")]


def test_progress_begins_with_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_rewards", {})
    seen: list[tuple[int, int, str]] = []
    for name in ("one", "two"):  # the second stage finds the reward loaded
        run, stage = make(tmp_path / name)
        score(run, stage, progress=lambda done, total, unit, note="": seen.append((done, total, note)))
    (loaded,) = run.config.score.rewards
    assert seen == [(0, 6, f"loading {loaded}"), *[(3, 6, ""), (6, 6, "")] * 2]


def test_ocr_text_is_kept_frame_by_frame(tmp_path: Path) -> None:
    config = {"rewards": {"ocr": 1.0, "ocr.exact": 0.0}, "options": {"ocr": {"interval": 2}}}
    run, stage = make(tmp_path / "run", config=config, groups=1, group_size=2)
    report = score(run, stage)
    scores = sidecar.read_scores(stage, choose("ocr", {"interval": 2}).directory)
    assert [len(json.loads(text)) for text in scores["text"]] == [3, 3]
    assert report.summary is not None
    assert report.summary["exact_share"] == 0
    assert report.summary["specification"]["weights"] == {"ocr": 1.0, "ocr.exact": 0.0}


def test_names_of_rewards() -> None:
    assert {"ocr", "videoalign", "brightness", "contrast", "guards"} <= known().keys()
    assert split_name("ocr") == ("ocr", "")
    assert split_name("videoalign.motion") == ("videoalign", "motion")
    assert split_name("my.module:Class.part") == ("my.module:Class", "part")
    for name in ("ocr", "brightness", "contrast", "guards"):  # those that need no options
        assert choose(name).components


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("orc", {}, "did you mean 'ocr'"),
        ("ocr", {"intervall": 3}, "did you mean 'interval'"),
        ("nowhere.at_all:Reward", {}, "cannot import"),
        (f"{__name__}:Absent", {}, "has no 'Absent'"),
        ("pathlib:Path", {}, "is not a reward"),
    ],
)
def test_wrong_rewards_are_explained(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        choose(name, options)


def test_wrong_components_and_weights_are_explained() -> None:
    with pytest.raises(UserError, match=r"no component 'exakt'.*similarity"):
        tables.select(ScoreConfig(rewards={"ocr.exakt": 1.0}))
    with pytest.raises(UserError, match="is nan"):
        tables.select(ScoreConfig(), {"ocr": float("nan")})


def test_speed_options_do_not_change_the_folder() -> None:
    assert choose("ocr", {"batch_pixels": 5}).directory == choose("ocr").directory
    assert choose("ocr", {"canvas_size": 416}).directory != choose("ocr").directory


def test_guards_of_frames_worked_out_by_hand() -> None:
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    frames[0, :, 2:] = 255  # left half black, right half white, then all black
    found = measure(frames)
    assert found["luma"] == pytest.approx(0.25)
    assert found["clipped"] == 1
    assert found["dark"] == pytest.approx(0.75)
    assert found["edges"] == pytest.approx(4 / 16 / 2)
    assert found["entropy"] == pytest.approx(0.5)
    assert found["motion"] == pytest.approx(0.5)
    assert found["saturation"] == 0
    red = np.zeros((1, 16, 16, 3), np.uint8)
    red[..., 0] = 200
    assert measure(red)["saturation"] == pytest.approx(1)


def test_diversity_is_zero_for_equal_videos_and_grows_with_their_difference() -> None:
    black, white = np.zeros((1, 32, 32, 3), np.uint8), np.full((1, 32, 32, 3), 255, np.uint8)
    same = Guards.after_group(Guards()([Video("a", black, ""), Video("b", black, "")]))
    other = Guards.after_group(Guards()([Video("a", black, ""), Video("b", white, "")]))
    assert [one.components["diversity"] for one in same] == [0, 0]
    assert [one.components["diversity"] for one in other] == pytest.approx([0.5, 0.5])
