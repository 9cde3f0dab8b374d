"""`rushes compare`: settings that differ, curves and pairs, in 80 columns and as a page."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import cli
from shards import sidecar
from shards.compare.page import page_of
from shards.compare.runs import compare_runs
from shards.compare.terminal import text_of
from shards.errors import UserError
from shards.report.panels import OUT_OF_ORDER
from shards.run import Run, Stage
from tests.support.shard_fixtures import advantage_frame, committed_stage

NAME = "0123abcd"


def score(stage: Stage, more: float) -> None:
    """Advantages of all shards, and the summary that `rushes score` writes."""
    for shard in stage.shards():
        frame = advantage_frame(stage, shard)
        sidecar.write_advantages(stage, shard, NAME, frame.assign(reward=frame["reward"] + more), {})
    specification = Run(stage.run_path).config.score.specification()
    summary = {"mean_reward": 0.1 + more, "std_reward": 0.1, "samples": 6, "groups": 2, "used_groups": 2}
    summary["schema"] = 1
    stage.summary_path(NAME).write_text(json.dumps(summary | {"specification": specification}), encoding="utf-8")


def make_run(path: Path, toml: str, more: float, evaluations: int = 2) -> Path:
    path.mkdir()
    (path / "run.toml").write_text(f"schema = 1\n{toml}", encoding="utf-8")
    score(committed_stage(path, 0), more)
    for k in range(evaluations):
        score(committed_stage(path, k, evaluation=True), more + k / 10)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("compare")
    long = "/models/" + 40 * "x"
    return [
        make_run(folder / "plain", "[train]\nlearning_rate = 1e-4\n", 0.0),
        make_run(folder / "fast", f'[model]\npath = "{long}"\n[train]\nlearning_rate = 2e-4\n', 0.05),
    ]


def test_settings_curves_and_pairs(runs: list[Path]) -> None:
    found = compare_runs(runs)
    assert found.differing == ["model.path", "train.learning_rate"]
    text = text_of(found)
    assert all(len(line) <= 80 for line in text.splitlines() if str(runs[0].parent) not in line)
    assert "  train.learning_rate  0.0001                       0.0002" in text
    assert f"  model.path\n    A  words\n    B  /models/{40 * 'x'}\n" in text
    assert "     1    0.200 ± 0.041    0.250 ± 0.041" in text
    pair = "B less A after 1 iteration, same prompts and noise: +0.0500 ± 0.0000 over 2"
    assert pair in text
    assert found.pairs[0].found is not None
    assert (found.pairs[0].found.wins, found.pairs[0].found.losses) == (2, 0)


def test_the_command_and_its_page(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "both.html"
    cli.app(["compare", *map(str, runs), "--page", str(page), "--json"], standalone_mode=False)
    record = json.loads(capsys.readouterr().out)
    assert [one["settings"]["train.learning_rate"] for one in record["runs"]] == [1e-4, 2e-4]
    assert record["runs"][1]["held_out"]["1"]["mean"] == pytest.approx(0.25)
    text = page.read_text(encoding="utf-8")
    assert '<th scope="row">train.learning_rate</th><td>0.0001</td><td>0.0002</td>' in text
    assert text.count("<video") == 2 * 2 * 3  # runs, prompts and seeds of the last evaluation
    assert "B less A after 1 iteration" in text
    assert "<video" not in page_of(compare_runs(runs), 0)


def test_hours_are_compared_where_both_runs_have_them(tmp_path: Path) -> None:
    """A copy whose files have times of their own leaves a sentence in place of a curve."""
    both = [make_run(tmp_path / name, "", 0.0) for name in ("one", "copy")]
    for path in both:
        record = Run(path).iteration(0).policy_record_path
        record.parent.mkdir(exist_ok=True)
        record.write_text("{}", encoding="utf-8")
        began = Run(path).iteration(0).plan_path.stat().st_mtime
        os.utime(record, (began + 3600,) * 2)
    assert OUT_OF_ORDER not in page_of(compare_runs(both), 0)
    os.utime(record, (began - 3600,) * 2)
    assert OUT_OF_ORDER in page_of(compare_runs(both), 0)


def test_what_was_measured_otherwise_is_not_paired(runs: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "[score]\nrewards = { motion = 1.0 }\n", 0.3)
    stage = Run(other).evaluation(1)
    stage.advantage_dir(NAME).rename(stage.advantages_dir / "89abcdef")
    Run(other).evaluation(0).advantage_dir(NAME).rename(Run(other).evaluation(0).advantages_dir / "89abcdef")
    found = compare_runs([runs[0], other])
    assert found.pairs[0].found is None
    assert "not to be paired: the evaluations have other rewards" in text_of(found, 200)
    assert {"score.rewards.ocr", "score.rewards.motion"} <= set(found.differing)
    none = compare_runs([runs[0], make_run(tmp_path / "none", "", 0.0, evaluations=0)])
    assert none.pairs == []
    assert "–" in text_of(none)


def test_what_cannot_be_compared_is_refused(runs: list[Path]) -> None:
    with pytest.raises(UserError, match=r"1 run cannot be compared \(hint: name 2 to 6"):
        compare_runs(runs[:1])
    with pytest.raises(UserError, match="plain is named twice"):
        compare_runs([runs[0], runs[0].parent / "fast" / ".." / "plain"])
