"""Other languages of the OCR reward: their models, what these can read, and targets that nobody could read.

The weights of other languages are not at hand, so the English ones are put into the networks of those languages: the
same features, with the outputs of the letters moved to where the other model has them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout.prompts.checks import check_readable
from rollout.prompts.load import Prompt
from score.ocr import OCR
from score.ocr.networks import load_networks, weights_folder
from score.ocr.reading import Box, TextReader, joined
from score.reward import choose
from score.run import score
from shards import sidecar
from shards.config import RunConfig, ScoreConfig
from shards.errors import UserError
from shards.run import Run, Stage
from shards.text import recognisers
from shards.text.letters import normaliser, plain_normaliser, unreadable
from shards.text.recognisers import language_list, languages_for, recogniser_of
from shards.writer import seal
from tests.score.test_ocr import FRAMES, draw, video
from tests.support.shard_fixtures import fill, make_plan, plan_of

SIGN = draw(("FILM", 20, 20), size=44, shape=(96, 192))
CHINESE = {"O": "营", "P": "业", "E": "中", "N": "店"}


def transplant(characters: str, letters: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Weights for a network of these characters that reads English; `letters` says what it takes a letter for."""
    tensors = torch.load(weights_folder() / "english_g2.pth", map_location="cpu", weights_only=True)
    english = recogniser_of({}).characters
    weight = tensors["module.Prediction.weight"]
    moved = torch.zeros(len(characters) + 1, weight.shape[1])
    bias = torch.full((len(characters) + 1,), -30.0)
    for output, letter in enumerate(["", *english]):
        place = characters.find(letters.get(letter, letter)) + 1 if letter else 0
        if letter and not place:
            continue  # a sign that the other model does not have
        moved[place], bias[place] = weight[output], tensors["module.Prediction.bias"][output]
    return tensors | {"module.Prediction.weight": moved, "module.Prediction.bias": bias}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of EasyOCR's models: Latin, which takes M for Ø where it may, and Chinese. Their checksums count."""
    import easyocr.config

    models = tmp_path_factory.mktemp("models")
    shutil.copy(weights_folder() / "craft_mlt_25k.pth", models)
    tables = recognisers._tables().recognition_models["gen2"], easyocr.config.recognition_models["gen2"]
    with pytest.MonkeyPatch.context() as patch:
        for name, letters in (("latin_g2", {}), ("zh_sim_g2", CHINESE)):
            tensors = transplant(tables[0][name]["characters"], letters)
            if name == "latin_g2":
                m, other = (tables[0][name]["characters"].index(letter) + 1 for letter in "MØ")
                tensors["module.Prediction.weight"][other] = tensors["module.Prediction.weight"][m]
                tensors["module.Prediction.bias"][other] = tensors["module.Prediction.bias"][m] + 1
            torch.save(tensors, models / f"{name}.pth")
            digest = hashlib.md5((models / f"{name}.pth").read_bytes()).hexdigest()
            for table in tables:
                patch.setitem(table[name], "md5sum", digest)
        recognisers._recogniser.cache_clear()
        yield models
    recognisers._recogniser.cache_clear()


