"""Scores and advantages: one whole table per shard, tied to its shard, with one schema per folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from shards import sidecar
from shards.errors import UserError
from shards.inspect.table import groups, samples, write
from shards.reader import read_manifest
from shards.run import Stage
from shards.sidecar import (
    advantaged,
    read_advantages,
    read_scores,
    read_table,
    scored,
    scorers,
    specifications,
    write_advantages,
    write_scores,
)
from tests.support.shard_fixtures import advantage_frame, committed_stage, planned_stage, score_frame

SCORER, SPEC = "ocr-12345678", "aaaaaaaa"


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Two committed shards of three samples, not scored."""
    return committed_stage(tmp_path / "run")


def test_scores_round_trip_with_missing_rewards(stage: Stage) -> None:
    frame = score_frame(stage, 1)
    frame.loc[1, ["reward", "accuracy"]] = np.nan
    frame.loc[1, "status"] = "the video has no text"
    frame.loc[2, "reward"] = 0.1 + 0.2
    shuffled = frame.sample(frac=1, random_state=3)
    assert not scored(stage, 1, SCORER)
    write_scores(stage, 1, SCORER, shuffled, {"scorer": "ocr", "version": "1"})
    assert scored(stage, 1, SCORER)
    assert not scored(stage, 0, SCORER)
    found = read_scores(stage, SCORER, [1])
    pd.testing.assert_frame_equal(found, frame, check_exact=True, check_dtype=False)
    assert found["reward"].dtype == found["accuracy"].dtype == "float64"
    _, kv = read_table(stage.score_path(SCORER, 1))
    assert kv["shard_sha256"] == read_manifest(stage, 1)["tar"]["sha256"]
    assert kv["version"] == "1"


def test_rewriting_replaces_and_equal_tables_are_equal_bytes(stage: Stage) -> None:
    path = stage.score_path(SCORER, 0)
    write_scores(stage, 0, SCORER, score_frame(stage, 0), {})
    first = path.read_bytes()
    write_scores(stage, 0, SCORER, score_frame(stage, 0).assign(reward=1.0), {})
    assert read_scores(stage, SCORER, [0])["reward"].tolist() == [1.0] * 3
    write_scores(stage, 0, SCORER, score_frame(stage, 0), {})
    assert path.read_bytes() == first
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_advantages_round_trip_and_are_never_missing(stage: Stage) -> None:
    frame = advantage_frame(stage, 0)
    frame.loc[0, ["reward", "weight"]] = [np.nan, 0.0]
    frame.loc[0, "reason"] = "missing"
    write_advantages(stage, 0, SPEC, frame, {"rewards": "ocr"})
    assert advantaged(stage, 0, SPEC)
    assert specifications(stage) == [SPEC]
    found = read_advantages(stage, SPEC, [0])
    pd.testing.assert_frame_equal(found, frame[found.columns], check_exact=True, check_dtype=False)
    for value in (np.nan, np.inf):
        with pytest.raises(UserError, match="advantage is not finite"):
            write_advantages(stage, 1, SPEC, advantage_frame(stage, 1).assign(advantage=value), {})
    assert not advantaged(stage, 1, SPEC)


WRONG = {
    "row missing": (lambda frame: frame[:-1], "2 rows for 3 samples; missing i000000-p000000-s02"),
    "row twice": (lambda frame: pd.concat([frame, frame[:1]]), "4 rows for 3 samples"),
    "other key": (lambda frame: frame.assign(key=["a", "b", "c"]), "extra a, b, c"),
    "column missing": (lambda frame: frame.drop(columns="status"), r"columns missing: \['status'\]"),
    "text for a number": (lambda frame: frame.assign(reward="high"), "reward"),
    "fraction for a whole number": (lambda frame: frame.assign(sample=0.5), "sample"),
    "lone surrogate": (lambda frame: frame.assign(text=pd.Series(["\udc80"] * 3, dtype=object)), "surrogates"),
}


@pytest.mark.parametrize(("edit", "named"), WRONG.values(), ids=WRONG)
def test_wrong_tables_are_refused(stage: Stage, edit, named: str) -> None:
    with pytest.raises(UserError, match=named):
        write_scores(stage, 0, SCORER, edit(score_frame(stage, 0)), {})
    assert scorers(stage) == []


def test_one_schema_per_folder(stage: Stage) -> None:
    write_scores(stage, 0, SCORER, score_frame(stage, 0), {})
    with pytest.raises(UserError, match="holds columns"):
        write_scores(stage, 1, SCORER, score_frame(stage, 1).assign(sharpness=1.0), {})
    write_scores(stage, 1, "ocr-87654321", score_frame(stage, 1).assign(sharpness=1.0), {})
    assert scorers(stage) == [SCORER, "ocr-87654321"]


