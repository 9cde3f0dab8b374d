"""A point of a curve."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A value and, where known, its spread."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""
