"""The short form of tests/faults/bit_flips.py: no flipped bit of a published file passes in silence."""

from __future__ import annotations

from pathlib import Path

from tests.faults import bit_flips

FLIPS = 40


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    run = bit_flips.make(tmp_path)
    suffixes = {path.suffix for path in bit_flips.published(run)}
    assert suffixes == {".tar", ".parquet", ".json", ".jsonl", ".safetensors"}
    assert bit_flips.passed(run, FLIPS, seed=12) == []
