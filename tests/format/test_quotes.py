"""Quoted text: all marks, in pairs, one inside another; a run and its reward take the same from a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.prompts import load_prompts
from score.ocr.text import target_of
from shards.quotes import quoted

PROMPTS = [
    ('a sign "OPEN" and a "DAILY" board', ["OPEN", "DAILY"]),
    ("a poster “Hello World”", ["Hello World"]),
    ("ein Schild „Bäckerei“", ["Bäckerei"]),
    ("une affiche « Café »", ["Café"]),
    ("看板＂开放＂", ["开放"]),
    ('„A” and «B» and ＂C＂ and "D"', ["A", "B", "C", "D"]),
    ('empty "" and " " and "one"', ["", "", "one"]),
    ('a «book "x" here»', ['book "x" here']),
]


@pytest.mark.parametrize(("text", "spans"), PROMPTS)
def test_all_marks(text: str, spans: list[str], tmp_path: Path) -> None:
    assert quoted(text) == spans
    file = tmp_path / "prompts.txt"
    file.write_text(text, encoding="utf-8")
    assert load_prompts(file, True)[0].target == target_of(text) == " ".join(span for span in spans if span)


def test_an_apostrophe_is_no_mark() -> None:
    assert quoted("it's one man's sign") == []


@pytest.mark.parametrize("text", ['a 12" screen with "A"', "“open", "a «"])
def test_a_mark_without_its_partner(text: str) -> None:
    with pytest.raises(ValueError, match=r"the quotation mark . at character \d+ has no partner"):
        quoted(text)


@given(st.lists(st.text(alphabet="ab cé中", min_size=1, max_size=5), max_size=4))
def test_every_span_is_found(spans: list[str]) -> None:
    assert quoted("x".join(f' "{span}" ' for span in spans)) == [span.strip() for span in spans]
