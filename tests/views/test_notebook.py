"""`import shards` in a notebook: the tables and videos of a run, its API page, the notebook of examples/."""

from __future__ import annotations

import base64
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

import shards
from shards import sidecar
from shards.errors import UserError
from shards.files import to_json
from shards.notebook.view import RunView
from shards.video import decode_mp4
from tests.support.cost import ROOT, in_python
from tests.support.shard_fixtures import advantage_frame, committed_stage, score_frame

KEY = "i000001-p000001-s02"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/demo: two iterations and two evaluations of six samples; one update of each expert."""
    path = tmp_path_factory.mktemp("notebook")
    run = path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "run.toml").write_text('schema = 1\npreset = "words"\n', encoding="utf-8")
    for number, evaluation in ((0, False), (1, False), (0, True), (2, True)):
        stage = committed_stage(run, number, evaluation=evaluation)
        for shard in stage.shards():
            gain = 0.25 * (number == 2)
            frame = score_frame(stage, shard)
            sidecar.write_scores(stage, shard, "ocr-1a2b3c4d", frame.assign(reward=frame["reward"] + gain), {})
            advantages = advantage_frame(stage, shard)
            advantages["reward"] += gain
            sidecar.write_advantages(stage, shard, "0123abcd", advantages, {})
        rewards = sidecar.read_advantages(stage, "0123abcd")["reward"]
        summary = {"mean_reward": rewards.mean(), "std_reward": rewards.std(ddof=1), "samples": 6, "missing": 0}
        summary |= {"groups": 2, "used_groups": 2, "schema": 1, "specification": {}}
        stage.summary_path("0123abcd").write_bytes(to_json(summary, "summary"))
        if not evaluation:
            stage.policy_dir.mkdir()
            update = {"iteration": number, "update": 1, "total_updates": 1}
            lines = [update | {"expert": name} for name in ("high_noise", "low_noise")]
            stage.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(folder: Path) -> RunView:
    return shards.open(folder / "runs" / "demo")


def test_the_tables_are_those_of_the_run(run: RunView) -> None:
    table = run.table()
    assert len(table) == 12
    assert set(table["kind"]) == {"rollout"}
    assert {"key", "reward", "advantage", "ocr.accuracy", "log_prob"} <= {*table}
    assert set(run.table(1)["iteration"]) == {1}
    assert set(run.table(evaluation=True)["kind"]) == {"eval"}
    groups = run.groups()
    assert groups["samples"].tolist() == [3, 3, 3, 3]
    assert groups["reward_std"].tolist() == pytest.approx([0.1] * 4)
    assert run.metrics()[["iteration", "expert"]].to_numpy().tolist() == [
        [0, "high_noise"], [0, "low_noise"], [1, "high_noise"], [1, "low_noise"]
    ]  # fmt: skip
    assert "2 iterations, 2 evaluations" in repr(run)


def test_evaluations_are_compared_with_the_first(run: RunView) -> None:
    found = run.evaluations()
    assert found["iteration"].tolist() == [0, 2]
    assert found["videos"].tolist() == [6, 6]
    assert found["change"].isna().tolist() == [True, False]
    assert found["change"][1] == pytest.approx(0.25)
    assert found["reward"][1] - found["reward"][0] == pytest.approx(0.25)
    assert found.loc[1, ["wins", "losses", "ties"]].tolist() == [2, 0, 0]


def test_a_run_without_updates_and_evaluations_has_empty_tables(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("schema = 1\n", encoding="utf-8")
    run = shards.open(tmp_path)
    assert run.metrics().empty
    assert run.evaluations().empty
    assert {"iteration", "reward", "change", "wins"} <= {*run.evaluations()}
    with pytest.raises(UserError, match="holds no shard"):
        run.table()
    with pytest.raises(UserError, match="not a run"):
        shards.open(tmp_path / "nowhere")


def test_a_video_is_bytes_frames_and_html(run: RunView) -> None:
    data = run.video(KEY)
    assert np.array_equal(decode_mp4(data), run.frames(KEY))
    assert run.frames(KEY).shape == (5, 32, 64, 3)
    page = run.play(KEY, width=200)
    embedded = re.search(r"data:video/mp4;base64,([^\"]+)", page)
    assert embedded
    assert base64.b64decode(embedded[1]) == data
    assert 'width="200"' in page
    assert "a cat 1 · reward 0.200" in page
    assert page._repr_html_() == page
    assert run.sample(KEY)["record"]["key"] == KEY


def test_a_prompt_does_not_become_html(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("schema = 1\n", encoding="utf-8")
    committed_stage(tmp_path, prompt="<script>alert(1)</script>")
    page = shards.open(tmp_path).play("i000000-p000000-s00")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 0 · reward -" in page


def test_nothing_heavy_is_loaded_by_the_import_and_no_torch_by_any_call(folder: Path) -> None:
    code = f"""
