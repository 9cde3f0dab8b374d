"""Files of somebody who means no good: refused by name, within little time and memory, and the rest is verified."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from shards import index, parquet
from shards.errors import Damaged, UserError
from shards.files import sha256_file
from shards.reader import open_shard
from shards.run import Run, Stage
from shards.sidecar import CONTENT, content_sha256
from shards.verify.shards import verify
from shards.workers.owners import claims_of
from tests.faults import small_run
from tests.support.cost import in_python
from tests.support.shard_fixtures import committed_stage, make_sample

RECORDS = ("manifest", "plan", "frozen", "policy", "summary", "commit", "model", "metrics")
OTHERS = ("tar", "index", "scores", "advantages", "weights")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run that no test changes."""
    stage = small_run.make(tmp_path_factory.mktemp("pristine") / "run")
    assert verify(stage.run_path) == []
    return stage.run_path


@pytest.fixture
def stage(pristine: Path, tmp_path: Path) -> Stage:
    """Iteration 0 of a copy."""
    return Run(Path(shutil.copytree(pristine, tmp_path / "run"))).iteration(0)


def told(stage: Stage) -> str:
    """All that verify says, one fault a line."""
    return "\n".join(str(problem) for problem in verify(stage.run_path))


# --- JSON that is none, or too much of it ----------------------------------------------------------------------------

TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "cut off": b'{"schema": 1, "sh',
    "another value": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "nested": b"[" * 100_000,
    "nested and closed": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "1e400": b'{"schema": 1, "iteration": 1e400}',
    "NaN": b'{"schema": NaN}',
    "Infinity": b'{"schema": -Infinity}',
    "digits": b'{"schema": ' + b"9" * 5000 + b"}",
    "beyond 64 bits": b'{"schema": 1, "iteration": 99999999999999999999999}',
    "a name twice": b'{"schema": 1, "schema": 1}',
    "not UTF-8": b'{"schema": "\xff"}',
    "UTF-16": '{"schema": 1}'.encode("utf-16"),
    "half a character": b'{"schema": "\\ud800"}',
    "key alone": b'{"key": 1}',
    "another schema": b'{"schema": 2}',
    "schema as text": b'{"schema": "1"}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_that_is_none(kind: str, text: bytes, stage: Stage) -> None:
    path = small_run.records(stage)[kind]
    small_run.put(path, text + b"\n")
    assert str(path) in told(stage)


FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bytes beyond the file": ("manifest", {"tar": {"bytes": 2**60, "sha256": "0" * 64}}),
    "negative bytes": ("manifest", {"index": {"bytes": -1, "sha256": "0" * 64}}),
    "no sha256": ("manifest", {"plan_sha256": "zz"}),
    "samples": ("manifest", {"samples": 12_000_000}),
    "groups": ("manifest", {"groups": ["i000000-p000009"]}),
    "groups of numbers": ("manifest", {"groups": [1]}),
    "group_size": ("manifest", {"group_size": 1}),
    "iteration": ("manifest", {"iteration": 5}),
    "kind": ("manifest", {"kind": "eval"}),
    "a policy of null": ("manifest", {"policy": None}),
    "info of a list": ("manifest", {"info": []}),
    "a name upwards": ("policy", {"adapters": {"../../x": "0" * 64}}),
    "an absolute name": ("policy", {"adapters": {"/etc/passwd": "0" * 64}}),
    "a name with a zero byte": ("policy", {"adapters": {"a\0b": "0" * 64}}),
    "an average upwards": ("policy", {"average": {"fingerprint": "0" * 64, "adapters": {"..": "0" * 64}}}),
    "the fingerprint": ("policy", {"fingerprint": "0" * 64}),
    "the fingerprint of the average": ("policy", {"average": {"fingerprint": "0" * 64, "adapters": {}}}),
    "the base": ("policy", {"base": "0" * 64}),
    "iteration of a policy": ("policy", {"iteration": 3}),
    "a checkpoint upwards": ("commit", {"files": {"../x": 1}, "sha256": {"../x": "0" * 64}}),
    "another update": ("commit", {"update": 9}),
    "a file without hash": ("commit", {"files": {"part.safetensors": 20, "other.safetensors": 1}}),
    "another size": ("commit", {"files": {"part.safetensors": 3}}),
    "shapes of text": ("commit", {"tensors": {"a": "b"}}),
    "a shard by name": ("frozen", {"shards": {"abc": "0" * 64}}),
    "a shard of 10^30": ("frozen", {"shards": {"1" * 30: "0" * 64}}),
    "shards of a list": ("frozen", {"shards": []}),
    "the order": ("frozen", {"order_seed": 7}),
    "another plan": ("frozen", {"plan_sha256": "0" * 64}),
    "train of a text": ("frozen", {"train": "x"}),
    "the mean": ("summary", {"mean_reward": 7.0}),
    "the mean as text": ("summary", {"mean_reward": "7"}),
    "the specification": ("summary", {"specification": {"weights": {}}}),
    "samples of true": ("summary", {"samples": True}),
    "another model": ("model", {"base": "1" * 64}),
    "a path of a number": ("model", {"path": 3}),
    "an unknown field": ("model", {"colour": "red"}),
}


