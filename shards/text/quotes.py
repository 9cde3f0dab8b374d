"""What a text has between quotation marks: one rule for the prompts of a run and for the reward that reads them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

MARKS = {
    '"': '"',
    "“": "”",
    "”": "”",
    "„": "“”‟",
    "‟": "”",
    "«": "»",
    "»": "«",
    "‹": "›",
    "›": "‹",
    "＂": "＂",
    "「": "」",
    "『": "』",
    "｢": "｣",
    "﹁": "﹂",
    "﹃": "﹄",
    "〝": "〞〟",
    "❝": "❞",
    "❛": "❜",
}  # opening: what may close it
SINGLE = "'‘’‚‛＇`´"  # also apostrophes: these count by what stands beside them
COUNTED = "the marks \" “ ” „ « » ‹ › 「 」 『 』 count, and around whole words ' ‘ ’ `"  # for hints

_CLOSING = set("".join(MARKS.values())) - MARKS.keys()
_NOT_BEFORE = set(".!?…)]}%") | _CLOSING | {'"', "»", "«", "›", "‹", "”", "＂"}  # `U.S.'s`, `"OPEN"'s`
_SINGLES = re.compile(f"[{SINGLE}]+")
_SHORTENED = re.compile(r"(\d\ds|n|tis|twas|twere|twill|em|cause|bout|till?|round|cuz|cos|neath|gainst)(?!\w)", re.I)


def quoted(text: str) -> list[str]:
    """The texts between quotation marks, in order, without white space around them; "" for an empty pair.

    The marks are those of MARKS, each with its partner, and SINGLE: an apostrophe (don't, dogs', '90s) is none of them.
    Marks inside of others are part of the text.

    Raises ValueError for a mark of MARKS without its partner, such as the inch mark of `a 12" screen`, which would else
    shift every pair after it.
    """
    return [text[start:end].strip() for start, end in quoted_spans(text)]


def quoted_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of what `quoted` returns, white space included: characters start to end - 1 are between two marks.

    Raises ValueError as `quoted` does.
    """
    found: list[tuple[int, int]] = []
    edge = 0  # behind the last closing mark
    position = 0
    while position < len(text):
        mark = text[position]
        if mark in _CLOSING:
            raise ValueError(f"the quotation mark {mark} at character {position + 1} has no partner")
        if mark in MARKS:
            end = _partner(text, position)
            found += [*_singles(text, edge, position), (position + 1, end)]
            position, edge = end, end + 1
        position += 1
    return found + _singles(text, edge, len(text))


def _partner(text: str, position: int) -> int:
    """Where the mark at `position` is closed: at the next closing mark, or for brackets (「」), which may stand
    inside of themselves, at their own."""
    mark = text[position]
    closers, depth = MARKS[mark], 1
    for end in range(position + 1, len(text)):
        if text[end] in closers:
            depth -= 1
        elif text[end] == mark and closers[0] in _CLOSING:
            depth += 1
        if depth == 0:
            return end
    raise ValueError(f"the quotation mark {mark} at character {position + 1} has no partner")


# --- Marks that are apostrophes too ----------------------------------------------------------------------------------


def _singles(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Spans between single marks or backquotes in text[start:end]; a run of them (``like this``) is one mark."""
    marks = [match.span() for match in _SINGLES.finditer(text, start, end)]
    found, number = [], 0
    while number < len(marks):
        closing = _closing(text, marks, number) if _opens(text, marks[number]) else None
        if closing is not None and not _is_shortened(text, marks[number][1], marks[closing]):
            found.append((marks[number][1], marks[closing][0]))
            number = closing
        number += 1
    return found


def _closing(text: str, marks: Sequence[tuple[int, int]], number: int) -> int | None:
    """Which mark closes the opening one `number`: the next that can, unless it may as well be an apostrophe (`DOGS'`)
    and a later one cannot."""
    first = number + 1
    while first < len(marks) and not _closes(text, marks[first]):
        if _opens(text, marks[first]):
            return None  # then `number` was an apostrophe: '90s, and 'OPEN'
        first += 1
    if first >= len(marks):
        return None
    if _may_be_apostrophe(text, marks[first]):
        for later in range(first + 1, len(marks)):
            if _opens(text, marks[later]):
                break
            if _closes(text, marks[later]) and not _may_be_apostrophe(text, marks[later]):
                return later
    return first


def _opens(text: str, mark: tuple[int, int]) -> bool:
    """Whether a quotation may begin with this mark: no word ends before it, and something follows at once."""
    before, after = text[max(0, mark[0] - 1) : mark[0]], text[mark[1] : mark[1] + 1]
    return not (_in_word(before) or before in _NOT_BEFORE) and bool(after.strip())


def _closes(text: str, mark: tuple[int, int]) -> bool:
    """Whether a quotation may end with this mark: something stands before it, and no word continues behind it."""
    return bool(text[max(0, mark[0] - 1) : mark[0]].strip()) and not _in_word(text[mark[1] : mark[1] + 1])


def _in_word(character: str) -> bool:
    """Whether it is part of a word with apostrophes; wide scripts (CJK, kana, Hangul) have none, nor spaces."""
    return bool(character) and (
        unicodedata.category(character)[0] in "LMN" and unicodedata.east_asian_width(character) not in "WF"
    )


def _may_be_apostrophe(text: str, mark: tuple[int, int]) -> bool:
    """Whether a closing mark may belong to the word before it: dogs', runnin'."""
    return text[max(0, mark[0] - 2) : mark[0]].casefold().endswith(("s", "x", "z", "in"))


def _is_shortened(text: str, start: int, closing: tuple[int, int]) -> bool:
    """Whether what looks like a quotation is two apostrophes: `rock 'n' roll`, `the '90s in the dogs' house`."""
    span = text[start : closing[0]]
    if span in ("n", "N"):
        around = re.search(r"(\w+) \W$", text[max(0, start - 40) : start]), re.match(r" (\w+)", text[closing[1] :])
        return all(around) and (span == "n" or all(one[1].isupper() for one in around if one))
    shortened = _SHORTENED.match(text, start)
    return shortened is not None and shortened.end() < closing[0] and _may_be_apostrophe(text, closing)
