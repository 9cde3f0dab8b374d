"""run.toml: what is written is what is read, and what is wrong is named with the nearest right name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.config import RunConfig, Section
from shards.errors import UserError
from shards.run_toml import apply_sets, dump_config, load_config, parse_config, read_preset

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "shards" / "presets").glob("*.toml"))


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
        ("steps=3", "run.toml: unknown key 'steps' (hint: did you mean rollout.steps or eval.steps?)"),
        (
            "train.learning_rate=inf",
            "run.toml: [train] learning_rate: input should be a finite number, but it is inf"
            " (hint: learning_rate: AdamW (LoRA: 1e-4, full: 1e-5; flow_grpo, GenRL, miles))",
        ),
        (
            f"rollout.seed={2**63}",
            "run.toml: [rollout] seed: input should be less than 9223372036854775808, but it is 9223372036854775808"
            " (hint: seed: run seed; every noise tensor is derived from it)",
        ),
        (
            "score.best_of_n=3",
            "run.toml: [score] best_of_n: input should be a multiple of 2, but it is 3"
            " (hint: best_of_n: keep the n/2 best and n/2 worst of a group; 0 keeps all)",
        ),
        (
            "rollout.group_size=1001",
            "run.toml: [rollout] group_size: input should be less than or equal to 1000, but it is 1001"
            " (hint: group_size: videos of one prompt; advantages are taken among them (8 or more))",
        ),
        (
            "rollout.group_size=1",
            "run.toml: [rollout] group_size: input should be greater than or equal to 2, but it is 1"
            " (hint: group_size: videos of one prompt; advantages are taken among them (8 or more))",
        ),
        (  # what no command would read again
            "schema=2",
            "run.toml: schema: input should be less than or equal to 1, but it is 2"
            " (hint: run.toml says what each key takes)",
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
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"run.toml: a folder, not a plain file \(hint: it must be a file"):
        load_config(path)


def test_a_wrong_setting_of_a_call_is_not_blamed_on_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("schema = 1\n[rollout]\nsteps = 7\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path, ["rollout.steps=many"])
    assert str(caught.value).startswith(f"{path} with --set: [rollout] steps: ")
    path.write_text("schema = 1\n[rollout]\nsteps = 1\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: [rollout] steps: ")


@pytest.mark.parametrize("text", ["", "[rollout]\nsteps = 7\n"])
def test_a_run_toml_that_lost_its_beginning_is_not_taken_for_all_defaults(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f"{path}: has no schema, so it is not a run.toml or has lost its beginning "
        "(hint: restore it from a copy; one written by hand begins with `schema = 1`)"
    )


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfschema = 1\r\n[rollout]\r\nsteps = 7\r\n")
    assert load_config(path).rollout.steps == 7


def test_settings_take_toml_or_plain_text() -> None:
    values = apply_sets({"rollout": {"steps": 4}}, ["rollout.steps=9", "model.path=/models/wan", "train.full=true"])
    assert values == {"rollout": {"steps": 9}, "model": {"path": "/models/wan"}, "train": {"full": True}}


def test_a_setting_may_be_a_value() -> None:
    weights = {'a "b"': 0.5, "ocr.exact": 1.0}
    values = apply_sets({"score": {"rewards": {"ocr": 1.0}}}, ["score.workers=2", ("score.rewards", weights)])
    assert values == {"score": {"rewards": weights, "workers": 2}}
    assert parse_config(values, "run.toml").score.rewards == weights


@pytest.mark.parametrize("setting", ["rollout.steps", "=3", "preset.x=1"])
def test_a_setting_of_another_form_is_refused(setting: str) -> None:
    with pytest.raises(UserError, match="--set"):
        apply_sets({"preset": "words"}, [setting])


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'wrods' \(hint: did you mean words\?"):
        read_preset("wrods")


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("wan")])
def test_every_value_of_a_wan_preset_has_its_source(preset: str) -> None:
    text = (Path(__file__).parents[2] / "shards" / "presets" / f"{preset}.toml").read_text(encoding="utf-8")
    values = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    assert len(values) > 20
    assert not [line for line in values if not re.search(r" # \w.{3,}", line)]
    head = text.partition("[model]")[0].replace("\n# ", " ")
    assert re.search(r"never validated by us on the real model", head, re.I)


def test_presets_train_what_they_say() -> None:
    """The steps named in their comments: which experts the windows of the real schedules reach."""
    from rollout.schedule import make_schedule
    from rollout.window import choose_window

    expected = {  # preset: boundary, steps of the high-noise or only expert, steps of the low-noise one
        "wan21-1.3b": (None, range(1, 10), range(0)),
        "wan21-14b": (None, range(1, 10), range(0)),
        "wan22-a14b": (0.875, range(1, 5), range(5, 7)),
        "wan22-i2v": (0.9, range(1, 4), range(4, 6)),
        "wan22-ti2v-5b": (None, range(1, 19), range(0)),
    }
    assert set(expected) == {name for name in PRESETS if name.startswith("wan")}
    for name, (boundary, high, low) in expected.items():
        rollout = parse_config(read_preset(name), name).rollout
        plan = make_schedule(rollout, boundary=boundary, scheduler_config={})
        windows = [choose_window(plan, rollout, iteration=k, prompt_id=k) for k in range(200)]
        reached = {step for window in windows for step in window}
        assert reached == {*high, *low}, name
        assert {plan.experts[step] for step in low} == ({1} if low else set())
