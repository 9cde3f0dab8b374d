"""Integrity of the tables beside the shards: scores and advantages, folder by folder, and the summaries of these."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from shards import parquet, sidecar
from shards.errors import Damaged
from shards.files import sha256_file
from shards.records.kinds import read_summary
from shards.records.opening import COPY
from shards.run import Stage
from shards.verify.problems import Problem, attempt, result


def table_problems(stage: Stage, shard: int, keys: list[str]) -> Iterator[Problem]:
    """Faults of the tables that belong to a shard with these sample keys."""
    paths = [stage.score_path(name, shard) for name in sidecar.scorers(stage)]
    paths += [stage.advantage_path(name, shard) for name in sidecar.specifications(stage)]
    for path in paths:
        if path.exists():
            yield from attempt(sidecar.check, stage, shard, path, keys)
        else:
            yield Problem("incomplete", f"{path} is missing: shard {shard} has no such table", sidecar.SCORE_AGAIN)


def folder_problems(stage: Stage, committed: list[int]) -> Iterator[Problem]:
    """Faults of the folders of tables as such, and of the summaries in them."""
    folders = [stage.scores_dir / name for name in sidecar.scorers(stage)]
    folders += [stage.advantage_dir(name) for name in sidecar.specifications(stage)]
    for folder in folders:
        yield from _strays(folder, committed)
        yield from attempt(_check_one_schema, folder)
    for name in sidecar.scorers(stage):
        yield from attempt(_check_source, stage, name, committed)
    for name in sidecar.specifications(stage):
        yield from attempt(_check_summary, stage, name)


def _check_source(stage: Stage, scorer: str, committed: list[int]) -> None:
    """The source of a reward that is kept beside its scores is the one that its tables name."""
    path = stage.scores_dir / scorer / sidecar.SOURCE
    found = sha256_file(path) if os.path.lexists(path) else None
    for shard in committed if found else ():
        kv, _ = result(sidecar.score_metadata, stage, shard, scorer)  # a damaged table is reported as such
        if kv and kv.get("source_sha256", found) != found:
            table = stage.score_path(scorer, shard)
            raise Damaged(f"{path}: is not the source that {table.name} names (sha256)", f"{COPY}, or delete it")


def _strays(folder: Path, committed: list[int]) -> Iterator[Problem]:
    """Tables of shards that do not exist, and files that are not tables and would break a reader of the folder."""
    known = {f"shard-{shard:06d}.parquet" for shard in committed}
    for name in sorted(os.listdir(folder)):
        if name not in known and not name.startswith((".", "_")):
            yield Problem("damaged", f"{folder / name}: belongs to no committed shard", "delete it")


def _check_summary(stage: Stage, name: str) -> None:
    """The summary of advantages describes the tables beside it, whose own faults are reported elsewhere."""
    path = stage.summary_path(name)
    summary = read_summary(path) if os.path.lexists(path) else None
    read = [result(sidecar.read_table, stage.advantage_path(name, shard))[0] for shard in stage.shards()]
    if summary is None or not read or None in read:
        return
    rewards = [value for table, _ in read for value in table.column("reward").to_pylist()]
    known = [value for value in rewards if value is not None and not math.isnan(value)]
    mean = math.fsum(known) / len(known) if known else None
    expected, largest = {"samples": len(rewards), "mean_reward": mean}, max([1.0, *map(abs, known)])
    differing = [what for what, wanted in expected.items() if not _same(getattr(summary, what), wanted, largest)]
    made = {kv["specification"] for _, kv in read if "specification" in kv}
    if made and made != {json.dumps(summary.specification, sort_keys=True)}:
        differing.append("specification")
    if differing:
        are = "is not that" if len(differing) == 1 else "are not those"
        raise Damaged(f"{path}: {' and '.join(differing)} {are} of the tables beside it", sidecar.SUMMARY_AGAIN)


def _same(found: object, wanted: float | None, largest: float) -> bool:
    """Whether a number is the wanted one but for the order in which numbers up to `largest` were added up."""
    if not isinstance(found, int | float) or wanted is None:
        return found is wanted
    return math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-12 * largest)


def _check_one_schema(folder: Path) -> None:
    first = None
    for path in sorted(folder.glob("shard-*.parquet")):
        schema, problems = result(parquet.schema_of, path, sidecar.SCORE_AGAIN)
        if problems:
            continue  # reported as a damaged table already
        first = first or schema
        if schema != first:
            raise Damaged(
                f"{path}: its columns differ from those of the files beside it", f"delete it; {sidecar.SCORE_AGAIN}"
            )