# --- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("languages", "text"), [(["de", "en"], "FILM"), (["da"], "FILØ")])
def test_other_languages_read_as_easyocr_does(languages: list[str], text: str, folder: Path) -> None:
    """What it leaves out for the languages is left out here too: German has no Ø."""
    import easyocr

    reader = TextReader(recogniser=recogniser_of({"languages": languages, "model_storage_directory": str(folder)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = easyocr.Reader(
            languages, gpu=False, quantize=False, download_enabled=False, verbose=False,
            model_storage_directory=str(folder), user_network_directory=str(folder / "networks"),
        ).readtext(SIGN)  # fmt: skip
    boxes = reader.read([SIGN])[0]
    assert [box.text for box in boxes] == [found for _, found, _ in theirs] == [text]
    assert [box.confidence for box in boxes] == pytest.approx([sure for _, _, sure in theirs], abs=1e-4)


def test_a_chinese_target_is_scored(folder: Path) -> None:
    reward = OCR(languages=["ch_sim", "en"], model_storage_directory=str(folder))
    scored = reward([video([FRAMES[1]], "一块“营业中店”招牌"), video([FRAMES[0]], '"FILM"')])
    assert [one.text for one in scored] == [["营业中店"], ["FILM"]]
    assert [one.components["similarity"] for one in scored] == [1.0, 1.0]


def test_a_network_of_ones_own(folder: Path, tmp_path: Path) -> None:
    characters = recogniser_of({}).characters
    parameters = {"input_channel": 1, "output_channel": 256, "hidden_size": 256}
    described = {"lang_list": ["en"], "character_list": characters, "imgH": 64, "network_params": parameters}
    networks = tmp_path / "networks"
    networks.mkdir()
    options = {
        "recog_network": "mine",
        "model_storage_directory": str(tmp_path),
        "user_network_directory": str(networks),
    }

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            load_networks(recogniser=recogniser_of(options))
        return caught.value.problem

    assert refused() == f"{networks}/mine.yaml: the OCR reward needs this file for the network 'mine'"
    (networks / "mine.yaml").write_text("lang_list: [en", encoding="utf-8")
    assert refused() == f"{networks}/mine.py: the OCR reward needs this file for the network 'mine'"
    (networks / "mine.py").write_text("from beside import Model\n", encoding="utf-8")
    assert refused().startswith(f"{networks}/mine.yaml: does not describe a network: while parsing")
    (networks / "mine.yaml").write_text(json.dumps({**described, "lang_list": None}), encoding="utf-8")
    assert refused() == f"{networks}/mine.yaml: does not describe a network"
    (networks / "mine.yaml").write_text(json.dumps(described), encoding="utf-8")
    assert refused() == f"{tmp_path}/mine.pth: the OCR reward needs this file to read en"
    shutil.copy(weights_folder() / "english_g2.pth", tmp_path / "mine.pth")
    assert refused().startswith(f"{networks}/mine.py: cannot be imported: ModuleNotFoundError")
    (networks / "beside.py").write_text("from easyocr.model.vgg_model import Model\n", encoding="utf-8")
    assert TextReader(recogniser=recogniser_of(options)).lines(FRAMES[:2]) == ["FILM", "OPEN"]
    with pytest.raises(UserError, match="no model reads mine together with de"):
        recogniser_of({**options, "languages": ["de"]})
    before = choose("ocr", options).directory
    (networks / "beside.py").unlink()
    assert choose("ocr", options).directory == before
    (networks / "mine.py").write_text("class Model: ...\n", encoding="utf-8")
    assert choose("ocr", options).directory != before


def test_words_of_right_to_left_scripts() -> None:
    boxes = [
        Box(np.array([[x, 0], [x + 9, 0], [x + 9, 9], [x, 9]], np.float64), text, 1.0)
        for x, text in ((0, "two"), (20, "one"))
    ]
    below = Box(np.array([[0, 20], [9, 20], [9, 29], [0, 29]], np.float64), "three", 1.0)
    assert joined([*boxes, below]) == "two one three"
    assert joined([*boxes, below], right_to_left=True) == "one two three"
    assert recogniser_of({"languages": ["ar"]}).right_to_left


def test_weights_that_are_not_there_or_altered(folder: Path, tmp_path: Path) -> None:
    options = {"languages": ["ko", "en"], "model_storage_directory": str(tmp_path)}
    path = tmp_path / "korean_g2.pth"
    with pytest.raises(UserError) as caught:
        load_networks(recogniser=recogniser_of(options))
    assert caught.value.problem == f"{path}: the OCR reward needs this file to read ko, en"
    assert caught.value.hint.startswith("unpack https://")
    assert "korean_g2.zip there, or set score.options.ocr.model_storage_directory" in caught.value.hint
    with pytest.raises(UserError, match=r"korean_g2\.pth"):
        choose("ocr", options).check_files()
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="a Git LFS pointer"):
        load_networks(recogniser=recogniser_of(options))
    shutil.copy(folder / "zh_sim_g2.pth", path)
    with pytest.raises(UserError, match=r"md5 is [0-9a-f]{12}…, expected befecf7b1ca2…: altered or cut off"):
        load_networks(recogniser=recogniser_of(options))
    other = {"languages": ["de"], "recog_network": "latin_g2", "model_storage_directory": str(tmp_path)}
    shutil.copy(weights_folder() / "english_g2.pth", tmp_path / "english_g2.pth")
    english = {"model_storage_directory": str(tmp_path)}
    assert TextReader(recogniser=recogniser_of(english)).lines(FRAMES[:1]) == ["FILM"]
    (tmp_path / "english_g2.pth").write_bytes(b"no")
    with pytest.raises(UserError, match="sha256 is"):
        load_networks(recogniser=recogniser_of({**english, "languages": ["en"], "recog_network": "english_g2"}))
    with pytest.raises(UserError, match=r"latin_g2\.pth: the OCR reward needs this file"):
        load_networks(recogniser=recogniser_of(other))


def test_the_same_reading_is_the_same_scorer(folder: Path, tmp_path: Path) -> None:
    english = choose("ocr").directory
    assert choose("ocr", {"languages": ["en"]}).directory == choose("ocr", {"languages": "en"}).directory == english
    chinese = {"languages": ["ch_sim", "en"], "model_storage_directory": str(folder)}
    directory = choose("ocr", chinese).directory
    assert directory != english
    assert choose("ocr", {**chinese, "languages": "en,ch_sim", "model_storage_directory": "/x"}).directory == directory
    assert choose("ocr", {"languages": ["de", "en"]}).directory != choose("ocr", {"languages": ["de"]}).directory


@pytest.mark.parametrize(("languages", "message"), [
    (["de", "ru"], "no model reads cyrillic together with de"),
    (["ja", "ko"], "no model reads ja together with ko"),
    (["xx"], "EasyOCR knows no language 'xx'"),
    (["sa"], "EasyOCR has no characters for 'sa'"),
    ([], "is \\[\\], not a list of languages"),
    (3, "is 3, not a list of languages"),
])  # fmt: skip
def test_languages_that_no_model_reads(languages: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        recogniser_of({"languages": languages})


def test_the_models_are_those_that_easyocr_takes() -> None:
    models = {
        "english_g2": ["en"], "latin_g2": ["en", "de"], "thai_g1": ["th"], "zh_tra_g1": ["ch_tra", "en"],
        "zh_sim_g2": ["en", "ch_sim"], "japanese_g2": ["ja"], "korean_g2": ["ko"], "tamil_g1": ["ta"],
        "telugu_g2": ["te"], "kannada_g2": ["kn"], "bengali_g1": ["bn", "as"], "arabic_g1": ["ur", "en"],
        "devanagari_g1": ["hi"], "cyrillic_g2": ["uk", "ru", "en"],
    }  # fmt: skip
    for name, languages in models.items():
        assert recogniser_of({"languages": languages}).name == name
    assert language_list("ch_sim, en,en") == ("ch_sim", "en")
    assert recogniser_of({"recog_network": "latin_g1", "languages": ["fr"]}).generation == "gen1"


# --- What cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "foreign", "plainly"), [
    ("OPEN NOW", "", ""), ("€5!", "", ""), ("!?", "", ""), ("营业中", "营业中", "营业中"), ("CAFÉ 1", "É", "É"),
    ("CAFE\u0301", "É", "É"), ("Straße", "", "ß"), ("E=mc² ½", "", "²½"), ("★ OPEN ★", "", "★"), ("★", "★", "★"),
    ("ﬁn", "", "ﬁ"), ("Привет, мир", "Приветм", "Приветм"),
])  # fmt: skip
def test_characters_that_english_weights_do_not_know(target: str, foreign: str, plainly: str) -> None:
    readable = recogniser_of({}).readable
    assert unreadable(target, readable, normaliser(target)) == foreign
    assert unreadable(target, readable, plain_normaliser(target)) == plainly


def test_what_is_readable_depends_on_the_languages() -> None:
    def foreign(target: str, *languages: str) -> str:
        return unreadable(target, recogniser_of({"languages": list(languages)}).readable, normaliser(target))

    assert foreign("CAFÉ", "fr", "en") == ""
    assert foreign("SØ", "da") == ""
    assert foreign("SØ", "de") == "Ø"  # its model has the letter, and leaves it out for German
    assert foreign("营业中 OPEN", "ch_sim", "en") == ""
    assert languages_for("营业中") == ("ch_sim",)
    assert "fr" in languages_for("É")
    assert languages_for("★") == ()


def test_such_a_target_is_refused_with_its_line() -> None:
    prompts = [
        Prompt(0, '"OPEN"', "OPEN", where="p.txt, line 1"),
        Prompt(1, "“营业中”", "营业中", where="p.txt, line 2"),
    ]
    with pytest.raises(UserError) as caught:
        check_readable(prompts, ScoreConfig())
    assert caught.value.problem == (
        "p.txt, line 2: the text to be read, '营业中', has characters that the recogniser english_g2 does not know: "
        "营业中"
    )
    assert caught.value.hint == (
        "give a `target` of characters that it knows, or take a model that knows them: "
        """--set 'score.options.ocr.languages=["ch_sim", "en"]'"""
    )
    check_readable(prompts, ScoreConfig(options={"ocr": {"languages": ["ch_sim", "en"]}}))
    check_readable(prompts, ScoreConfig(rewards={"motion": 1.0}))
    half = [Prompt(0, '"½"', "½", where="p.txt, line 1")]
    check_readable(half, ScoreConfig())
    with pytest.raises(UserError, match="does not know: ½"):
        check_readable(half, ScoreConfig(rewards={"ocr.exact": 1.0}, options={"ocr": {"mode": "flow_grpo_video"}}))


def test_no_video_of_such_a_target_gets_a_number() -> None:
    for mode in ("default", "flow_grpo_video", "flow_grpo_image", "fastvideo"):
        for prompt, target in (('a "营业中"', None), ("a sign", "营业中"), ('"CAFÉ"', None)):
            scored = OCR(mode=mode).judge(video([FRAMES[0]], prompt, target), ["CAFE"])
            assert not scored.components
            assert "which" not in scored.reason
            assert "has characters that the recogniser english_g2 does not know: " in scored.reason


def sampled(path: Path, targets: list[str], **config: Any) -> tuple[Run, Stage]:
    """A run with two videos of each target, one shard a target."""
    run = Run.create(path, RunConfig(score=ScoreConfig(rewards={"ocr": 1.0}, workers=1, **config)))
    stage, plan = run.iteration(0), make_plan(groups=len(targets), group_size=2)
    for group, target in zip(plan["groups"], targets, strict=True):
        group["target"] = target
    stage.publish_plan(plan_of(plan))
    for shard in range(stage.expected()):
        fill(stage, shard)
        seal(stage, shard, {})
    return run, stage


def test_a_stage_that_must_fail_is_refused_before_a_video_is_read(tmp_path: Path) -> None:
    run, stage = sampled(tmp_path / "run", ["FILM", "营业中", "CAFÉ"])
    with pytest.raises(UserError) as caught:
        score(run, stage)
    assert caught.value.problem == (
        f"{stage.path}: reward 'ocr' cannot score 2 of 3 prompts; prompt 1 ('a cat 1'): the text to be read, '营业中', "
        "has characters that the recogniser english_g2 does not know: 营业中"
    )
    assert not (stage.path / "score").exists()


def test_a_few_such_prompts_are_missing_with_their_reason(tmp_path: Path) -> None:
    run, stage = sampled(tmp_path / "run", ["FILM", "CAFÉ"], max_missing=0.5)
    report = score(run, stage)
    table = sidecar.read_scores(stage, choose("ocr").directory)
    assert table["reward"].isna().tolist() == [False, False, True, True]
    assert set(table["status"][2:]) == {
        "the text to be read, 'CAFÉ', has characters that the recogniser english_g2 does not know: É"
    }
    assert report.summary is not None
    assert report.summary["missing"] == 2
