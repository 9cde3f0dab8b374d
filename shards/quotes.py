"""What a text has between quotation marks: one rule for the prompts of a run and for the reward that reads them."""

from __future__ import annotations

MARKS = {
    '"': '"',
    "“": "”",
    "”": "”",
    "„": "“”‟",
    "‟": "”",
    "«": "»",
    "»": "«",
    "＂": "＂",
}  # opening: what may close it


def quoted(text: str) -> list[str]:
    """The spans between quotation marks (" “ ” „ ‟ « » ＂), in order, without white space around them; "" for an empty
    one. Marks inside of others are part of the span.

    Raises ValueError for a mark without its partner, such as the inch mark of `a 12" screen`, which would else shift
    every pair after it.
    """
    spans, position = [], 0
    while position < len(text):
        closers = MARKS.get(text[position])
        if closers:
            ends = [end for end in (text.find(closer, position + 1) for closer in closers) if end >= 0]
            if not ends:
                raise ValueError(f"the quotation mark {text[position]} at character {position + 1} has no partner")
            spans.append(text[position + 1 : min(ends)].strip())
            position = min(ends)
        position += 1
    return spans
