"""Tables beside the shards, keyed by sample: scores and advantages, one file per shard, replaced whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from shards import parquet
from shards.errors import Damaged, UserError
from shards.files import stamp_of
from shards.locks import sweep_temporary
from shards.plan import SAMPLE_KEY, SCHEMA
from shards.reader import checked_index, read_manifest
from shards.records.opening import read_plain
from shards.run import Stage

if TYPE_CHECKING:
    import pandas
    import pyarrow

IDENTITY = {"key": "string", "prompt_id": "int64", "sample": "int64"}
LARGEST = 1e100  # of a reward: its square is still a number
RANGES = {"reward": (-LARGEST, LARGEST), "advantage": (-1e9, 1e9), "weight": (0.0, 1e9)}  # of columns
SCORES = IDENTITY | {"reward": "double", "status": "string"}  # then one double per component, then perhaps text
ADVANTAGES = IDENTITY | {"advantage": "double", "weight": "double", "reward": "double", "reason": "string"}
TEXT = "text"
SOURCE = "_source.py"  # of a reward of one's own, beside its scores
CONTENT = "content_sha256"
SCORE_AGAIN = "`rushes score` fills in what is missing and keeps the rest"
SUMMARY_AGAIN = "delete it; `rushes score` writes it again"


def write_scores(stage: Stage, shard: int, scorer: str, frame: pandas.DataFrame, kv: dict[str, str]) -> None:
    """Write the scores of one shard. Columns: SCORES, one double per component, perhaps `text`.

    NaN is a missing reward; its status says why. `kv` (scorer, version, fingerprint, …) is kept in the file together
    with the sha256 of the shard. Raises UserError unless the rows are exactly the samples of the shard and the columns
    are those of the files beside it; RunFailed when the disk is full.
    """
    components = [name for name in frame.columns if name not in SCORES and name != TEXT]
    columns = SCORES | dict.fromkeys(components, "double") | ({TEXT: "string"} if TEXT in frame else {})
    _write(stage, shard, stage.score_path(scorer, shard), frame, columns, kv)


def write_advantages(stage: Stage, shard: int, specification: str, frame: pandas.DataFrame, kv: dict[str, str]) -> None:
    """Write the advantages of one shard. Columns: ADVANTAGES; `advantage` and `weight` are finite. As write_scores."""
    for name in ("advantage", "weight"):
        if not frame[name].abs().lt(float("inf")).all():
            raise UserError(
                f"shard {shard}: {name} is not finite for some samples", "give them weight 0 and advantage 0"
            )
    _write(stage, shard, stage.advantage_path(specification, shard), frame, ADVANTAGES, kv)


def read_scores(stage: Stage, scorer: str, shards: Sequence[int] | None = None) -> pandas.DataFrame:
    """Scores of one scorer, rows in the order of the shards (all committed ones unless given).

    Raises Damaged, naming the file, when one is missing, altered or made for other shards.
    """
    return _read(stage, [(shard, stage.score_path(scorer, shard)) for shard in _chosen(stage, shards)])


def score_metadata(stage: Stage, shard: int, scorer: str) -> dict[str, str]:
    """What a score file says about itself: scorer, version, options, what it took. Empty when there is no such file.

    Raises Damaged when the file cannot be read.
    """
    path = stage.score_path(scorer, shard)
    return parquet.metadata(path, SCORE_AGAIN) if path.exists() else {}


def read_advantages(stage: Stage, specification: str, shards: Sequence[int] | None = None) -> pandas.DataFrame:
    """Advantages of one specification; as read_scores."""
    return _read(stage, [(shard, stage.advantage_path(specification, shard)) for shard in _chosen(stage, shards)])


def scored(stage: Stage, shard: int, scorer: str) -> bool:
    """Whether the scores of one shard are there and were made for the shard as it is."""
    return _done(stage, shard, stage.score_path(scorer, shard))


def advantaged(stage: Stage, shard: int, specification: str) -> bool:
    """Whether the advantages of one shard are there and were made for the shard as it is."""
    return _done(stage, shard, stage.advantage_path(specification, shard))


def scorers(stage: Stage) -> list[str]:
    """Directory names of the scorers that have scored something, sorted."""
    return _directories(stage, stage.scores_dir)


def specifications(stage: Stage) -> list[str]:
    """Advantage specifications that have a directory, sorted."""
    return _directories(stage, stage.advantages_dir)


def read_table(path: Path) -> tuple[pyarrow.Table, dict[str, str]]:
    """One sidecar and its metadata, its values proven by their hash. Raises Damaged.

    Page checksums do not cover all of a Parquet file: a flipped bit can change values without an error.
    """
    try:
        data = read_plain(path, parquet.MOST_BYTES, SCORE_AGAIN)
    except FileNotFoundError as error:
        raise Damaged(f"{path}: the file does not exist", SCORE_AGAIN) from error
    table, kv = parquet.read(path, SCORE_AGAIN, data)
    try:
        genuine = kv.get(CONTENT) == content_sha256(table)
    except ValueError:  # bytes that are not text any more
        genuine = False
    if parquet.FILE in kv and not parquet.is_sealed(data, kv):
        raise Damaged(f"{path}: the table is damaged: the file is not the one written (sha256)", SCORE_AGAIN)
    if not genuine:
        raise Damaged(f"{path}: the table is damaged: its values are not those written (sha256)", SCORE_AGAIN)
    return table, kv


def content_sha256(table: pyarrow.Table) -> str:
    """Hash of the names and values of a table; json writes every float so that it reads back the same, NaN included."""
    return hashlib.sha256(json.dumps(table.to_pydict(), default=repr).encode()).hexdigest()


def check(stage: Stage, shard: int, path: Path, keys: list[str]) -> pyarrow.Table:
    """One sidecar table. Raises Damaged unless it is whole, made for this shard, and has one row per key in order."""
    table, kv = read_table(path)
    if kv.get("shard_sha256") != read_manifest(stage, shard).tar.sha256:
        raise Damaged(f"{path}: made for another shard {shard} (sha256)", f"delete it; {SCORE_AGAIN}")
    if "key" not in table.column_names:
        raise Damaged(f"{path}: has no column key", f"delete it; {SCORE_AGAIN}")
    _check_keys(table.column("key").to_pylist(), keys, str(path))
    _check_values(table, str(path))
    return table


def _check_values(table: pyarrow.Table, where: str) -> None:
    """Raise Damaged for what no scorer and no rule of advantages gives."""
    again = f"delete it; {SCORE_AGAIN}"
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    numbers = [tuple(map(int, SAMPLE_KEY.fullmatch(key).groups()[1:])) for key in columns["key"]]  # type: ignore[union-attr]
    if numbers != [*zip(columns.get("prompt_id", []), columns.get("sample", []), strict=False)]:
        raise Damaged(f"{where}: prompt_id and sample are not those of its keys", again)
    for name, (least, most) in RANGES.items():
        if name not in columns:
            continue
        for key, value in zip(columns["key"], columns[name], strict=True):
            if value is None or value != value:
                if name != "reward":
                    raise Damaged(f"{where}: {name} is missing for some samples", again)
            elif not least <= value <= most:
                raise Damaged(f"{where}: {name} of {key} is {value:g}, not from {least:g} to {most:g}", again)


def _write(
    stage: Stage, shard: int, path: Path, frame: pandas.DataFrame, columns: dict[str, str], kv: dict[str, str]
) -> None:
    table = _as_table(frame, columns, str(path))
    manifest = read_manifest(stage, shard)
    expected = checked_index(stage, shard, manifest).column("key").to_pylist()
    order = {key: position for position, key in enumerate(expected)}
    keys = table.column("key").to_pylist()
    _check_keys(sorted(keys, key=lambda key: order.get(key, len(order))), expected, str(path))
    table = table.take(sorted(range(len(keys)), key=lambda row: order[keys[row]]))
    _check_neighbours(path, table.schema)
    sweep_temporary(path.parent)
    kv = {**kv, "schema": str(SCHEMA), "shard_sha256": manifest.tar.sha256, CONTENT: content_sha256(table)}
    stage.files.publish_replace(path, parquet.encode_sealed(table, kv))


def _as_table(frame: pandas.DataFrame, columns: dict[str, str], where: str) -> pyarrow.Table:
    import pyarrow

    missing = [name for name in columns if name not in frame]
    extra = [name for name in frame if name not in columns]
    if missing or extra:
        raise UserError(
            f"{where}: columns missing: {missing}, not expected: {extra}", "shards/README.md lists the columns"
        )
    types = {"string": pyarrow.string(), "int64": pyarrow.int64(), "double": pyarrow.float64()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    try:
        return pyarrow.Table.from_pandas(frame[list(columns)], schema=schema, preserve_index=False, nthreads=1)
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise UserError(f"{where}: {error}", "shards/README.md lists the columns and their types") from error


def _check_keys(found: Sequence[object], expected: Sequence[str], where: str) -> None:
    if found == expected:
        return
    extra, missing = sorted(set(map(str, found)) - set(expected)), sorted(set(expected) - set(found))
    faults = [f"{len(found)} rows for {len(expected)} samples"] if len(found) != len(expected) else []
    faults += [f"{name} {', '.join(keys[:3])}" for name, keys in (("extra", extra), ("missing", missing)) if keys]
    raise Damaged(
        f"{where}: does not match the shard: {'; '.join(faults) or 'other order'}", f"delete it; {SCORE_AGAIN}"
    )


def _check_neighbours(path: Path, schema: pyarrow.Schema) -> None:
    """All files of a directory have one schema: readers of a directory take that of the first file by name."""
    for other in sorted(path.parent.glob("shard-*.parquet")):
        if other != path:
            found = parquet.schema_of(other, f"delete it; {SCORE_AGAIN}")
            if found != schema:
                raise UserError(
                    f"{path.parent}: holds columns {found.names}, not {schema.names}",
                    "a reward that changes its components must change its version",
                )
            return


def _read(stage: Stage, files: list[tuple[int, Path]]) -> pandas.DataFrame:
    import pyarrow

    tables: list[pyarrow.Table] = []
    for shard, path in files:
        keys = checked_index(stage, shard, read_manifest(stage, shard)).column("key").to_pylist()
        tables.append(check(stage, shard, path, keys))
        if tables[-1].schema != tables[0].schema:
            raise Damaged(f"{path}: its columns are not those of {files[0][1].name}", f"delete it; {SCORE_AGAIN}")
    if not tables:
        raise UserError(f"{stage.path} has no committed shard", "`rushes rollout` samples them")
    return pyarrow.concat_tables(tables).to_pandas()


def _done(stage: Stage, shard: int, path: Path) -> bool:
    if not path.exists():
        stage.files.refresh(path.parent)
    if not path.exists():
        return False
    stamp = stamp_of(path)
    return stamp is not None and _made_for(path, stamp) == read_manifest(stage, shard).tar.sha256


@lru_cache(maxsize=2**14)
def _made_for(path: Path, stamp: tuple[int, ...]) -> str | None:
    """sha256 of the tar a table was made for, None when it is damaged: proven once for each state of its file."""
    try:
        return read_table(path)[1].get("shard_sha256")
    except Damaged:
        return None


def _chosen(stage: Stage, shards: Sequence[int] | None) -> Sequence[int]:
    return stage.shards() if shards is None else shards


def _directories(stage: Stage, path: Path) -> list[str]:
    stage.files.refresh(path)
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
