"""Rewards beside OCR and VideoAlign: CLIP, PickScore, aesthetic, motion; options, fingerprints, one's own rewards."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from score import tables
from score.aesthetic import Aesthetic
from score.clip import CLIP, load_embedder
from score.digests import digest
from score.frames import spread
from score.motion import Motion
from score.pickscore import PickScore
from score.reward import Reward, Scored, Video, choose
from score.run import score
from shards import sidecar
from shards.config import RunConfig, ScoreConfig
from shards.errors import UserError
from shards.run import Run
from shards.run_toml import apply_sets, dump_config, load_config, parse_config
from tests.support import shard_fixtures
from tests.support.clip_models import SIZE, moving_video, noise_video, save_clip, save_head
from tests.support.clock import tick

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
TYPED = f"{__name__}:Typed"
ALIGN = f"{__name__}:Align"


class Typed:
    """A reward with an option of each type."""

    name, version, components = "typed", "1", ("value",)

    def __init__(
        self, count: int = 1, share: float = 0.5, word: str = "", flag: bool = False, few: float | None = None
    ) -> None:
        self.options = (count, share, word, flag, few)

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        return [Scored({"value": 1.0}) for _ in videos]


class Align:
    """The components of VideoAlign without its network: TA is missing on one sample."""

    name, version, components = "align", "1", ("Overall", "VQ", "MQ", "TA")

    def __call__(self, videos: Sequence[Video]) -> list[Scored]:
        numbers = [float(video.key[-2:]) for video in videos]
        return [Scored({"Overall": 0.0, "VQ": n * n, "MQ": -n, "TA": 7.0 * n}) for n in numbers]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP model."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def fresh() -> None:
    """No model of another test."""
    load_embedder.cache_clear()


def plain_cosines(folder: Path, video: Video, numbers: list[int]) -> tuple[torch.Tensor, float]:
    """Cosines and scale by transformers' own forward of the whole model."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(
        text=[video.prompt], images=list(video.frames[numbers]), return_tensors="pt", input_data_format="channels_last"
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image[:, 0]
    scale = float(model.logit_scale.detach().exp())
    return logits / scale, scale


def test_clip_is_the_cosine_transformers_gives(clip_folder: Path) -> None:
    videos = [noise_video("a", seed=1), noise_video("b", frames=2, seed=2, prompt="dog"), noise_video("c", frames=1)]
    reward = CLIP(str(clip_folder), frames=3)
    together, alone = reward(videos), [reward([video])[0] for video in videos]
    assert together == alone
    assert [one.frames for one in together] == [[0, 4, 8], [0, 1], [0]]
    for video, scored in zip(videos, together, strict=True):
        cosines, _ = plain_cosines(clip_folder, video, list(scored.frames or []))
        assert scored.components["similarity"] == pytest.approx(float(cosines.mean()), abs=1e-6)
        assert scored.components["lowest"] == pytest.approx(float(cosines.min()), abs=1e-6)
    assert isinstance(reward, Reward)


def test_clip_cuts_a_prompt_at_its_window(clip_folder: Path) -> None:
    reward = CLIP(str(clip_folder))
    long, longer = (reward([noise_video(prompt="abcdefghijkl" + tail)])[0].components for tail in ("", " " + "z " * 99))
    assert long == longer
    assert reward([noise_video(prompt="zbcdefghijkl")])[0].components != long


def test_pickscore_is_the_scaled_cosine(clip_folder: Path) -> None:
    video = noise_video(seed=3)
    scored = PickScore(str(clip_folder), frames=2)([video])[0]
    cosines, scale = plain_cosines(clip_folder, video, [0, 8])
    assert scale == pytest.approx(np.exp(3.0))
    assert scored.components["score"] == pytest.approx(scale * float(cosines.mean()), rel=1e-5)
    assert scored.components["normalised"] == pytest.approx(scored.components["score"] / 26)
    assert scored.components["lowest"] == pytest.approx(scale * float(cosines.min()), rel=1e-5)


