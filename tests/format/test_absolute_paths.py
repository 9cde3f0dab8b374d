"""Which settings of a new run are written as absolute paths, and which stay as they are."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from shards.absolute_paths import in_full
from shards.errors import UserError
from shards.run import Run
from shards.run_toml import apply_sets, parse_config, read_preset
from shards.store.urls import in_shell, working_copy

SAID = "written in full, so that it holds wherever a command is given"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: two prompts files, and folders of which one is called like the embedded model."""
    for name in ("p.txt", "q.txt"):
        (tmp_path / name).touch()
    for name in ("words", "none", "models/wan", "models/clip"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(*sets: str) -> tuple[dict[str, str], list[str]]:
    """What `in_full` makes of these settings laid over a preset: the values that differ, and what it says."""
    before = apply_sets(read_preset("words"), sets)
    after, said = in_full(before)
    parse_config(after, "here")
    return dict(_texts(after).items() - _texts(before).items()), said


def _texts(table: dict[str, object], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in table.items():
        found |= _texts(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return found


@pytest.mark.parametrize(
    ("name", "value", "absolute"),
    [
        ("rollout.prompts", "p.txt", "p.txt"),
        ("eval.prompts", "./models/../q.txt", "q.txt"),
        ("model.path", "models/wan", "models/wan"),
        ("model.path", "./words", "words"),
        ("model.lora", "models", "models"),
        ("model.lora_2", "models", "models"),
        ("model.base_lora", "./models/wan", "models/wan"),
        ("model.base_lora_2", "models", "models"),
        ("score.options.clip.model", "models/clip", "models/clip"),
    ],
)
def test_what_is_there_is_written_in_full(here: Path, name: str, value: str, absolute: str) -> None:
    values, said = changed(f"{name}={value}")
    assert values == {name: f"{here}/{absolute}"}
    assert said == [f"{name}: {here}/{absolute}, {SAID}"]
    assert changed(f"{name}={here}/{absolute}") == ({}, [])  # and then nothing is left to be done


@pytest.mark.parametrize(
    "setting",
    [
        "model.path=words",  # the embedded model, whatever else has its name
        "rollout.prompts=words",
        "model.path=Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        "model.path=s3://bucket/models/wan",
        "model.lora=",
        "model.base_lora_2=none",
        "rollout.prompts=s3://bucket/none.txt",
        "score.options.ocr.mode=models",  # no slash: a word like any other
        "score.options.remote.url=http://host/models/clip",
        "score.options.clip.model=models/none",
    ],
)
def test_what_means_the_same_from_everywhere_stays(setting: str) -> None:
    assert changed(setting) == ({}, [])


@pytest.mark.parametrize("name", ["rollout.prompts", "eval.prompts"])
def test_prompts_that_are_not_there_are_refused_with_the_nearest_name(here: Path, name: str) -> None:
    (here / "prompts.txt").touch()
    for given, near in (("promts.txt", "prompts.txt"), (f"{here}/propmts.txt", f"{here}/prompts.txt")):
        with pytest.raises(UserError) as refused:
            changed(f"{name}={given}")
        assert str(refused.value) == f"{name}: {given}: no such file (hint: did you mean {near}?)"
    with pytest.raises(UserError, match=rf"counts from where the command is given, here from {here}\)"):
        changed(f"{name}=sub/other.csv")
    with pytest.raises(UserError, match=r"give the path of a file that is there\)"):
        changed(f"{name}=~/no-such-prompts-file.txt")


def test_the_file_of_a_reward_is_written_in_full(here: Path) -> None:
    for file in ("colour.py", "pkg/__init__.py", "pkg/taste.py", "json.py"):
        (here / file).parent.mkdir(exist_ok=True)
        (here / file).touch()
    rewards = {
        "colour:A": f"{here}/colour.py:A", "./pkg/../colour.py:A": f"{here}/colour.py:A",
        "pkg.taste:B.part": f"{here}/pkg/taste.py:B.part", "pkg:C": f"{here}/pkg/__init__.py:C",
        "ocr": "ocr", "videoalign.VQ": "videoalign.VQ", "none:D": "none:D", "json:E": "json:E",
    }  # fmt: skip
    for name, full in rewards.items():
        values = {"score": {"rewards": {name: 1.0}, "options": {name.removesuffix(".part"): {"size": 2}}}}
        after, said = in_full(values)
        assert after["score"]["rewards"] == {full: 1.0}
        assert after["score"]["options"] == {full.removesuffix(".part"): {"size": 2}}
        assert len(said) == 2 * (name != full)
    with pytest.raises(UserError, match=r"colours.py: no such file \(hint: did you mean colour.py\?\)"):
        in_full({"score": {"rewards": {"colours.py:A": 1.0}}})


def test_a_value_of_a_wrong_type_is_left_to_the_check() -> None:
    for setting in ("rollout.prompts=3", "rollout=3", "score.options=3", "score.options.ocr=3", "score=3"):
        key = setting.partition("=")[0]
        section = {key: 3} if "." not in key else None
        values = section or apply_sets({}, [setting])
        assert in_full(values) == (values, [])


def test_commands_in_hints_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with blanks and quotation marks is one word of every command that is proposed."""
    from score.run import score
    from train.data import Rollouts
    from train.run import train

    folder = tmp_path / "it's my run"
    run = Run.create(folder, parse_config(read_preset("words"), "here"))
    hints = [run.way_to_policy(0)]
    for action in (
        lambda: score(run, run.iteration(0)),
        lambda: Rollouts.open(run.iteration(0)),
        lambda: train(run, 0),
        lambda: Run.open(tmp_path / "no run's here"),
    ):
        with pytest.raises(UserError) as caught:
            action()
        hints.append(caught.value.hint.partition("`")[2].partition("`")[0])
    expected = [str(folder)] * 4 + [str(tmp_path / "no run's here")]
    assert [shlex.split(hint)[2] for hint in hints] == expected
    assert all(shlex.split(hint)[0] == "rushes" for hint in hints)
    monkeypatch.setenv("RUSHES_CACHE", str(tmp_path / "a cache"))
    assert in_shell(working_copy("s3://bucket/runs/first")) == "s3://bucket/runs/first"
    assert in_shell(working_copy("s3://bucket/my runs/first")) == "'s3://bucket/my runs/first'"
