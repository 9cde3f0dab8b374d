"""The short form of the soak: one try of every fault, and one that the harness must notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import soak as harness
from tests.faults.disturbing import KINDS, Call, how


@pytest.mark.slow
def test_a_try_of_every_fault_loses_nothing(tiny_t2v2: Path, tmp_path: Path) -> None:
    kinds = harness.possible(list(KINDS), tmp_path)
    assert {*KINDS} - {*kinds} <= {"readonly"}
    rows = harness.soak(tmp_path, tiny_t2v2, kinds, 0.0, seed=0, tries=len(kinds))
    assert {kind: (row.tries, row.faults) for kind, row in rows.items()} == dict.fromkeys(kinds, (1, []))


def test_damage_that_is_never_repaired_is_reported(
    tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(call: Call) -> str:
        ended = how(call.start())
        (shard,) = Path(call.run).glob("iter-0000/rollout/shard-000000.tar")
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        return ended

    monkeypatch.setitem(KINDS, "damage", damage)
    row = harness.soak(tmp_path, tiny_t2v2, ["damage"], 0.0, seed=0, tries=1)["damage"]
    assert row.tries == row.lost == 1
    assert row.faults[0].startswith("lost: damage, seed 0, try 0, in ")
