"""run.toml: what is written is what is read, and what is wrong is named with the nearest right name."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.config import RunConfig, Section, apply_sets, dump_config, load_config, parse_config, read_preset
from shards.errors import UserError

PRESETS = sorted(path.stem for path in (Path(__file__).parents[1] / "shards" / "presets").glob("*.toml"))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_run_toml(preset: str, tmp_path: Path) -> None:
    config = parse_config(read_preset(preset), preset)
    path = tmp_path / "run.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"])), weight=st.floats(allow_nan=False, allow_infinity=False)
)
def test_any_text_and_number_survive(prompt: str, weight: float) -> None:
    rollout = RunConfig().rollout.model_copy(update={"negative_prompt": prompt})
    score = RunConfig().score.model_copy(update={"rewards": {prompt: weight}, "options": {"ocr": {"mode": prompt}}})
    config = RunConfig().model_copy(update={"rollout": rollout, "score": score})
    assert parse_config(tomllib.loads(dump_config(config)), "again") == config


def test_every_key_says_what_it_is() -> None:
    sections = [field.annotation for field in RunConfig.model_fields.values()]
    fields = [f for s in sections if isinstance(s, type) and issubclass(s, Section) for f in s.model_fields.values()]
    assert len(fields) > 60
    assert all(field.description for field in fields)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rollout.step=3", "run.toml: [rollout] unknown key 'step' (hint: the nearest key is 'steps')"),
        ("rolout.steps=3", "run.toml: unknown key 'rolout' (hint: the nearest key is 'rollout')"),
        (
            "rollout.steps=many",
            "run.toml: [rollout] steps: input should be a valid integer, but it is 'many'"
            " (hint: steps: denoising steps (flow_grpo's Wan recipe))",
        ),
        (
            "rollout.group_size=1",
            "run.toml: [rollout] group_size: input should be greater than or equal to 2, but it is 1"
            " (hint: group_size: videos of one prompt; advantages are taken among them (8 or more))",
        ),
    ],
)
def test_a_wrong_value_is_named(setting: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config(apply_sets({}, [setting]), "run.toml")
    assert str(caught.value) == message


def test_a_run_of_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("schema = 7\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: schema 7, but this program writes schema 1 (hint: make a new run directory)"


def test_a_run_toml_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[rollout\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(path)
    path.write_bytes(b"preset = '\xff'\n")
    with pytest.raises(UserError, match="not UTF-8 at byte 10"):
        load_config(path)


def test_settings_take_toml_or_plain_text() -> None:
    values = apply_sets({"rollout": {"steps": 4}}, ["rollout.steps=9", "model.path=/models/wan", "train.full=true"])
    assert values == {"rollout": {"steps": 9}, "model": {"path": "/models/wan"}, "train": {"full": True}}


@pytest.mark.parametrize("setting", ["rollout.steps", "=3", "preset.x=1"])
def test_a_setting_of_another_form_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match="--set"):
        apply_sets({"preset": "words"}, [setting])


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'wrods' \(hint: did you mean words\?"):
        read_preset("wrods")
