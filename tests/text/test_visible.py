"""What moves a cursor or turns the reading order is shown, and the rest stays as it is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.text.visible import visible, visible_json

HARMFUL = "\x00\x07\x08\r\x1b\x7f\x9b\u061c\u200e\u202a\u202e\u2066\u2069\u2028\ufeff"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\u202eb", "a\\u202eb"),
        ("one\r\ntwo\tthree", "one\\x0d\ntwo\tthree"),
        ("می\u200cخواهم 👩\u200d🚀 «é» 字", "می\u200cخواهم 👩\u200d🚀 «é» 字"),
    ],
)
def test_examples(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_none_of_them_is_left() -> None:
    assert not set(visible(HARMFUL)) & set(HARMFUL)


@given(st.text())
def test_json_means_the_same(text: str) -> None:
    document = json.dumps({text: [text]}, ensure_ascii=False)
    shown = visible_json(document)
    assert json.loads(shown) == json.loads(document)
    assert not set(shown) & set(HARMFUL)
