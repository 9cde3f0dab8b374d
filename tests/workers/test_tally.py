"""The progress of a stage that several workers share: every unit once, whoever finished it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.run import Run
from shards.workers.worker import Tally, Worker


@pytest.mark.parametrize("part", [(0, 2), (0, 1)])
def test_every_unit_counts_once_and_only_where_there_are_others(
    part: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shard 0 is ours; shard 1 is finished by another worker meanwhile, shard 2 after our last report."""
    files = {0: 0, 1: 0, 2: 0}
    seen: list[tuple[int, int, str, str]] = []
    monkeypatch.setattr("shards.workers.worker.LOOK_EVERY", 0.0)
    tally = Tally(
        Worker(Run(tmp_path).iteration(0), "rollout", part, 60.0),
        lambda done, total, unit, note="": seen.append((done, total, unit, note)),
        "videos",
        lambda shards: sum(files[shard] for shard in shards),
    )
    tally.add({0: 4, 1: 4, 2: 4})
    tally.take(0)
    files |= {0: 3, 1: 4}
    tally.count(3, "shard 0")
    monkeypatch.setattr("shards.workers.worker.LOOK_EVERY", 3600.0)
    files |= {0: 4, 2: 4}
    tally.count(1)
    tally.tell_rest()
    both = [(7, 12, "videos", "shard 0"), (8, 12, "videos", ""), (12, 12, "videos", "")]
    alone = [(3, 12, "videos", "shard 0"), (4, 12, "videos", "")]
    assert seen == (both if part[1] > 1 else alone)
