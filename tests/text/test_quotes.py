"""Quoted text: all marks, in pairs, one inside another; a run and its reward take the same from a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.prompts.load import load_prompts
from score.ocr.similarity import target_of
from shards.text.cleaning import clean
from shards.text.quotes import MARKS, SINGLE, quoted, quoted_spans

PROMPTS = [
    ('a sign "OPEN" and a "DAILY" board', ["OPEN", "DAILY"]),
    ("a poster “Hello World”", ["Hello World"]),
    ("ein Schild „Bäckerei“", ["Bäckerei"]),
    ("une affiche « Café »", ["Café"]),
    ("看板＂开放＂", ["开放"]),
    ('„A” and «B» and ＂C＂ and "D"', ["A", "B", "C", "D"]),
    ('empty "" and " " and "one"', ["", "", "one"]),
    ('a «book "x" here»', ['book "x" here']),
    ("a ‹B› and ›C‹", ["B", "C"]),
    ("「営業中」と『閉店「時」間』", ["営業中", "閉店「時」間"]),
    ("〝看板〞 ﹁A﹂ ❝B❞", ["看板", "A", "B"]),
    ("a sign that says 'OPEN'", ["OPEN"]),
    ("a sign that says ‘OPEN’, one ‚ZU‘ and one ’AV’", ["OPEN", "ZU", "AV"]),
    ("他说‘营业’的，又说'关门'了", ["营业", "关门"]),
    ("a `WRAPPED` sign, ``TWICE``, or ``TeX''", ["WRAPPED", "TWICE", "TeX"]),
    ("'What's new?' over 'JOE'S BAR'", ["What's new?", "JOE'S BAR"]),
    ("('A'), \"B\" and 'C', it's 'D'.", ["A", "B", "C", "D"]),
    ("the dogs' bowl says 'WIN' and the cats' says 'LOSE'", ["WIN", "LOSE"]),
    ("'DOGS' HOME' on a board", ["DOGS' HOME"]),
    ("'OPEN' over the dogs' bowl", ["OPEN"]),
    ("in the '90s a sign 'OPEN'", ["OPEN"]),
    ("'Round Midnight' and '90s' and '24 hours'", ["Round Midnight", "90s", "24 hours"]),
    ("a needle marked 'N' in red", ["N"]),
    ("the \"OPEN\"'s glow on the dogs' bowl", ["OPEN"]),
]


@pytest.mark.parametrize(("text", "spans"), PROMPTS)
def test_all_marks(text: str, spans: list[str], tmp_path: Path) -> None:
    assert quoted(text) == spans
    file = tmp_path / "prompts.txt"
    file.write_text(text, encoding="utf-8")
    target = load_prompts(file, True)[0].target
    assert target == target_of(clean(text)) == clean(" ".join(span for span in spans if span))


@pytest.mark.parametrize("text", [
    "it's one man's sign", "don't, dogs' and runnin'", "the dogs' bowl and the cats' bowl", "rock 'n' roll",
    "ROCK 'N' ROLL BAR", "the '90s dogs' bowl", "o'clock 'til the cows' home", "the U.S.'s flag on the dogs' bowl",
    "5' 6' tall", "don`t and don´t", "don’t, dogs’ and ’tis the dogs’", "a 'sign", "'", "''", "a ' b ' c",
])  # fmt: skip
def test_an_apostrophe_is_no_mark(text: str) -> None:
    assert quoted(text) == quoted(clean(text)) == []


@pytest.mark.parametrize("text", ['a 12" screen with "A"', "“open", "a «", "「A", "A」 and 「B」", "Home › Shop"])
def test_a_mark_without_its_partner(text: str) -> None:
    with pytest.raises(ValueError, match=r"the quotation mark . at character \d+ has no partner"):
        quoted(text)


@given(st.lists(st.text(alphabet="ab cé中", min_size=1, max_size=5), max_size=4))
def test_every_span_is_found(spans: list[str]) -> None:
    assert quoted("x".join(f' "{span}" ' for span in spans)) == [span.strip() for span in spans]


@given(st.text(alphabet="ab s'\"`‘’«»「」.é中", max_size=30))
def test_spans_are_in_order_and_between_marks(text: str) -> None:
    try:
        found = quoted_spans(text)
    except ValueError:
        return
    marks = {*MARKS, *"".join(MARKS.values()), *SINGLE}
    assert found == sorted(found)
    for start, end in found:
        assert start <= end
        assert text[start - 1] in marks
        assert text[end] in marks
    assert [text[start:end].strip() for start, end in found] == quoted(text)


def test_long_texts_take_no_time() -> None:
    for piece in (" 'dogs' cats'", "dogs' ", "'a' ", "''", '"a" '):
        quoted(piece * (100_000 // len(piece)))
