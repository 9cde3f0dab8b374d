"""Prompts that are longer than the text encoder reads: counted and named when a stage is planned."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.plan import check_stage
from rollout.policy import Policy
from rollout.policy.folder import load_text_tokenizer
from rollout.preview import preview
from rollout.prompts import checks
from rollout.run import rollout
from rollout.words.paths import words_folder
from shards.errors import UserError
from shards.run import Run
from shards.text.cleaning import clean
from tests.support import training
from tests.support.tiny_models import TEXT_LENGTH

LONG = "a street at night"  # 17 bytes, a token each; of the 24 that are read the last is the end of the text


def make(folder: Path, model: Path, rows: list[dict[str, Any]], ocr: bool = True, **settings: Any) -> Run:
    """A run with these prompts, one of them in an iteration."""
    rewards = {"ocr": 1.0} if ocr else {"contrast": 1.0}
    run = training.make_run(
        folder / "run", model, score={"rewards": rewards}, **({"prompts_per_iteration": 1} | settings)
    )
    Path(run.config.rollout.prompts).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run


def notes(run: Run) -> list[str]:
    """What is told of a stage, with the names of its file left out."""
    found = check_stage(run, run.iteration(0))
    return [sentence.replace(run.config.rollout.prompts, "FILE") for sentence in found]


@pytest.fixture(autouse=True)
def other_folder(tmp_path: Path) -> None:
    """A place for a second run of a test."""
    (tmp_path / "other").mkdir()


@pytest.mark.parametrize(("text", "target", "tokens"), [
    (f'{LONG[1:]} "OPEN"', None, 24),  # fits to the byte
    (f'{LONG} "OPEN"', None, 25),  # only the closing mark is cut off
    ('"OPEN" in a street at night', None, 28),
    ("OPEN in a street at night", "OPEN", 26),
    ("open in a street at night", "OPEN", 26),
    ("a street at night, full of signs", "OPEN", 33),  # the prompt does not say its target
])  # fmt: skip
def test_a_target_before_the_cut_is_taken(
    text: str, target: str | None, tokens: int, tiny_t2v2: Path, tmp_path: Path
) -> None:
    told = notes(make(tmp_path, tiny_t2v2, [{"prompt": text, "target": target}]))
    expected = "1 prompt is longer than the 24 tokens the model reads (model.text_length): FILE, line 1 ({} tokens)"
    assert told == ([expected.format(tokens)] if tokens > TEXT_LENGTH else [])


@pytest.mark.parametrize(("text", "target", "shown", "tokens"), [
    (f'{LONG}s "OPEN"', None, "OPEN", 26),
    (f'"A" {LONG} "OPEN"', None, "A OPEN", 29),
    (f"{LONG}, a sign OPEN", "OPEN", "OPEN", 31),
    (f"OPEN {LONG} DAILY", "OPEN DAILY", "OPEN DAILY", 29),
    ("é" * 12 + ' "OPEN"', None, "OPEN", 32),
])  # fmt: skip
def test_a_target_behind_the_cut_is_refused(
    text: str, target: str | None, shown: str, tokens: int, tiny_t2v2: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": 'a "B"'}, {"prompt": text, "target": target}]
    run = make(tmp_path, tiny_t2v2, rows)
    with pytest.raises(UserError) as caught:
        rollout(run, run.iteration(0))
    assert caught.value.problem == (
        f"{run.config.rollout.prompts}, line 2: the text to be read, {shown!r}, is cut off: the prompt has {tokens} "
        "tokens, and the model reads 24 (model.text_length)"
    )
    assert sorted(path.name for path in run.path.iterdir()) == ["run.toml"]
    with pytest.raises(UserError, match="is cut off"):
        preview(run, run.iteration(0))
    other = make(tmp_path / "other", tiny_t2v2, rows, ocr=False, prompts_per_iteration=2)
    assert len(notes(other)) == 1  # without the reward that reads it, this is a note


def test_negative_prompts_are_counted_too(tiny_t2v2: Path, tmp_path: Path) -> None:
    rows = [{"prompt": 'a "B"', "negative": "blurred &amp; grey, with a logo"}]
    run = make(tmp_path, tiny_t2v2, rows, negative_prompt="n" * 24)
    assert notes(run) == [
        "2 negative prompts are longer than the 24 tokens the model reads (model.text_length): "
        "FILE, line 1 (28 tokens), rollout.negative_prompt (25 tokens)"
    ]


def test_many_are_counted_and_some_are_named(tiny_t2v2: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f'"A" {LONG} {LONG} {number}'} for number in range(7)]
    (told,) = notes(make(tmp_path, tiny_t2v2, rows, prompts_per_iteration=7))
    assert told.startswith("7 prompts are longer than the 24 tokens the model reads")
    assert told.count("tokens)") == 5
    assert told.endswith(" and 2 more")
    assert preview_notes(tmp_path, tiny_t2v2, rows) == told.replace("FILE", str(tmp_path / "other/run-prompts.jsonl"))


def preview_notes(tmp_path: Path, model: Path, rows: list[dict[str, Any]]) -> str:
    run = make(tmp_path / "other", model, rows, prompts_per_iteration=7)
    (line,) = [line for line in preview(run, run.iteration(0)).splitlines() if "tokens the model reads" in line]
    return line.removeprefix("note: ")


def test_a_rollout_tells_once_and_goes_on(tiny_t2v2: Path, tmp_path: Path) -> None:
    run = make(tmp_path, tiny_t2v2, [{"prompt": f'"A" {LONG} {LONG}'}])
    policy, told = Policy.load(tiny_t2v2, device="cpu", text_length=TEXT_LENGTH), list[str]()
    rollout(run, run.iteration(0), policy, tell=told.append)
    assert len(told) == 1
    assert run.iteration(0).is_complete()
    assert check_stage(run, run.iteration(0), policy) == []  # what has its plan was told of


def test_short_prompts_need_no_tokenizer(tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: Path) -> None:
        raise AssertionError("the tokenizer was loaded")

    monkeypatch.setattr(checks, "_tokenizer", forbidden)
    checks._tokens.cache_clear()
    assert notes(make(tmp_path, tiny_t2v2, [{"prompt": 'a sign "OPEN"'}])) == []
    with pytest.raises(AssertionError, match="was loaded"):
        notes(make(tmp_path / "other", tiny_t2v2, [{"prompt": '"A" in a street at night'}]))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_no_text_has_more_tokens_than_bytes(text: str) -> None:
    cleaned = clean(text)
    tokens = checks._tokens(words_folder() / "model", cleaned)
    assert tokens <= TEXT_LENGTH or checks._may_exceed(cleaned, TEXT_LENGTH)
    assert tokens == len(load_text_tokenizer(words_folder() / "model")(cleaned).input_ids)


def test_a_dry_run_without_the_tokenizer_says_that_nothing_was_counted(tiny_t2v2: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_t2v2, tmp_path / "model")
    shutil.rmtree(model / "tokenizer")
    run = make(tmp_path, model, [{"prompt": f'"A" {LONG} {LONG}'}])
    lines = [line for line in preview(run, run.iteration(0)).splitlines() if "tokenizer" in line]
    assert lines == [f"note: {model} has no tokenizer here, so the tokens of the prompts were not counted"]
    short = make(tmp_path / "other", model, [{"prompt": 'a "B"'}])
    assert "tokenizer" not in preview(short, short.iteration(0))


def test_the_embedded_prompts_are_read_whole(tmp_path: Path) -> None:
    from shards.run_toml import parse_config, read_preset

    run = Run.create(tmp_path / "words", parse_config(read_preset("words"), "here"))
    assert check_stage(run, run.iteration(0)) == check_stage(run, run.evaluation(0)) == []