def test_pandas_reads_a_folder_alone(stage: Stage) -> None:
    for shard in stage.shards():
        write_scores(stage, shard, SCORER, score_frame(stage, shard), {})
    (stage.path / "score" / SCORER / ".tmp-host-1-abc-shard-000000.parquet").write_bytes(b"half")
    found = pd.read_parquet(stage.path / "score" / SCORER)
    assert found["key"].tolist() == [key for shard in (0, 1) for key in stage.keys(shard)]


def test_scores_need_a_committed_shard(tmp_path: Path) -> None:
    stage = planned_stage(tmp_path)
    with pytest.raises(UserError, match="is not there"):
        write_scores(stage, 0, SCORER, score_frame(stage, 0), {})
    with pytest.raises(UserError, match="has no committed shard"):
        read_scores(stage, SCORER)


def test_table_before_and_after_scoring(stage: Stage) -> None:
    frame = samples(stage.run_path)
    assert frame["status"].tolist() == ["not scored"] * 6
    assert frame["reward"].isna().all()
    write_scores(stage, 0, SCORER, score_frame(stage, 0).assign(status=["ok", "no text", "ok"]), {})
    frame = samples(stage.path)
    assert frame["status"].tolist() == ["ok", "no text", "ok", *["not scored"] * 3]
    assert frame["reward"].tolist()[:3] == frame["ocr.accuracy"].tolist()[:3] == [0.0, 0.1, 0.2]
    assert frame["reward"].isna().sum() == 3
    write_advantages(stage, 0, SPEC, advantage_frame(stage, 0).assign(reward=7.0, weight=[1.0, 0.0, 1.0]), {})
    frame = samples(stage.path)
    assert frame["advantage"].tolist()[:3] == [-1.0, 0.0, 1.0]
    assert frame["reward"].tolist()[:3] == [7.0] * 3
    assert frame["ocr.reward"].tolist()[:3] == [0.0, 0.1, 0.2]
    assert frame["window"].tolist()[0] == [1, 2]
    assert frame["log_prob"].tolist()[1] == [-1.125, -1.625]
    assert groups(frame)["used"].tolist() == [2, 0]
    assert groups(frame)["missing"].tolist() == [0, 3]
    assert groups(frame)["reward_mean"].tolist()[0] == 7.0
    assert samples(stage.shard_path(1))["key"].tolist() == stage.keys(1)


def test_scores_of_another_shard_do_not_enter_the_table(stage: Stage) -> None:
    write_scores(stage, 0, SCORER, score_frame(stage, 0), {})
    stage.score_path(SCORER, 0).rename(stage.score_path(SCORER, 1))
    assert samples(stage.path)["status"].tolist() == ["not scored"] * 6


def test_table_of_several_scorers_and_stages(stage: Stage) -> None:
    for scorer in (SCORER, "ocr-87654321", "motion-00000000"):
        for shard in stage.shards():
            write_scores(stage, shard, scorer, score_frame(stage, shard), {})
    committed_stage(stage.run_path, 1)
    committed_stage(stage.run_path, 1, evaluation=True)
    frame = samples(stage.run_path)
    assert {"ocr-12345678.reward", "ocr-87654321.reward", "motion.reward"} <= set(frame)
    assert frame["reward"].isna().all()  # several scorers and no advantages: there is no one reward
    assert frame["kind"].value_counts().to_dict() == {"rollout": 12, "eval": 6}
    assert len(groups(frame)) == 6
    assert samples(stage.run_path, iteration=1)["iteration"].unique().tolist() == [1]
    with pytest.raises(UserError, match="holds no shard in iteration 5"):
        samples(stage.run_path, iteration=5)


def test_table_formats_read_back(stage: Stage, tmp_path: Path) -> None:
    frame = samples(stage.run_path)
    for format, read in (("csv", pd.read_csv), ("json", pd.read_json), ("parquet", pd.read_parquet)):
        path = tmp_path / f"table.{format}"
        path.write_bytes(write(frame, format))
        found = read(path)
        assert found["key"].tolist() == frame["key"].tolist()
        assert found["noise_seed"].tolist() == frame["noise_seed"].tolist()
    assert len(write(frame, "jsonl").splitlines()) == 6
    assert "i000000-p000001-s02" in write(frame, "table").decode()
    with pytest.raises(UserError, match="'xml' is not a format"):
        write(frame, "xml")


def test_a_table_is_proven_once_for_each_state_of_its_file(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scores(stage, 1, SCORER, score_frame(stage, 1), {})
    proven = []
    monkeypatch.setattr(sidecar, "read_table", lambda path: proven.append(path) or read_table(path))
    path = stage.score_path(SCORER, 1)
    assert all(scored(stage, 1, SCORER) for _ in range(3))
    assert proven == [path]
    write_scores(stage, 1, SCORER, score_frame(stage, 1), {"again": "yes"})
    assert scored(stage, 1, SCORER)
    assert proven == [path] * 2
    path.write_bytes(path.read_bytes()[:-50])
    assert not any(scored(stage, 1, SCORER) for _ in range(3))
    assert proven == [path] * 3
