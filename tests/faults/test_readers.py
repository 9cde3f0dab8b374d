"""Mutated files go into every reader: it takes them whole, or refuses them by file and place, and nothing else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import index, sidecar, tensors
from shards.errors import UserError
from shards.files import read_json
from shards.records import kinds
from shards.records.reading import CHECKSUM
from shards.spool import read_group
from shards.verify.shards import verify
from tests.faults import small_run
from tests.fuzz.targets import claim_file, log_file, plan_file
from tests.support.shard_fixtures import make_group, planned_stage
from tests.support.shard_fixtures import make_sample as sample_of

FEW = settings(max_examples=15)
ODD: list[Any] = [
    None, True, -1, 2**31, 2**63, 0.5, 1e308, "", "x", "../x", "\0", [], [[]], {}, {"a": 1}, [None], "9" * 400,
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run whose files are read and never changed."""
    return small_run.make(tmp_path_factory.mktemp("whole") / "run").run_path


READERS: dict[str, Callable[[Path], object]] = {
    "manifest": kinds.read_manifest_file, "plan": plan_file, "frozen": kinds.read_train_plan,
    "policy": kinds.read_policy, "summary": kinds.read_summary, "commit": kinds.read_checkpoint,
    "model": kinds.read_model_record, "metrics": log_file,
}  # fmt: skip


def refused_or_whole(read: Callable[[Path], object], path: Path, where: str = "") -> None:
    """A reader returns, or raises a UserError that names the file in one line and says what to do."""
    refused: UserError | None = None
    try:
        read(path)
    except UserError as error:
        refused = error
    if refused is not None:
        assert (where or str(path)) in refused.problem
        assert "\n" not in str(refused)
        assert refused.hint


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values in a value of JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(found for name, one in inner for found in places(one, (*way, name)))]


def changed(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    """A copy of a value with another one at a place; `...` removes what is there."""
    if not way:
        return None if new is ... else new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(way) == 1 and new is ...:
        del copy[way[0]]
    else:
        copy[way[0]] = changed(value[way[0]], way[1:], new)
    return copy


def mangled(draw: Callable[..., Any], data: bytes) -> bytes:
    """Bytes with some replaced, cut out or put in."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.integers(0, len(found))), draw(st.integers(0, 4))
        found[at : at + size] = draw(st.binary(max_size=4))
    return bytes(found)


@pytest.mark.parametrize("kind", READERS)
@FEW
@given(data=st.data())
def test_a_record_with_another_value_somewhere(kind: str, run: Path, tmp_path_factory: Any, data: Any) -> None:
    """The checksum is left out, so that the reader itself has to know what is wrong."""
    path = small_run.records(stage_of(run))[kind]
    record = json.loads(path.read_bytes())
    record.pop(CHECKSUM, None)
    where = data.draw(st.sampled_from(places(record)))
    new = data.draw(st.sampled_from([*ODD, ...]))
    other = tmp_path_factory.getbasetemp() / f"{kind}.json"
    other.write_text(json.dumps(changed(record, where, new)) + "\n")
    refused_or_whole(READERS[kind], other)


@pytest.mark.parametrize("kind", READERS)
@FEW
@given(data=st.data())
def test_a_record_with_other_bytes(kind: str, run: Path, tmp_path_factory: Any, data: Any) -> None:
    path = small_run.records(stage_of(run))[kind]
    other = tmp_path_factory.getbasetemp() / f"{kind}.json"
    other.write_bytes(mangled(data.draw, path.read_bytes()))
    refused_or_whole(READERS[kind], other)
    refused_or_whole(read_json, other)


@FEW
@given(data=st.data())
def test_a_claim_with_other_bytes(tmp_path_factory: Any, data: Any) -> None:
    other = tmp_path_factory.getbasetemp() / "claim"
    whole = json.dumps(small_run.OWNER).encode() + b"\n000000000001\n"
    other.write_bytes(mangled(data.draw, whole))
    assert claim_file(other) is not None


@pytest.mark.parametrize("kind", ["index", "scores", "advantages"])
@FEW
@given(data=st.data())
def test_a_table_with_other_bytes(kind: str, run: Path, tmp_path_factory: Any, data: Any) -> None:
    path = small_run.others(stage_of(run))[kind]
    other = tmp_path_factory.getbasetemp() / f"{kind}.parquet"
    other.write_bytes(mangled(data.draw, path.read_bytes()))
    refused_or_whole(index.read if kind == "index" else sidecar.read_table, other)


@FEW
@given(data=st.data())
def test_tensors_with_other_bytes(data: Any) -> None:
    payload = b"".join(bytes(part) for part in tensors.encode(make_group("i000000-p000000")))
    changed_bytes = memoryview(bytearray(mangled(data.draw, payload)))

    def read(_: Path) -> None:
        entries, _ = tensors.parse(changed_bytes, "here")
        tensors.check(changed_bytes, entries, "here")

    refused_or_whole(read, Path(), "here: ")


@FEW
@given(data=st.data())
def test_a_record_of_a_sample_with_another_value(tmp_path_factory: Any, data: Any) -> None:
    stage = planned_stage(tmp_path_factory.mktemp("plan"), groups=1, group_size=1)
    sample = sample_of(stage, "i000000-p000000", 0)
    record = json.loads(json.dumps(sample.meta))
    where = data.draw(st.sampled_from(places(record)))
    new = data.draw(st.sampled_from([*ODD, ...]))
    payload = json.dumps(changed(record, where, new)).encode()
    for one in (payload, mangled(data.draw, payload)):
        read = partial(index.parse_meta, memoryview(one), sample.key)
        refused_or_whole(lambda _, read=read: read("here"), Path(), "here: ")  # type: ignore[misc]


@FEW
@given(data=st.data())
def test_a_spooled_file_with_other_bytes(tmp_path_factory: Any, data: Any) -> None:
    stage = planned_stage(tmp_path_factory.mktemp("plan"), groups=1, group_size=1)
    payload = b"".join(bytes(part) for part in tensors.encode(make_group("i000000-p000000")))
    path = stage.work_path(0) / "i000000-p000000.text.safetensors"
    small_run.put(path, mangled(data.draw, payload))
    refused_or_whole(lambda _: read_group(stage, 0, "i000000-p000000"), path)


def test_verify_goes_on_past_any_of_them(tmp_path: Path) -> None:
    """Of two files half is cut off; whatever becomes of the one, the other is told of as well."""
    stage = small_run.make(tmp_path / "run")
    files = small_run.records(stage) | small_run.others(stage)
    whole = {name: path.read_bytes() for name, path in files.items() if name != "plan"}
    for pair in itertools.combinations(whole, 2):
        for name in pair:
            files[name].write_bytes(whole[name][: len(whole[name]) // 2])
        told = "\n".join(problem.problem for problem in verify(stage.run_path))
        assert [name for name in pair if files[name].name not in told] == [], pair
        for name in pair:
            files[name].write_bytes(whole[name])


def stage_of(run: Path) -> Any:
    """Iteration 0 of a run."""
    from shards.run import Run

    return Run(run).iteration(0)