def test_the_processor_may_lie_elsewhere(clip_folder: Path, tmp_path: Path) -> None:
    bare, words = tmp_path / "bare", tmp_path / "words"
    shutil.copytree(clip_folder, words, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / name, bare)
    video = noise_video()
    assert PickScore(str(bare), str(words))([video]) == PickScore(str(clip_folder))([video])
    with pytest.raises(UserError, match="bare: no CLIP processor can be loaded"):
        PickScore(str(bare))


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_aesthetic_is_the_head_on_unit_embeddings(clip_folder: Path, tmp_path: Path, activation: str) -> None:
    head = save_head(tmp_path / "head.safetensors")
    video = noise_video(seed=4)
    scored = Aesthetic(str(clip_folder), str(tmp_path / "head.safetensors"), activation=activation, frames=2)([video])[
        0
    ]
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    pixels = processor.image_processor(list(video.frames[[0, 8]]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels).pooler_output
    layers = [torch.nn.Linear(SIZE, 4), torch.nn.Linear(4, 1)]
    for number, layer in enumerate(layers):
        layer.load_state_dict({name: head[f"layers.{2 * number}.{name}"] for name in ("weight", "bias")})
    between = torch.nn.ReLU() if activation == "relu" else torch.nn.Identity()
    scores = torch.nn.Sequential(layers[0], between, layers[1])(found / found.norm(dim=-1, keepdim=True))
    assert scored.components["score"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert scored.components["lowest"] == pytest.approx(scores.min().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((SIZE + 1, 1), "takes embeddings of 9 numbers"), ((SIZE, 4, 2), "no head that ends in one number")],
)
def test_a_head_that_does_not_fit_is_refused(clip_folder: Path, tmp_path: Path, sizes: Any, words: str) -> None:
    save_head(tmp_path / "head.safetensors", sizes)
    with pytest.raises(UserError, match=words):
        Aesthetic(str(clip_folder), str(tmp_path / "head.safetensors"))


def test_foreign_files_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="no CLIP model can be loaded"):
        CLIP(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        CLIP(str(tmp_path / "none"))
    (tmp_path / "head.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is not a safetensors file"):
        Aesthetic(str(clip_folder), str(tmp_path / "head.safetensors"))
    with pytest.raises(UserError, match="frames is 0"):
        CLIP(str(clip_folder), frames=0)
    with pytest.raises(UserError, match="there is no device 'cuda:64' here"):
        CLIP(str(clip_folder), device="cuda:64")


def test_weights_that_lack_a_tensor_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(tmp_path / "clip" / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the weights lack visual_projection\.weight"):
        CLIP(str(tmp_path / "clip"))


def test_frames_are_spread_with_both_ends() -> None:
    assert [spread(9, 3), spread(2, 4), spread(1, 4), spread(9, 1), spread(10, 4)] == [
        [0, 4, 8], [0, 1], [0], [4], [0, 3, 6, 9],
    ]  # fmt: skip


# --- Motion ----------------------------------------------------------------------------------------------------------


def test_steady_motion_is_smooth_and_turning_back_is_not() -> None:
    steady, shaking, still = Motion()(
        [moving_video([0, 2, 4, 6, 8]), moving_video([0, 2, 0, 2, 0]), moving_video([3, 3, 3, 3])]
    )
    assert steady.components["smoothness"] > 0.9
    assert shaking.components["smoothness"] < 0.1
    assert still.components == {"smoothness": 0.0, "amplitude": 0.0, "flicker": 0.0}
    assert steady.components["amplitude"] == pytest.approx(2 * 16 / 80, rel=0.15)  # 2 pixels of a diagonal of 80


def test_motion_speed_may_change_slowly() -> None:
    even, uneven, wild = (Motion()([moving_video(s)])[0].components["smoothness"] for s in
                          ([0, 2, 4, 6, 8, 10], [0, 1, 3, 6, 8, 9], [0, 3, 3, 6, 5, 8]))  # fmt: skip
    assert even > uneven > wild


def test_flicker_is_the_second_difference_of_light() -> None:
    frames = np.zeros((5, 32, 32, 3), np.uint8)
    frames[:] = np.array([0, 51, 102, 153, 204], np.uint8)[:, None, None, None]
    assert Motion()([Video("v", frames, "")])[0].components["flicker"] == pytest.approx(0, abs=1e-12)
    frames[:] = np.array([0, 51, 0, 51, 0], np.uint8)[:, None, None, None]
    assert Motion()([Video("v", frames, "")])[0].components["flicker"] == pytest.approx(0.4)


def test_motion_needs_three_frames() -> None:
    assert Motion()([moving_video([0, 1])])[0].reason == "motion needs 3 frames, the video has 2"


# --- Options and fingerprints ----------------------------------------------------------------------------------------


def test_options_become_what_they_are_annotated_as() -> None:
    text = {"count": "3", "share": "1e-1", "word": "true", "flag": "True", "few": "2"}
    typed = {"count": 3, "share": 0.1, "word": "true", "flag": True, "few": 2}
    assert dict(choose(TYPED, text).options) == {**typed, "few": 2.0}
    assert choose(TYPED, text).directory == choose(TYPED, typed).directory
    assert choose(TYPED, text).build().options == (3, 0.1, "true", True, 2.0)  # type: ignore[attr-defined]
    assert choose(TYPED, {"few": None}).options["few"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": "many"}, "option 'count' is 'many', not a whole number"),
        ({"count": 1.5}, "option 'count' is 1.5, not a whole number"),
        ({"count": True}, "not a whole number"),
        ({"share": "nan"}, "not a finite number"),
        ({"flag": "1"}, "option 'flag' is '1', not true or false"),
        ({"word": 3}, "option 'word' is 3, not text"),
        ({"few": "x"}, "not a finite number"),
        ({"cuont": 1}, "did you mean 'count'"),
    ],
)
def test_options_of_a_wrong_name_or_type_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        choose(TYPED, options)


def test_the_fingerprint_follows_the_content_of_a_model(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "same")
    save_clip(tmp_path / "other", seed=1)
    folders = (clip_folder, tmp_path / "same", tmp_path / "other")
    here, there, other = (choose("clip", {"model": str(folder)}).directory for folder in folders)
    assert here == there != other
    save_clip(tmp_path / "same", seed=1)  # another model at the same path
    assert choose("clip", {"model": str(tmp_path / "same")}).directory == other
    with pytest.raises(UserError, match="none: no folder with files"):
        choose("clip", {"model": str(tmp_path / "none")})


def test_large_files_are_hashed_in_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from score import digests

    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(range(256)) * 64)
    whole = digest(tmp_path, [path])
    monkeypatch.setattr(digests, "WHOLE", 1000)
    monkeypatch.setattr(digests, "BLOCK", 16)
    digests._content.cache_clear()
    sampled = digest(tmp_path, [path])
    assert sampled != whole
    for place in (0, -1):
        changed = bytearray(path.read_bytes())
        changed[place] ^= 1
        tick(path)
        path.write_bytes(changed)
        assert digest(tmp_path, [path]) != sampled


