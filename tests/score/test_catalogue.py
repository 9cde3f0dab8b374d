"""Rewards by their names: what `rushes rewards` lists, and what --reward takes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import cli
from score.catalogue.argument import parse_argument, reward_settings
from score.catalogue.listing import describe_reward, every_reward
from score.reward import known
from shards.errors import UserError
from shards.run_toml import apply_sets
from shards.settings.own_class import load_class
from tests.support.cost import loaded_by


def test_the_listing_says_what_the_classes_say() -> None:
    """Read from the source, without an import; here both are compared."""
    entries = {entry.name: entry for entry in every_reward()}
    assert entries.keys() == known().keys()
    for name, target in known().items():
        found = load_class(name, target)
        parameters = inspect.signature(found).parameters
        assert {
            key: "needed" if one.default is one.empty else repr(one.default) for key, one in parameters.items()
        } == {key: value.replace("100_000", "100000") for key, value in entries[name].options.items()}
        if entries[name].components:
            assert tuple(entries[name].components) == found.components
    assert [name for name, entry in entries.items() if not entry.components] == ["videoalign"]  # it computes them


def test_the_listing_loads_nothing_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert loaded_by("rewards") == set()
    cli.app(["rewards"], standalone_mode=False)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    cli.app(["rewards", "ocr", "--json"], standalone_mode=False)
    [entry] = json.loads(capsys.readouterr().out)
    assert entry["options"]["interval"] == "4"
    with pytest.raises(UserError, match=r"no reward is called 'orc' \(hint: did you mean 'ocr'\?"):
        cli.app(["rewards", "orc"], standalone_mode=False)


def test_an_own_reward_is_described_without_running_its_file(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from score.motion import Motion\nraise RuntimeError\n\n\nclass Own(Motion):\n"
        '    """Mine."""\n    components = ("a", "b")\n',
        encoding="utf-8",
    )
    entry = describe_reward(f"{file}:Own")
    assert (entry.summary, entry.components) == ("Mine.", ["a", "b"])
    assert entry.options == describe_reward("motion").options
    with pytest.raises(UserError, match="has no class 'Other'"):
        describe_reward(f"{file}:Other")


@pytest.mark.parametrize(
    ("text", "name", "weight", "options"),
    [
        ("ocr", "ocr", None, {}),
        ("ocr.exact=0", "ocr.exact", 0.0, {}),
        ("ocr=-2e-1:mode=a,interval=2", "ocr", -0.2, {"mode": "a", "interval": "2"}),
        ("remote:url=http://h:80/s?a=1,b,names=x", "remote", None, {"url": "http://h:80/s?a=1,b", "names": "x"}),
        ("own.module:Class", "own.module:Class", None, {}),
        ("own.module:Class.part=0.5", "own.module:Class.part", 0.5, {}),
        ("own.module:Class=3:note=a:b", "own.module:Class", 3.0, {"note": "a:b"}),
        ("own.module:Class:note=1", "own.module:Class", None, {"note": "1"}),
    ],
)
def test_one_argument_names_a_reward_a_weight_and_options(
    text: str, name: str, weight: float | None, options: dict[str, str]
) -> None:
    found = parse_argument(text)
    assert (found.name, found.weight, found.options) == (name, weight, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not of the form"),
        ("=1", "not of the form"),
        ("ocr:mode", "not of the form"),
        ("own:", "not of the form"),
        ("ocr=much", "--reward ocr=much: the weight is not a number"),
        ("ocr=", "the weight is not a number"),
        ("ocr=nan", "the weight is not a number"),
        ("own:Class=x", "the weight is not a number"),
        ("orc:mode=default", "no reward is called 'orc' \\(hint: did you mean 'ocr'"),
        ("motion:size=9,size=8", "option 'size' is given twice"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_argument(text)


def test_arguments_become_settings_and_keep_the_options_of_others() -> None:
    before = {"score": {"rewards": {"motion": 1.0}, "options": {"ocr": {"interval": 8}, "motion": {"size": 3}}}}
    sets = reward_settings(["ocr=0.5:mode=a=b", "own.module:Class.part:note=2"])
    after = apply_sets(before, sets)["score"]
    assert after["rewards"] == {"ocr": 0.5, "own.module:Class.part": 1.0}
    assert after["options"] == {
        "ocr": {"interval": 8, "mode": "a=b"}, "motion": {"size": 3}, "own.module:Class": {"note": "2"},
    }  # fmt: skip
    assert reward_settings([]) == []
    with pytest.raises(UserError, match="ocr is given twice"):
        reward_settings(["ocr", "ocr=2"])
    with pytest.raises(UserError, match=r"ocr\.exact is given twice"):
        reward_settings(["ocr:mode=a", "ocr.exact:mode=b"])
