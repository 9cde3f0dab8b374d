"""JSON as records hold it: UTF-8, no name twice, no NaN, no number out of range, not deep and not large."""

from __future__ import annotations

import json
import math
from collections import Counter

MOST_BYTES = 16 * 2**20  # of one record; values take up to thirty times as much memory
DEEPEST = 64  # lists and objects in each other
LARGEST_INT = 2**64  # what a column or a seed could hold
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def parse_value(data: bytes | str, *, most: int = MOST_BYTES, nan: bool = False) -> object:
    """The value of a JSON text. Raises ValueError, in words that follow a file's name, for anything else.

    `nan` admits the three words that Python writes for numbers that are not finite.
    """
    if len(data) > most:
        raise ValueError(f"it has {len(data)} bytes, more than the {most} that are read")
    text = data if isinstance(data, str) else data.decode("utf-8")
    constant = _NOT_FINITE.__getitem__ if nan else _refuse_constant
    try:
        value = json.loads(
            text, object_pairs_hook=_once, parse_int=_integer, parse_float=_number, parse_constant=constant
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    if "\\u" in text or "\\U" in text:
        _refuse_surrogates(value)
    return value


def parse_object(data: bytes | str, *, most: int = MOST_BYTES, nan: bool = False) -> dict[str, object]:
    """The object of a JSON text. Raises ValueError as `parse_value`, and for any other value."""
    value = parse_value(data, most=most, nan=nan)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:80]!r} is given twice")
    return found


def _integer(text: str) -> int:
    if len(text) > 21 or abs(int(text)) > LARGEST_INT:
        raise ValueError(f"{text[:24]} is too large, with {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:24]} is too large for a number")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _depth(value: object) -> int:
    """How many lists and objects lie in each other; without recursion."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        one, depth = waiting.pop()
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        if isinstance(one, dict | list):
            deepest = max(deepest, depth)
        waiting.extend((item, depth + 1) for item in inner if isinstance(item, dict | list))
    return deepest


def _refuse_surrogates(value: object) -> None:
    """Half of a character outside the basic plane, which JSON can name and UTF-8 cannot hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds a lone surrogate, which is not a character") from None