import sys, shards
assert not {{"torch", "pandas", "pyarrow", "av", "numpy"}} & sys.modules.keys(), sys.modules.keys()
run = shards.open({str(folder / "runs" / "demo")!r})
run.table(), run.groups(), run.metrics(), run.evaluations(), run.sample({KEY!r})
run.video({KEY!r}), run.frames({KEY!r}), run.play({KEY!r})
assert not {{"torch", "diffusers", "transformers", "easyocr"}} & sys.modules.keys()
"""
    result = in_python(code)
    assert result.returncode == 0, result.stderr


def test_the_types_are_for_others_too() -> None:
    assert (ROOT / "shards" / "py.typed").is_file()
    for name, method in public_methods():
        hints = method.__annotations__
        assert "return" in hints, name
        assert hints.keys() - {"return"} == {*inspect.signature(method).parameters} - {"self"}, name


def public_methods() -> list[tuple[str, Any]]:
    return [(name, one) for name, one in vars(RunView).items() if not name.startswith("_") and callable(one)]


def test_the_page_is_made_from_the_docstrings() -> None:
    from bench.pages import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "`python -m bench.pages` writes it again"
    for name, _ in public_methods():
        assert f"## `.{name}(" in page()


def test_the_pictures_of_the_documentation_are_made_from_runs(run: RunView) -> None:
    from bench.pictures import FOLDER, GAP, SCALE, frames

    picture = frames(run)
    assert picture.width == GAP + 2 * (SCALE * 64 + GAP)  # two prompts
    assert len(picture.getcolors(2**24)) > 100
    pages = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert {path.name for path in FOLDER.iterdir()} == {*re.findall(r"\((?:docs/)?pictures/([\w.]+)\)", pages)}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 400_000


def test_the_picture_of_objectives_has_a_row_for_each_chain(run: RunView, folder: Path, tmp_path: Path) -> None:
    from bench.pictures import GAP, LINE, SMALL, chains

    for name, rewards, control in (("nft", "ocr", False), ("dpo", "ocr", False), ("sft", "ocr+motion", False),
                                   ("grpo fresh, hold", "ocr", True)):  # fmt: skip
        path = tmp_path / f"chain-{name}-{rewards}"
        shutil.copytree(run.run.path, path)
        row = {"objective": name, "rewards": rewards, "control": control, "seed": 1, "part": "chain"}
        row |= {"before": 0.4, "after": 0.5}
        (path / "result.json").write_text(json.dumps(row))
    picture = chains(tmp_path)
    assert picture.height == 3 * (SMALL * 32 + LINE) + GAP  # the base model, nft, dpo
    with pytest.raises(UserError, match="has no chain"):
        chains(folder / "nothing")


def test_the_notebook_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells in their order, as a notebook runs them, on the tiny run in place of the demo."""
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"] >= 5) == (4, True)
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert {*kinds} == {"markdown", "code"}
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for number, cell in enumerate(notebook["cells"]):
        assert cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "clear the outputs before you commit it"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert isinstance(names["run"], RunView)
    assert isinstance(names["table"], pandas.DataFrame)
    assert names["never"].empty
    assert names["best"].startswith("i00000")
    shutil.rmtree(folder / "runs" / "demo" / "frames", ignore_errors=True)