# --- Components with weights -----------------------------------------------------------------------------------------


def test_a_component_has_a_weight_of_its_own_in_run_toml(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        "schema = 1\n[score]\n"
        'rewards = { ocr = 0.5, videoalign.VQ = 1.0, videoalign.MQ = 0.0, "my.module:Judge.part" = 2.0 }\n'
    )
    config = load_config(tmp_path / "run.toml", ["score.rewards.videoalign.TA=0.25"])
    wanted = {
        "ocr": 0.5,
        "videoalign.VQ": 1.0,
        "videoalign.MQ": 0.0,
        "videoalign.TA": 0.25,
        "my.module:Judge.part": 2.0,
    }
    assert config.score.rewards == wanted
    (tmp_path / "again.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.toml").score.rewards == wanted
    with pytest.raises(UserError, match="valid number"):
        parse_config(apply_sets({}, ["score.rewards.videoalign.VQ=much"]), "here")


@pytest.mark.parametrize("combine", ["normalise-first", "sum-first"])
def test_weights_1_0_0_are_the_first_component_alone(tmp_path: Path, combine: str) -> None:
    weights = {f"{ALIGN}.VQ": 1.0, f"{ALIGN}.MQ": 0.0, f"{ALIGN}.TA": 0.0}
    run = Run.create(tmp_path / "run", RunConfig(score=ScoreConfig(rewards=weights, combine=combine)))  # type: ignore[arg-type]
    stage = shard_fixtures.committed_stage(tmp_path / "run", groups=1, group_size=5)
    table = sidecar.read_advantages(stage, score(run, stage).advantages)
    values = np.array([0.0, 1, 4, 9, 16])
    np.testing.assert_allclose(table["advantage"], (values - values.mean()) / values.std())
    np.testing.assert_allclose(table["reward"], values)
    alone = score(run, stage, {f"{ALIGN}.VQ": 1.0}, advantages_only=True)
    np.testing.assert_array_equal(sidecar.read_advantages(stage, alone.advantages)["advantage"], table["advantage"])


