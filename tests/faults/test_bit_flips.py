"""The short form of tests/faults/bit_flips.py: no flipped bit of a published file passes in silence."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from shards import parquet, sidecar
from shards.errors import Damaged, UserError
from tests.faults import bit_flips, small_run
from tests.faults.test_readers import READERS

FLIPS = 40


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    run = bit_flips.make(tmp_path)
    suffixes = {path.suffix for path in bit_flips.published(run)}
    assert suffixes == {".tar", ".parquet", ".json", ".jsonl", ".safetensors"}
    assert bit_flips.passed(run, FLIPS, seed=12) == []


SEALED = [*(READERS.keys() - {"plan"}), "scores", "advantages"]  # the manifests vouch for the plan of a rollout


@pytest.mark.parametrize("kind", sorted(SEALED))
def test_no_byte_of_a_record_or_table_may_differ_by_a_bit(kind: str, tmp_path: Path) -> None:
    """One bit of every byte of a record, of some of a table: the reader alone must notice.

    The names of checksums are among them, without which a file would pass for one of a time before them.
    """
    stage = small_run.make(tmp_path / "run")
    path = (small_run.records(stage) | small_run.others(stage))[kind]
    read, whole = READERS.get(kind, sidecar.read_table), path.read_bytes()
    read(path)
    places = {*range(0, len(whole), 1 if kind in READERS else 64)}
    places |= {whole.rfind(parquet.FILE.encode()) + at for at in range(len(parquet.FILE)) if kind not in READERS}
    silent = []
    for at in sorted(places):
        small_run.put(path, whole[:at] + bytes([whole[at] ^ 1 << at * 5 % 8]) + whole[at + 1 :])
        with contextlib.suppress(UserError):
            found = read(path)
            silent += [] if isinstance(found, list) and any(isinstance(one, Damaged) for one in found) else [at]
    assert silent == []
