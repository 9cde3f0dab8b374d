"""The benchmark for GPUs, run on the CPU with a tiny model: all that it compares is there, and the page is kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import gpu


@pytest.mark.slow
@pytest.mark.parametrize("model", ["1.3b", "i2v-a14b"])
def test_the_small_benchmark_fills_its_section(model: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin gpu -->\nold\n<!-- end gpu -->\nafter\n", encoding="utf-8")
    gpu.main(["--small", "--model", model, "--out", str(tmp_path / "out"), "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- begin gpu -->\n`python bench/gpu.py --small")
    assert text.endswith("<!-- end gpu -->\nafter\n")
    assert "old" not in text
    assert f"model small {model} with random weights" in text
    assert "Not taken on a GPU" in text
    numbers = [[float(part) for part in re.findall(r"\| (\d+\.\d{3}) ", line)] for line in text.splitlines()]
    rows = [row for row in numbers if row]
    assert len(rows) == 5
    assert all(value > 0 for row in rows for value in row)
    assert "Largest |log-ratio| of the replay: 0. The whole" in text  # on a CPU the replay is exact
    for measured, predicted, _ in rows[:2]:
        assert predicted / 3 < measured < 3 * predicted
