"""A point of a curve, and a number for the eye."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A value and, where known, its spread."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


def number(value: float | None, digits: int = 3) -> str:
    """A number for eyes: a minus sign that is one, exponents only where needed, an en dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"
        return text.replace("-", "\N{MINUS SIGN}")
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")