@pytest.mark.parametrize(("kind", "changes"), FIELDS.values(), ids=FIELDS)
def test_a_record_that_lies_with_a_true_checksum(kind: str, changes: dict[str, Any], stage: Stage) -> None:
    path = small_run.records(stage)[kind]
    small_run.rewrite(path, **changes)
    assert str(path) in told(stage)


def test_a_record_whose_checksum_is_not_its_own(stage: Stage) -> None:
    path = stage.policy_record_path
    path.write_text(path.read_text().replace('"iteration":0', '"iteration":00'))
    assert str(path) in told(stage)


# --- What is not a plain file -----------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    """A socket: its name may be 107 bytes long, so it is made elsewhere."""
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


def link_out(path: Path) -> None:
    outside = next(folder for folder in path.parents if folder.name == "run").parent / "outside"
    outside.write_bytes(b"{}")
    path.symlink_to(outside)


STRANGE: dict[str, Callable[[Path], None]] = {
    "a pipe": pipe,
    "a socket": listening,
    "a folder": Path.mkdir,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link out of the run": link_out,
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("kind", [*RECORDS, *OTHERS])
def test_what_is_no_plain_file(kind: str, make: Callable[[Path], None], stage: Stage) -> None:
    path = (small_run.records(stage) | small_run.others(stage))[kind]
    path.unlink()
    make(path)
    assert str(path) in told(stage)


@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE)
def test_a_claim_that_is_no_plain_file(make: Callable[[Path], None], stage: Stage) -> None:
    path = stage.path / "work" / "shard-000001.rollout.claim-0001"
    path.parent.mkdir()
    make(path)
    assert all(found.owner is None for found in claims_of(stage))


@pytest.mark.parametrize("changes", [
    {"every": "zz"}, {"every": 1e300}, {"every": -1.0}, {"pid": "x"}, {"pid": 2**70}, {"colour": 1}, {"host": None},
], ids=str)  # fmt: skip
def test_a_claim_of_nobody(changes: dict[str, Any], stage: Stage) -> None:
    path = stage.path / "work" / "shard-000001.rollout.claim-0001"
    small_run.put(path, json.dumps(small_run.OWNER).encode() + b"\n000000000001\n")
    assert [found.owner is not None for found in claims_of(stage)] == [True]
    small_run.put(path, json.dumps(small_run.OWNER | changes).encode() + b"\n000000000001\n")
    assert [found.owner for found in claims_of(stage)] == [None]


@pytest.mark.parametrize("folder", ["policy", "rollout", "train", "score", "rollout/index"])
def test_a_folder_that_leads_out_of_the_run(folder: str, stage: Stage, tmp_path: Path) -> None:
    """Nothing behind it is read, and nothing is written there."""
    from shards.files import publish_new, publish_replace

    outside = tmp_path / "outside"
    (stage.path / folder).rename(outside)
    (stage.path / folder).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    assert f"{stage.path / folder}: a link that leads out of the run" in told(stage)
    for publish in (publish_new, publish_replace):
        with pytest.raises(Damaged, match="a link that leads out of the run"):
            publish(stage.path / folder / "new.json", b"{}")
    assert sorted(outside.rglob("*")) == before


def test_a_link_within_the_run_is_followed(stage: Stage) -> None:
    (stage.path / "train").rename(stage.run_path / "elsewhere")
    (stage.path / "train").symlink_to("../elsewhere")
    assert told(stage) == ""


# --- Tables and indices ----------------------------------------------------------------------------------------------


def forged(stage: Stage, edit: Callable[[dict[str, Any]], None]) -> None:
    """The index with a row edited and true checksums."""
    table, kv = index.read(stage.index_path(0))
    rows = table.to_pylist()
    edit(rows[1])
    vouched(stage, index.to_parquet(rows, kv))


def vouched(stage: Stage, data: bytes) -> None:
    """An index, and a manifest that vouches for it."""
    small_run.put(stage.index_path(0), data)
    facts = {"bytes": len(data), "sha256": sha256_file(stage.index_path(0))}
    small_run.rewrite(stage.manifest_path(0), index=facts)