def test_best_of_n_looks_at_the_weighted_result(tmp_path: Path) -> None:
    weights = {f"{ALIGN}.VQ": 1.0, f"{ALIGN}.MQ": 3.0}
    config = ScoreConfig(rewards=weights, best_of_n=2, combine="sum-first")
    run = Run.create(tmp_path / "run", RunConfig(score=config))
    stage = shard_fixtures.committed_stage(tmp_path / "run", groups=1, group_size=5)
    table = sidecar.read_advantages(stage, score(run, stage).advantages)
    np.testing.assert_allclose(table["reward"], [0, -2, -2, 0, 4])  # n^2 - 3 n
    assert list(table["weight"]) == [0, 1, 0, 0, 1]


def test_an_unknown_component_is_refused() -> None:
    with pytest.raises(UserError, match="has no component 'QV'"):
        tables.select(ScoreConfig(rewards={f"{ALIGN}.QV": 1.0}))


# --- One's own -------------------------------------------------------------------------------------------------------


def test_the_example_of_the_guide_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    source = next(text for language, text in blocks if language == "python")
    entry = next(text for language, text in blocks if language == "toml" and "entry-points" in text)
    assert len([line for line in source.splitlines() if line]) <= 10
    (tmp_path / "colour.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    frames = np.zeros((4, 2, 2, 3), np.uint8)
    frames[:2, ..., 0] = 255
    chosen = choose("colour:Colourful", {"frames": "2"})
    assert chosen.build()([Video("v", frames, "a parrot")]) == [Scored({"spread": 1.0})]
    assert choose("colour:Colourful").build()([Video("v", frames, "")]) == [Scored({"spread": 0.5})]
    installed = tmp_path / "colour-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: colour\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[rushes.rewards]\n" + entry.split("]", 1)[1].replace('"', ""))
    monkeypatch.syspath_prepend(tmp_path)
    assert choose("colourful").target == "colour:Colourful"
    assert choose("colourful").build()([Video("v", frames, "")]) == [Scored({"spread": 0.5})]
    monkeypatch.delitem(sys.modules, "colour")


def test_the_guide_names_every_reward_and_its_components() -> None:
    from score import guards, ocr, remote

    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    for found in (ocr.OCR, CLIP, PickScore, Aesthetic, Motion, guards.Guards):
        assert rows[found.name] == ", ".join(found.components)
    assert rows[remote.Remote.name].startswith(remote.Remote.components[0])
    assert "videoalign" in rows
