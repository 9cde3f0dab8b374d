"""Prompt files of every format, their errors word by word, and how prompts are dealt out to iterations."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout import plan as rollout_plan
from rollout.prompts.chosen import check_files
from rollout.prompts.load import Prompt, load_prompts, prompts_of_iteration, split
from shards.errors import UserError
from shards.process.progress import counted
from shards.run import Run
from shards.run_toml import apply_sets, parse_config, read_preset


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problem(path: Path, need_target: bool = False) -> str:
    with pytest.raises(UserError) as error:
        load_prompts(path, need_target)
    return error.value.problem


def test_text_keeps_line_numbers_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", '\ufeffa sign that says "OPEN"\r\n\n  \nzwei Töne\u2028weiter\n')
    prompts = load_prompts(path, need_target=False)
    assert [(p.id, p.text, p.target) for p in prompts] == [
        (0, 'a sign that says "OPEN"', "OPEN"),
        (3, "zwei Töne weiter", None),
    ]


def test_json_lines_csv_and_parquet_agree(tmp_path: Path) -> None:
    rows = [
        {"prompt": 'a "cat"', "target": "CAT", "image": "first.png", "negative": "blurry", "tags": "text,animal"},
        {"prompt": "a, dog", "target": None, "image": None, "negative": None, "tags": None},
    ]
    lines = write(tmp_path, "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_parquet(tmp_path / "p.parquet")
    expected = [
        Prompt(0, 'a "cat"', "CAT", str(tmp_path.resolve() / "first.png"), "blurry", ("text", "animal")),
        Prompt(1, "a, dog"),
    ]
    assert load_prompts(lines, False) == expected
    assert load_prompts(tmp_path / "p.parquet", False) == expected
    # a CSV cannot tell an empty field from an absent one: an empty negative prompt is a wish, not an absence
    table = load_prompts(tmp_path / "p.csv", False)
    assert table[0] == expected[0]
    assert (table[1].text, table[1].target, table[1].image) == ("a, dog", None, None)


def test_geneval_metadata(tmp_path: Path) -> None:
    path = write(tmp_path, "metadata.jsonl", '{"tag": "colors", "include": [{"class": "cow"}], "prompt": "a cow"}\n')
    assert load_prompts(path, False) == [Prompt(0, "a cow", tags=("colors",))]


def test_errors_name_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "")
    assert problem(path) == f"{path}: holds no prompt"
    path = write(tmp_path, "p.txt", "fine\nalso fine\n\nbad \xff".encode("latin-1"))
    assert problem(path) == f"{path}, line 4: not UTF-8 at byte 20"
    path = write(tmp_path, "p.txt", "fine\na\0b\n")
    assert problem(path) == f"{path}, line 2: contains a NUL byte"
    path = write(tmp_path, "p.txt", "fine\n" + "é" * 50_001)
    assert problem(path) == f"{path}, line 2: 100002 bytes, above the limit of 100000"
    assert load_prompts(write(tmp_path, "q.txt", "é" * 50_000), False)[0].id == 0
    path = write(tmp_path, "p.txt", 'a "b"\n\nno quotes\n')
    assert problem(path, need_target=True) == f"{path}, line 3: no quoted text to be read"
    path = write(tmp_path, "p.txt", 'a "b" and "c\n')
    assert problem(path, True) == f'{path}, line 1: the quotation mark " at character 11 has no partner'
    assert load_prompts(path, False)[0].target is None
    path = write(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n')
    assert problem(path).startswith(f"{path}, line 2: not JSON: ")
    path = write(tmp_path, "p.jsonl", '{"prompt": "a"}\n\n["b"]\n')
    assert problem(path) == f"{path}, line 3: not a JSON object"
    path = write(tmp_path, "p.jsonl", '{"text": "a"}\n')
    assert problem(path) == f"{path}, line 1: no prompt"
    path = write(tmp_path, "p.jsonl", '{"prompt": "a\\ud800"}\n')
    assert problem(path) == f"{path}, line 1: contains half a surrogate pair"
    path = write(tmp_path, "p.jsonl", '{"prompt": "a", "target": 3}\n')
    assert problem(path) == f"{path}, line 1: target is 3, not text"
    path = write(tmp_path, "p.csv", "text\na\n")
    assert problem(path) == f"{path}: has no column `prompt`"
    path = write(tmp_path, "p.csv", "prompt\na\nb\0\n")
    assert problem(path) == f"{path}, line 3: contains a NUL byte"
    path = write(tmp_path, "p.parquet", b"PAR1 no")
    assert problem(path).startswith(f"{path}: not readable as Parquet: ")
    path = write(tmp_path, "p.docx", "a")
    assert problem(path) == f"{path}: prompts of an unknown format"
    assert problem(tmp_path / "missing.txt") == f"{tmp_path / 'missing.txt'}: no such file"


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_every_prompt_is_used_before_any_repeats(total: int, count: int, seed: int) -> None:
    prompts = [Prompt(3 * number, f"prompt {number}") for number in range(total)]
    if count > total:
        with pytest.raises(UserError, match=f"more than the {counted(total, 'prompt')} to take"):
            prompts_of_iteration(prompts, count, seed, 0)
        return
    used: Counter[int] = Counter()
    for iteration in range(2 * total):
        chosen = prompts_of_iteration(prompts, count, seed, iteration)
        assert len({prompt.id for prompt in chosen}) == count
        for prompt in chosen:
            used[prompt.id] += 1
            assert used[prompt.id] - min(used[p.id] for p in prompts) <= 2  # 2 only inside the iteration of a new pass
        assert max(used.values()) - min(used[p.id] for p in prompts) <= 1


def test_the_order_depends_on_seed_and_pass() -> None:
    prompts = [Prompt(number, "") for number in range(40)]
    orders = {tuple(p.id for p in prompts_of_iteration(prompts, 40, seed, k)) for seed in (0, 1) for k in (0, 1)}
    assert len(orders) == 4
    assert [p.id for p in prompts_of_iteration(prompts, 3, 0, 0)] == [
        p.id for p in prompts_of_iteration(prompts, 3, 0, 0)
    ]


@given(st.lists(st.text(max_size=5), max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_split_is_a_matter_of_the_text_alone(texts: list[str], one: float, other: float) -> None:
    prompts = [Prompt(number, text) for number, text in enumerate(texts)]
    train, test = split(prompts, one)
    assert sorted([*train, *test], key=lambda prompt: prompt.id) == prompts
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in test}
    assert split(prompts[1:], one)[1] == [prompt for prompt in test if prompt.id]
    fewer, more = sorted((one, other))
    assert set(split(prompts, fewer)[1]) <= set(split(prompts, more)[1])


def test_about_the_share_is_held_out() -> None:
    assert 170 < len(split([Prompt(number, f"prompt {number}") for number in range(1000)], 0.2)[1]) < 230


def test_one_prompts_file_is_divided(tmp_path: Path) -> None:
    names = [
        str(write(tmp_path, name, "".join(f'"{word}"\n' for word in "abcdefghijkl"))) for name in ("p.txt", "q.txt")
    ]

    def prompts(evaluation: str, holdout: float) -> tuple[set[int], set[int]]:
        sets = [f"rollout.prompts={names[0]}", f"eval.prompts={evaluation}", f"eval.holdout={holdout}"]
        config = parse_config(apply_sets(read_preset("words"), [*sets, "rollout.prompts_per_iteration=1"]), "here")
        run = Run.create(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", config)
        sides = [run.evaluation(0), *map(run.iteration, range(12))]
        tested, *trained = ({prompt.id for prompt in rollout_plan.stage_prompts(run, stage)} for stage in sides)
        return set().union(*trained), tested

    trained, tested = prompts(names[0], 0.3)
    assert trained | tested == set(range(12))
    assert tested
    assert not trained & tested
    with pytest.raises(
        UserError, match=r"^eval.holdout = 0.3, but rollout.prompts is .*p.txt and eval.prompts .*q.txt"
    ):
        prompts(names[1], 0.3)
    with pytest.raises(UserError, match=r"^eval.holdout = 1e-06 leaves no prompt of 12 for evaluation"):
        prompts(names[0], 1e-6)


def test_a_new_run_reads_the_files_that_are_here(tmp_path: Path) -> None:
    """And no others: files at URLs, and a network of the user's for the OCR reward, may be on another machine."""
    plain, chinese = write(tmp_path, "p.txt", '"A"\n"B"\n'), write(tmp_path, "zh.txt", '"营业中"\n"B"\n')

    def check(prompts: str | Path, evaluation: str | Path = "words", *sets: str) -> None:
        names = [f"rollout.prompts={prompts}", f"eval.prompts={evaluation}", "rollout.prompts_per_iteration=2"]
        check_files(parse_config(apply_sets(read_preset("words"), [*names, *sets]), "here"))

    url = "s3://nowhere/p.txt"
    for prompts, evaluation in (("words", "words"), (plain, plain), (url, plain), (plain, url), (url, url)):
        check(prompts, evaluation)
    for prompts, evaluation in ((chinese, plain), (plain, chinese), (url, chinese)):
        with pytest.raises(UserError, match=rf"^{chinese}, line 1: the text to be read, '营业中', has characters"):
            check(prompts, evaluation)
    check(chinese, plain, "score.options.ocr.recog_network=mine")
    with pytest.raises(UserError, match=r"^rollout.prompts_per_iteration = 3, more than the 2 prompts to take"):
        check(plain, "words", "rollout.prompts_per_iteration=3")
    with pytest.raises(UserError, match=r"^eval.holdout = 0.5, but rollout.prompts is .*p.txt and eval.prompts s3://"):
        check(plain, url, "eval.holdout=0.5")