ROWS: dict[str, dict[str, Any]] = {
    "a record of 7 GiB": {"json_bytes": 7 * 2**30},
    "a record of -1 bytes": {"json_bytes": -1},
    "a record behind the end": {"json_offset": 2**40},
    "a video of 2^40 bytes": {"mp4_bytes": 2**40},
    "a negative offset": {"traj_offset": -5},
    "a shape of 2^31": {"latent_shape": [2**31, 2**31]},
    "a negative shape": {"latent_shape": [-2, -6, 4]},
    "no shape": {"latent_shape": []},
    "a long shape": {"latent_shape": [1] * 40},
    "an object": {"latent_dtype": "object"},
    "a state of 2^50 bytes": {"latent_bytes": 2**50},
    "too many states": {"states": list(range(10_000))},
    "too few checksums": {"latent_crc32": []},
    "null states": {"states": None},
    "a null in a list": {"states": [1, None, 3, 4]},
    "a null shape": {"latent_shape": None},
    "a header of 2^30 bytes": {"traj_header_bytes": 2**30},
    "null offsets": {"json_offset": None},
    "text of 2^45 bytes": {"text_bytes": 2**45},
}


@pytest.mark.parametrize("changes", ROWS.values(), ids=ROWS)
def test_an_index_that_asks_for_the_impossible(changes: dict[str, Any], stage: Stage) -> None:
    forged(stage, lambda row: row.update(changes))
    with pytest.raises(Damaged) as caught:
        open_shard(stage, 0)
    assert str(stage.index_path(0)) in caught.value.problem
    assert str(stage.index_path(0)) in told(stage)


def packed(rows: int, value: str = "", codec: str = "snappy", name: str = "key", dictionary: bool = False) -> bytes:
    """A table of one value, many times: a few bytes that stand for many. Its type says so only with `dictionary`."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int32)), [value])
    sink = pyarrow.BufferOutputStream()
    options = {"compression": codec, "store_schema": dictionary}
    pyarrow.parquet.write_table(pyarrow.table({name: column}), sink, **options)
    return bytes(sink.getvalue())


TABLES = {
    "twelve million rows": lambda: packed(12_000_000),
    "one text of 500 kB in 100,000 rows": lambda: packed(100_000, "x" * 2**19),
    "the same as a dictionary": lambda: packed(100_000, "x" * 2**19, dictionary=True),
    "another codec": lambda: packed(10, codec="zstd"),
    "a footer of 4 GB": lambda: packed(10)[:-8] + b"\xff\xff\xff\xffPAR1",
    "no footer": lambda: b"PAR1" + bytes(8) + b"PAR1",
    "nothing": lambda: b"",
    "text": lambda: b"PAR1 is how a table begins",
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("kind", ["index", "scores", "advantages"])
def test_a_table_that_would_not_fit(kind: str, make: Callable[[], bytes], stage: Stage) -> None:
    path = small_run.others(stage)[kind]
    if kind == "index":
        vouched(stage, make())
    else:
        small_run.put(path, make())
    assert str(path) in told(stage)


VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "weight -5": ("advantages", {"weight": -5.0}),
    "weight inf": ("advantages", {"weight": float("inf")}),
    "no weight": ("advantages", {"weight": None}),
    "advantage 1e300": ("advantages", {"advantage": 1e300}),
    "advantage NaN": ("advantages", {"advantage": float("nan")}),
    "reward 1e300": ("scores", {"reward": 1e300}),
    "reward -inf": ("scores", {"reward": float("-inf")}),
    "another sample": ("scores", {"sample": 7}),
    "another prompt": ("advantages", {"prompt_id": 7}),
}


@pytest.mark.parametrize(("kind", "changes"), VALUES.values(), ids=VALUES)
def test_a_table_of_numbers_that_nobody_gave(kind: str, changes: dict[str, Any], stage: Stage) -> None:
    path = small_run.others(stage)[kind]
    table, kv = parquet.read(path, "")
    rows = table.to_pylist()
    rows[1] |= changes
    table = pyarrow.Table.from_pylist(rows, schema=table.schema)
    small_run.put(path, parquet.encode_sealed(table, kv | {CONTENT: content_sha256(table)}))
    assert str(path) in told(stage)


# --- Samples that contradict themselves ------------------------------------------------------------------------------

LIES: dict[str, dict[str, Any]] = {
    "iteration": {"iteration": 3},
    "prompt_id": {"prompt_id": 4},
    "sample": {"sample": 9},
    "sigmas": {"sigmas": [1.0, 0.9, 0.625, 0.25, 0.0]},
    "window": {"window": [0, 1]},
    "log_prob": {"log_prob": [-3.0, -4.0]},
    "fps": {"fps": 24},
    "height": {"height": 64},
    "seed": {"seed": 5},
    "prompt": {"prompt": "another one"},
    "guidance": {"guidance": [9.0] * 4},
    "law": {"law": "cps"},
    "chunk": {"chunk": [7, 1]},
    "noise_seeds": {"noise_seeds": {"initial": 1}},
    "states": {"states": [0, 1, 2, 3]},
    "fps as text": {"fps": "abc"},
    "no prompt": {"prompt": None},
    "noise_seeds as a list": {"noise_seeds": [1]},
    "a long window": {"window": list(range(50))},
    "experts": {"experts": [5, 5, 5, 5]},
}


@pytest.mark.parametrize("changes", LIES.values(), ids=LIES)
def test_a_record_of_a_sample_that_lies(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shards.spool import Sample
    from tests.support import shard_fixtures

    def lying(stage: Stage, group: str, sample: int, **options: Any) -> Sample:
        made = make_sample(stage, group, sample, **options)
        return Sample(made.key, made.meta | changes, made.video, made.tensors) if sample else made

    monkeypatch.setattr(shard_fixtures, "make_sample", lying)
    refused = ""
    try:
        committed_stage(tmp_path / "run", groups=1, group_size=2)
    except UserError as error:  # it does not even become a shard
        refused = error.problem
    committed = Run(tmp_path / "run").iteration(0)
    assert "i000000-p000000-s01" in refused or "i000000-p000000-s01" in told(committed)
    assert not [problem for problem in verify(committed.run_path) if "-s00" in problem.problem]


# --- Time and memory -------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys, time
import av, numpy, pyarrow.parquet, shards.verify.shards, shards.video
from shards.errors import UserError
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    {action}
except UserError as error:
    print("refused:", error.problem)
used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
assert used < 1, f"{{used:.2f}} GB"
assert time.process_time() - began < 30
"""


