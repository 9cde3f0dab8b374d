"""The level of evidence of each preset: one source, and no more than the tests and the history bear out."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import cli
from bench.pages import WITH_EVIDENCE, with_evidence
from shards.presets.evidence import EVIDENCE, MEANING
from tests.docs.test_examples import CASES, EXAMPLES

ROOT = Path(__file__).parents[2]


def test_every_preset_has_its_evidence() -> None:
    assert set(EVIDENCE) == {path.stem for path in (ROOT / "shards" / "presets").glob("*.toml")}


def test_a_preset_that_runs_has_a_script_that_a_test_runs() -> None:
    scripts = "".join((EXAMPLES / f"{name}.sh").read_text(encoding="utf-8") for name in CASES)
    begun = set(re.findall(r"^begin (\S+)", scripts, re.M))
    assert begun == {name for name, found in EVIDENCE.items() if found.level == "runs"}
    assert [name for name, found in EVIDENCE.items() if found.level == "proven"] == ["words"]


def test_a_commit_is_one_of_this_history() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no history here")
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], cwd=ROOT, capture_output=True, text=True)
    if shallow.stdout.strip() != "false":
        pytest.skip("the history is cut short, or git is not there")
    for found in EVIDENCE.values():
        command = ["git", "merge-base", "--is-ancestor", found.commit, "HEAD"]
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0, found.commit


@pytest.mark.parametrize("path", WITH_EVIDENCE, ids=lambda path: path.name)
def test_the_pages_have_the_table(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert all(f"| `{name}` | {MEANING[found.level]} | {found.commit} |" in text for name, found in EVIDENCE.items())
    assert with_evidence(path) == text, "`python -m bench.pages` writes it again"


def test_init_says_how_far_a_preset_was_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["init", str(tmp_path / "run"), "--preset", "words"], standalone_mode=False)
    assert f"preset words: {EVIDENCE['words']}" in capsys.readouterr().err
