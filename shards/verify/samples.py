"""Facts of a sample that stand twice: in its record, its key, the plan, its trajectory and the header of its video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from shards import tensors
from shards.errors import REPAIR, Damaged
from shards.records.samples import SampleRecord, check_sample, contradictions, unlike_trajectory
from shards.video import check_mp4

if TYPE_CHECKING:
    from shards.index import Row
    from shards.plan import RolloutPlan

CODES: dict[str, Literal["f", "i", "B"]] = {"F32": "f", "I32": "i", "U8": "B"}
EXPONENTS = {"F32": ("u4", 0x7F800000), "F16": ("u2", 0x7C00), "BF16": ("u2", 0x7F80), "F64": ("u8", 0x7FF << 52)}
"""Unsigned type and exponent bits of each type of numbers; all of those set is infinite or no number."""
AT_ONCE = 2**22  # bytes of a tensor that are looked at together


def sample_faults(
    buffer: memoryview, rows: Sequence[Row], plan: RolloutPlan, plan_sha256: str, where: str
) -> Iterator[Damaged]:
    """All contradictions in the samples of a tar, whose `rows` were made from it; one fault a sample and kind."""
    for row in rows:
        key = row["key"]
        try:
            record = check_sample(bytes(_piece(buffer, row, "json")))
        except ValueError as error:
            yield Damaged(f"{where}: {key}.json: damaged record: {error}", REPAIR)
            continue
        origin = [name for name in ("plan_sha256", "policy") if name in [*contradictions(record, plan, plan_sha256)]]
        if origin:
            yield Damaged(f"{where}: {key}.json was sampled with another {origin[0]}", REPAIR)
        elif names := [*contradictions(record, plan, plan_sha256)]:
            yield Damaged(f"{where}: {key}.json is not of its plan: {', '.join(names)}", REPAIR)
        yield from _trajectory_faults(_piece(buffer, row, "traj"), record, f"{where}: {key}.traj.safetensors")
        try:
            check_mp4(bytes(_piece(buffer, row, "mp4")), plan.video, f"{where}: {key}.mp4")
        except Damaged as error:
            yield error


def _trajectory_faults(payload: memoryview, record: SampleRecord, where: str) -> Iterator[Damaged]:
    try:
        entries, _ = tensors.parse(payload, where)
    except Damaged as error:
        yield error
        return
    small = {
        name: payload[entry.start : entry.stop].cast(CODES[entry.dtype]).tolist()
        for name, entry in entries.items()
        if len(entry.shape) == 1 and entry.dtype in CODES
    }
    names = [*unlike_trajectory(record, small)]
    if names:
        yield Damaged(f"{where}: is not that of its record: {', '.join(names)}", REPAIR)
    if record.status == "ok":
        broken = [
            name for name, entry in entries.items() if not _finite(payload[entry.start : entry.stop], entry.dtype)
        ]
        if broken:
            yield Damaged(f"{where}: {', '.join(sorted(broken))} is not finite, but the status is ok", REPAIR)


def _finite(data: memoryview, dtype: str) -> bool:
    """Whether all numbers of a tensor are finite; whole numbers are."""
    import numpy

    if dtype not in EXPONENTS or not len(data):
        return True
    kind, mask = EXPONENTS[dtype]
    bits = numpy.frombuffer(data, dtype=f"<{kind}")
    step = AT_ONCE // bits.itemsize
    limit = numpy.array(mask, bits.dtype)
    return not any(bool(((bits[at : at + step] & limit) == limit).any()) for at in range(0, len(bits), step))


def _piece(buffer: memoryview, row: Row, name: str) -> memoryview:
    return buffer[row[f"{name}_offset"] : row[f"{name}_offset"] + row[f"{name}_bytes"]]
