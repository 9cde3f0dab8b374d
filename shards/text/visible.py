"""Text from files as it may be shown: characters that move a cursor, ring, or turn the reading order are escaped."""

from __future__ import annotations

import re

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks, embeddings, overrides and isolates of direction
    "\u2028\u2029\ufeff\ufff9-\ufffb\ud800-\udfff]"  # separators, byte order, interlinear notes, lone surrogates
)


def visible(text: str) -> str:
    """`text` with each control character and each mark of direction as its escape in Python: `\\x1b`, `\\u202e`.

    Tabs and line feeds stay, and so do joiners (U+200C, U+200D), which Persian, Hindi and emoji need.
    """
    return _HIDDEN.sub(lambda found: _escaped(ord(found[0])), text)


def one_line(text: str) -> str:
    """`visible`, with line feeds escaped too: names from a file within a sentence."""
    return visible(text).replace("\n", "\\n")


def visible_json(text: str) -> str:
    """A JSON document with the same characters as JSON's own escapes, so that it means the same."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
