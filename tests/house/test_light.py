"""What stays out of memory until it is needed, and what a glance at a run may cost."""

from __future__ import annotations

from pathlib import Path

from tests.support.cost import loaded_by, seconds_of_processor


def test_help_is_light() -> None:
    assert loaded_by("--help") == set()
    assert loaded_by("train", "--help") == set()


def test_the_light_test_can_fail() -> None:
    assert loaded_by("--help", before="import av") == {"av"}


def test_a_thousand_samples_are_inspected_in_two_seconds_of_processor_and_without_torch(tmp_path: Path) -> None:
    from shards import sidecar
    from shards.writer import seal
    from tests.support.shard_fixtures import advantage_frame, fill, make_video, planned_stage, score_frame

    stage, video = planned_stage(tmp_path, groups=63, group_size=16, groups_per_shard=7), make_video(0)
    for shard in range(stage.expected()):
        fill(stage, shard, video=video)
        seal(stage, shard, {})
        sidecar.write_scores(stage, shard, "ocr-00000000", score_frame(stage, shard), {})
        sidecar.write_advantages(stage, shard, "00000000", advantage_frame(stage, shard), {})
    (tmp_path / "run.toml").write_text("schema = 1\n", encoding="utf-8")
    command = ("inspect", str(tmp_path), "--sort", "-reward", "--format", "csv", "--out", str(tmp_path / "all.csv"))
    loaded = set[str]()
    assert seconds_of_processor(lambda: loaded.update(loaded_by(*command)), 2.0) < 2.0
    assert len((tmp_path / "all.csv").read_text(encoding="utf-8").splitlines()) == 1 + 63 * 16
    assert not loaded & {"torch", "diffusers", "transformers", "easyocr"}
