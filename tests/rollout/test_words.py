"""The embedded model: it is what its README says, and its pretraining still runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
from rollout.words import pretrain
from rollout.words.draw import INKS, PAPERS, WORDS, draw_clip, scenes, split

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rollout" / "words"


def test_the_folder_is_small_and_loads_as_a_pipeline_of_two_experts() -> None:
    from diffusers import WanPipeline

    size = sum(path.stat().st_size for path in (FOLDER / "model").rglob("*") if path.is_file())
    assert size <= 16_000_000
    pipeline = WanPipeline.from_pretrained(FOLDER / "model")
    assert pipeline.config.boundary_ratio == 0.875
    assert pipeline.transformer_2 is not None
    weights = [next(iter(expert.parameters())) for expert in (pipeline.transformer, pipeline.transformer_2)]
    assert not torch.equal(*weights)


def test_prompts_are_split_without_overlap_and_both_halves_know_everything() -> None:
    train, held_out = split()
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == len(scenes()) == len(WORDS) * len(INKS) * len(PAPERS)
    for half, name in ((train, "train"), (held_out, "eval")):
        assert {scene.word for scene in half} == set(WORDS)
        assert {scene.ink for scene in half} == set(INKS)
        assert {scene.paper for scene in half} == set(PAPERS)
        lines = (FOLDER / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        assert lines == [scene.prompt for scene in half]


def test_a_scene_is_drawn_in_its_colours_and_repeatably() -> None:
    scene = scenes()[5]
    first, again = (draw_clip(scene, np.random.default_rng(4)) for _ in range(2))
    assert np.array_equal(first, again)
    assert tuple(first[0, 0, 0]) == PAPERS[scene.paper]
    assert (first.reshape(-1, 3) == INKS[scene.ink]).all(1).any()
    assert not np.array_equal(first[0], first[-1])


@pytest.mark.slow
def test_pretraining_still_runs_from_drawn_clips_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = tuple(pretrain.Lesson(name, 3, 2, 1e-3, share) for name, share in (("write", 0.0), ("doubt", 0.5)))
    monkeypatch.setattr(pretrain, "LESSONS", lessons)
    pretrain.train_vae(tmp_path, 2, WORDS, 0)
    pretrain.train_text(tmp_path, 2, WORDS, 0)
    pretrain.encode_latents(tmp_path, 4, WORDS, 0)
    for expert in ("high", "low"):
        pretrain.train_expert(tmp_path, expert, 0)
    pretrain.assemble(tmp_path)
    shipped = {path.relative_to(FOLDER / "model") for path in (FOLDER / "model").rglob("*") if path.is_file()}
    made = {path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert made == shipped
    for config in ("vae/config.json", "transformer/config.json", "text_encoder/config.json"):
        ours, theirs = (json.loads((root / config).read_text()) for root in (tmp_path / "model", FOLDER / "model"))
        changing = ("latents_mean", "latents_std", "_name_or_path", "_diffusers_version", "transformers_version")
        assert {k: v for k, v in ours.items() if k not in changing} == {
            k: v for k, v in theirs.items() if k not in changing
        }


@pytest.mark.slow
def test_the_base_draws_words_that_can_be_read_and_leaves_room_to_learn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["rollout.workers=1", "score.workers=1", "eval.videos_per_prompt=1", "eval.limit=12"]
    run = str(tmp_path / "run")
    cli.app(
        ["init", run, "--preset", "words", *(part for one in settings for part in ("--set", one))],
        standalone_mode=False,
    )
    capsys.readouterr()
    cli.app(["eval", run, "--iteration", "0"], standalone_mode=False)
    rows = capsys.readouterr().out.splitlines()
    base = next(float(row.split()[2]) for row in rows if row.split()[:1] == ["0"])
    assert 0.25 <= base <= 0.75
