"""The OCR reward on strings: every row of the definitions' table of edge cases, and the edit distance by its axioms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from score.ocr.similarity import NoTarget, judge, levenshtein, normaliser, similarity, target_of

patient = settings(deadline=None, max_examples=50)  # a busy machine is no failure
SIGN = 'A sign that reads "OPEN NOW" in neon'
MODES = ("flow_grpo_image", "flow_grpo_video", "fastvideo", "default")
FRAMES = 6  # the texts of frames 0, 4, 8, 12, 16, 20 of a video of 21


def reward(texts: list[str], prompt: str, mode: str) -> float:
    return judge(texts, prompt, mode=mode).reward


# Each row: texts per read frame, prompt, and the reward under the four modes in the order of MODES. Worked out by hand:
# "open now" has 7 letters, "open now sale" 11, "floor1/2" 8 as flow_grpo counts it, "floor12" 7.
TABLE = {
    "exact": (["OPEN NOW"], SIGN, (1, 1, 1, 1)),
    "case and spaces": (["open  now"], SIGN, (1, 1, 1, 1)),
    "one wrong letter": (["OPFN NOW"], SIGN, (6 / 7, 6 / 7, 6 / 7, 6 / 7)),
    "missing word": (["OPEN"], SIGN, (4 / 7, 4 / 7, 4 / 7, 4 / 7)),
    "inside long text": (["OPEN NOW WELCOME TO OUR LITTLE SHOP DEAR FRIENDS"], SIGN, (1, 0, 1, 0)),
    "inside letter soup": (["XKQOPENNOWZZPLMTRWQ"], SIGN, (1, 0, 1, 0)),
    "repeated three times": (["OPEN NOW OPEN NOW OPEN NOW"], SIGN, (1, 0, 1, 0)),
    "boxes swapped": (["NOWOPEN"], SIGN, (1 / 7, 1 / 7, 1 / 7, 1 / 7)),
    "stray punctuation": (["OPEN, NOW."], SIGN, (5 / 7, 5 / 7, 5 / 7, 1)),
    "no text": ([""], SIGN, (0, 0, 0, 0)),
    "two targets, one drawn": (["OPEN NOW"], 'A sign "OPEN NOW" and another "SALE"', (1, 1, 1, 7 / 11)),
    "two targets, both drawn": (["OPEN NOW SALE"], 'A sign "OPEN NOW" and "SALE"', (1, 3 / 7, 1, 1)),
    "typographic quotes": (["OPEN NOW"], "A sign \u201cOPEN NOW\u201d in neon", (None, None, 7 / 20, 1)),
    "no quotes": (["hello"], "A sign that reads OPEN NOW in neon", (None, None, 3 / 27, None)),
    "empty quotes": ([""], 'A sign ""', (None, None, 0, None)),
    "blank quotes": ([""], 'A sign "  "', (None, None, 0, None)),
    "inch mark": (["HELLO"], 'A 12" screen showing "HELLO"', (2 / 13, 2 / 13, 2 / 13, None)),
    "one half": (["FLOOR 1/2"], 'A lift button "Floor \u00bd"', (0.5, 0.5, 0.5, 1)),
    "superscript": (["E=mc2"], 'Board "E=mc\u00b2"', (0.8, 0.8, 0.8, 1)),
    "apostrophe": (["If You're Holographic"], '"If You\u2019re Holographic"', (18 / 19, 18 / 19, 18 / 19, 1)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", TABLE)
def test_edge_cases(row: str, mode: str) -> None:
    texts, prompt, expected = TABLE[row]
    value = expected[MODES.index(mode)]
    if value is None:
        with pytest.raises(NoTarget):
            reward(texts * FRAMES, prompt, mode)
    else:
        assert reward(texts * FRAMES, prompt, mode) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("mode", "expected"), [("flow_grpo_image", 1), ("flow_grpo_video", 1), ("fastvideo", 1), ("default", 1 / 6)]
)
def test_one_right_frame_among_blank_ones(mode: str, expected: float) -> None:
    assert reward(["OPEN NOW"] + [""] * 5, SIGN, mode) == pytest.approx(expected)


def test_only_the_image_mode_ignores_later_frames() -> None:
    assert reward(["", "OPEN NOW"], SIGN, "flow_grpo_image") == 0.0
    assert reward(["", "OPEN NOW"], SIGN, "default") == 0.5


def test_shares_tell_what_the_mean_hides() -> None:
    judgement = judge(["OPEN NOW", "", "OPEN", "zzzzzzz"], SIGN)
    assert (judgement.exact, judgement.empty, judgement.positive) == (0.25, 0.25, 0.5)
    assert judgement.length_ratio == pytest.approx((7 + 0 + 4 + 7) / 28)
    assert judgement.reward == pytest.approx((1 + 0 + 4 / 7 + 0) / 4)


def test_a_target_beside_the_prompt_wins_in_the_default_mode() -> None:
    assert judge(["FILM"], "draw the word film, no quotes", "FILM").reward == 1.0
    assert judge(["FILM"], 'draw "SALE"', "FILM").reward == 1.0
    assert judge(["FILM"], "no quotes", "FILM", mode="flow_grpo_video").reward == 1.0


def test_a_target_of_signs_alone_keeps_its_signs() -> None:
    assert judge(["!?"], 'a wall with "!?"').reward == 1.0
    assert judge(["!!"], 'a wall with "!?"').reward == 0.5


def test_confusable_characters_are_equal_only_on_request() -> None:
    assert judge(["B00K 1S"], '"BOOK IS"').reward == 0.5
    assert judge(["B00K 1S"], '"BOOK IS"', fold_confusables=True).reward == 1.0
    assert judge(["5"], '"S"', mode="flow_grpo_video", fold_confusables=True).reward == 1.0


def test_the_target_of_a_prompt() -> None:
    assert target_of('"A" and "B"') == "A B"
    assert target_of('12" and "A"', "A") == "A"
    for prompt, why in (
        ('12" and "A"', "no partner"),
        ("a cat", "no quoted"),
        ('a " "', "empty"),
        ('"\u200b"', "visible"),
    ):
        with pytest.raises(NoTarget, match=why):
            target_of(prompt)


@pytest.mark.parametrize(
    ("left", "right", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("abc", "abc", 0)]
)
def test_levenshtein_of_known_pairs(left: str, right: str, distance: int) -> None:
    assert levenshtein(left, right) == distance == levenshtein(right, left)


short = st.text("abc", max_size=7)


@patient
@given(short, short, short)
def test_levenshtein_is_a_metric(a: str, b: str, c: str) -> None:
    assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
    assert (levenshtein(a, b) == 0) == (a == b)
    assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@patient
@given(short, st.text("abc", min_size=1, max_size=7))
def test_similarity_is_one_minus_the_bounded_distance(text: str, target: str) -> None:
    assert similarity(text, target) == 1 - min(levenshtein(text, target), len(target)) / len(target)


@patient
@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing(text: str) -> None:
    normalise = normaliser("A")
    assert normalise(normalise(text)) == normalise(text)
