"""The benchmark of shards beside plain files and WebDataset runs, and counts the model as its layers say."""

from __future__ import annotations

import pytest

from bench import shard_io


def test_it_writes_and_reads_in_all_ways(capsys: pytest.CaptureFixture[str]) -> None:
    shard_io.main(["--small", "--rounds", "1", "--samples", "2"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows if row.startswith("| ") and "written" not in row] == [
        f"| {way}" for way in shard_io.WAYS
    ]


def test_the_flop_of_a_forward() -> None:
    """About 2 FLOP per weight and token for 14 billion weights, a tenth of which see the text only, and attention."""
    tokens, attention = 32_760, 40 * 4 * 32_760 * (32_760 + 512) * 5120
    assert shard_io.forward_flop() == pytest.approx(2 * 14e9 * tokens + attention, rel=0.08)


def test_the_share_of_a_rollout_and_of_an_update() -> None:
    seconds = {"write": 4.0, "read": 1.2}
    found = dict.fromkeys(shard_io.WAYS, seconds)
    text = shard_io.section("command", [(found, 2 * shard_io.VIDEO)], samples=2, states=7)
    forward = shard_io.forward_flop() / shard_io.PEAK
    assert f"at most {100 * 2.0 / (20 * forward):.2f} % of a rollout of 10 guided steps" in " ".join(text.split())
    assert f"at most {100 * 0.1 / (8 * forward):.2f} % of an update" in text
    assert "A14B" not in shard_io.section("command", [(found, 10)], samples=2, states=7)