def limited(action: str) -> str:
    """What a process says that does this within 30 s of processor time and 1 GB."""
    done = in_python(LIMITED.format(action=action))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_large_black_video_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    from shards.video import encode_mp4

    path = tmp_path / "large.mp4"
    path.write_bytes(encode_mp4(np.zeros((1, 4096, 4096, 3), np.uint8), 16))
    said = limited(f"print(shards.video.load_video({str(path)!r}))")
    assert said.startswith(f"refused: {path}: it is 4096x4096, 1 frames")


def test_tables_that_stand_for_gigabytes(stage: Stage) -> None:
    small_run.put(small_run.others(stage)["scores"], packed(100_000, "x" * 2**19))
    vouched(stage, packed(12_000_000))
    action = f"print(*shards.verify.shards.verify({str(stage.run_path)!r}), sep=chr(10))"
    said = limited(action)
    assert "12000000 rows for 2 samples" in said
    assert str(small_run.others(stage)["scores"]) in said


# --- Prompts ---------------------------------------------------------------------------------------------------------


def text_that_is_none() -> bytes:
    """A Parquet file whose prompt is not UTF-8."""
    parts = [None, pyarrow.py_buffer(bytes([0, 0, 0, 0, 4, 0, 0, 0])), pyarrow.py_buffer(b"ab\xff\xfe")]
    return parquet.encode(pyarrow.table({"prompt": pyarrow.Array.from_buffers(pyarrow.string(), 1, parts)}), {})


def many_prompts() -> bytes:
    """One prompt of 500 kB, a hundred thousand times."""
    return packed(100_000, "x" * 2**19, name="prompt")


PROMPTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a quotation mark": ("p.csv", lambda: b'"'),
    "a header and a quotation mark": ("p.csv", lambda: b'prompt\n"'),
    "nothing": ("p.csv", lambda: b""),
    "a field of 200,000 letters": ("p.csv", lambda: b"prompt\n" + b"x" * 200_000),
    "bytes": ("p.txt", lambda: b"\xff"),
    "nested": ("p.jsonl", lambda: b'{"prompt": ' + b"[" * 5000),
    "bad UTF-8": ("p.parquet", text_that_is_none),
    "a bad name": ("p.parquet", lambda: text_that_is_none().replace(b"prompt", b"prom\xff\xfe")),
    "no Parquet": ("p.parquet", lambda: b"PAR1"),
    "50 GB of prompts": ("p.parquet", many_prompts),
}


@pytest.mark.parametrize(("name", "make"), PROMPTS.values(), ids=PROMPTS)
def test_prompts_that_are_none(name: str, make: Callable[[], bytes], tmp_path: Path) -> None:
    from rollout.prompts.files import Column, read_rows

    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(UserError) as caught:
        list(read_rows(path, Column()))
    assert str(path) in caught.value.problem
