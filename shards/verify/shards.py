"""Integrity: reads every byte of a run, a stage or a shard and lists all that is not as it was written."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shards import index, sidecar
from shards.errors import REPAIR, Damaged, UserError
from shards.files import read_json
from shards.locate import Place, locate
from shards.locks import TEMPORARY, is_abandoned
from shards.process.progress import counted
from shards.reader import checked_index, read_manifest
from shards.run import Run, Stage
from shards.source import map_plain, scan_tar
from shards.store.files import files_at
from shards.verify.policy import policy_faults

if TYPE_CHECKING:
    import pyarrow

Kind = Literal["damaged", "incomplete", "leftover"]
LEFTOVER = "delete it, or run the stage again, which sweeps"


@dataclass(frozen=True)
class Problem:
    """One fault. `damaged` is an error; `incomplete` is work that can be done; `leftover` wastes space and no more."""

    kind: Kind
    problem: str
    """What is wrong, with the file and the member it is wrong in."""
    hint: str

    def __str__(self) -> str:
        """As a line for people."""
        return f"{self.kind}: {self.problem} (hint: {self.hint})"


def verify(path: str | Path) -> list[Problem]:
    """All faults of a run, a stage or a shard. Reads everything once; needs no model and no torch.

    What lies at a URL is fetched anew, the tars one by one, so that it is the store that is verified and not the cache.
    Raises UserError when `path` is none of these. Faults do not raise: an empty list means that all is well.
    """
    chosen, here = files_at(path)
    with chosen.afresh(here) as (files, fresh):
        problems = _verify(locate(fresh, files))
        return [Problem(one.kind, files.shown(one.problem), files.shown(one.hint)) for one in problems]


def _verify(place: Place) -> list[Problem]:
    if place.tar is not None:
        return _attempt(scan_tar, place.tar)
    if place.shard is not None:
        return list(_shard_problems(place.stages[0], place.shard))
    problems = [problem for stage in place.stages for problem in _stage_problems(stage)]
    if run := place.run:
        problems += _attempt(_check_config, run) if run.config_path.exists() else []
        problems += _attempt(_check_base, run, place.stages) if run.model_path.exists() else []
        problems += _leftovers(run.path, recursive=False)
    return list(dict.fromkeys(problems))  # a file that is not there fails every check in the same words


def _stage_problems(stage: Stage) -> Iterator[Problem]:
    yield from _attempt(_check_plan, stage)
    yield from _leftovers(stage.path, recursive=True)
    committed = stage.shards()
    for shard in committed:
        yield from _shard_problems(stage, shard)
    yield from _attempt(_check_one_policy, stage, committed)
    yield from _uncommitted(stage, committed)
    for folder in [*(stage.scores_dir / name for name in sidecar.scorers(stage)), *_specification_folders(stage)]:
        yield from _strays(folder, committed)
        yield from _attempt(_check_one_schema, folder)
    for name in sidecar.specifications(stage):
        yield from _attempt(_check_summary, stage, name)
    yield from _attempt(_check_frozen, stage)
    yield from map(_problem, policy_faults(stage))


def _shard_problems(stage: Stage, shard: int) -> Iterator[Problem]:
    """Faults of one shard and of the tables that belong to it."""
    with stage.files.borrowed(stage.shard_path(shard)):
        yield from _faults(stage, shard)


def _faults(stage: Stage, shard: int) -> Iterator[Problem]:
    try:
        manifest = read_manifest(stage, shard)
    except UserError as error:
        yield _problem(error)
        return
    yield from _attempt(_check_bytes, stage, shard, manifest)
    rows, problems = _result(scan_tar, stage.shard_path(shard))
    table, more = _result(checked_index, stage, shard, manifest)
    yield from [*problems, *more]
    if rows is not None:
        yield from _attempt(_check_rows, stage, shard, manifest, rows)
        if table is not None:
            yield from _attempt(_check_index, stage.index_path(shard), table, rows)
    keys = [row["key"] for row in rows] if rows is not None else table.column("key").to_pylist() if table else None
    if keys is not None:
        yield from _sidecar_problems(stage, shard, keys)
    if stage.work_path(shard).is_dir():
        yield Problem("leftover", f"{stage.work_path(shard)}: the spool of a committed shard is still there", LEFTOVER)


def _check_bytes(stage: Stage, shard: int, manifest: dict[str, Any]) -> None:
    path, expected = stage.shard_path(shard), manifest["tar"]
    buffer = map_plain(path)
    if len(buffer) != expected["bytes"]:
        raise Damaged(f"{path}: has {len(buffer)} bytes, committed were {expected['bytes']}", REPAIR)
    if hashlib.sha256(buffer).hexdigest() != expected["sha256"]:
        raise Damaged(f"{path}: is not what was committed (sha256)", REPAIR)


def _check_rows(stage: Stage, shard: int, manifest: dict[str, Any], rows: list[index.Row]) -> None:
    """Keys are those of the plan, and every record is of this plan and this policy."""
    path, keys = stage.shard_path(shard), [row["key"] for row in rows]
    if keys != stage.keys(shard):
        raise Damaged(f"{path}: its samples are not those of plan.json, or in another order", REPAIR)
    if (manifest["samples"], manifest["keys_sha256"]) != (len(keys), index.keys_sha256(keys)):
        raise Damaged(f"{stage.manifest_path(shard)}: its samples are not those of {path.name}", REPAIR)
    if manifest["plan_sha256"] != stage.plan_sha256():
        raise Damaged(f"{stage.manifest_path(shard)}: committed for another plan.json", REPAIR)
    buffer = map_plain(path)
    wanted = {"plan_sha256": manifest["plan_sha256"], "policy": (manifest["policy"] or {}).get("fingerprint")}
    for row in rows:
        record = json.loads(bytes(buffer[row["json_offset"] : row["json_offset"] + row["json_bytes"]]))
        for name, value in wanted.items():
            if name in record and record[name] != value:
                raise Damaged(f"{path}: {row['key']}.json was sampled with another {name}", REPAIR)


def _check_index(path: Path, table: pyarrow.Table, rows: list[index.Row]) -> None:
    found = table.to_pylist()
    for row, other in zip(rows, found, strict=False):
        if row != other:
            names = [name for name in row if row[name] != other[name]]
            raise Damaged(f"{path}: {row['key']} differs from the tar in {', '.join(names)}", REPAIR)
    if len(rows) != len(found):
        raise Damaged(f"{path}: has {len(found)} rows for {len(rows)} samples", REPAIR)


def _sidecar_problems(stage: Stage, shard: int, keys: list[str]) -> Iterator[Problem]:
    paths = [stage.score_path(name, shard) for name in sidecar.scorers(stage)]
    paths += [stage.advantage_path(name, shard) for name in sidecar.specifications(stage)]
    for path in paths:
        if path.exists():
            yield from _attempt(sidecar.check, stage, shard, path, keys)
        else:
            yield Problem("incomplete", f"{path} is missing: shard {shard} has no such table", sidecar.SCORE_AGAIN)


def _strays(folder: Path, committed: list[int]) -> Iterator[Problem]:
    """Tables of shards that do not exist, and files that are not tables and would break a reader of the folder."""
    known = {f"shard-{shard:06d}.parquet" for shard in committed}
    for name in sorted(os.listdir(folder)):
        if name not in known and not name.startswith((".", "_")):
            yield Problem("damaged", f"{folder / name}: belongs to no committed shard", "delete it")


def _check_summary(stage: Stage, name: str) -> None:
    """The summary of advantages tells of the tables beside it, whose own faults are told elsewhere."""
    path = stage.summary_path(name)
    summary = read_json(path) if path.exists() else None
    read = [_result(sidecar.read_table, stage.advantage_path(name, shard))[0] for shard in stage.shards()]
    if summary is None or not read or None in read:
        return
    rewards = [value for table, _ in read for value in table.column("reward").to_pylist()]
    known = [value for value in rewards if value is not None and not math.isnan(value)]
    mean = math.fsum(known) / len(known) if known else None
    expected, largest = {"samples": len(rewards), "mean_reward": mean}, max([1.0, *map(abs, known)])
    differing = [what for what, wanted in expected.items() if not _same(summary.get(what), wanted, largest)]
    if differing:
        are = "is not that" if len(differing) == 1 else "are not those"
        raise Damaged(f"{path}: {' and '.join(differing)} {are} of the tables beside it", sidecar.SUMMARY_AGAIN)


def _same(found: object, wanted: float | None, largest: float) -> bool:
    """Whether a number is the wanted one but for the order in which numbers up to `largest` were added up."""
    if not isinstance(found, int | float) or wanted is None:
        return found is wanted
    return math.isclose(found, wanted, rel_tol=1e-9, abs_tol=1e-12 * largest)


def _check_one_schema(folder: Path) -> None:
    import pyarrow.parquet

    first = None
    for path in sorted(folder.glob("shard-*.parquet")):
        try:
            schema = pyarrow.parquet.read_schema(path).remove_metadata()
        except (OSError, pyarrow.ArrowException):
            continue  # reported as a damaged table already
        first = first or schema
        if schema != first:
            raise Damaged(
                f"{path}: its columns differ from those of the files beside it", f"delete it; {sidecar.SCORE_AGAIN}"
            )


def _check_config(run: Run) -> None:
    _ = run.config


def _check_base(run: Run, stages: list[Stage]) -> None:
    """model.json names the model that the plans name."""
    path = run.model_path
    base = read_json(path).get("base")
    for stage in stages:
        plan, _ = _result(stage.plan)
        if plan is not None and plan.policy.base != base:
            raise Damaged(f"{path}: its model is not that of {stage.plan_path}", "restore it from a copy, or delete it")


def _check_plan(stage: Stage) -> None:
    """There is a plan where there are shards; reading one checks it."""
    if stage.plan() is None and stage.shards():
        raise Damaged(f"{stage.plan_path} is missing", "restore it from a copy")


def _check_one_policy(stage: Stage, committed: list[int]) -> None:
    """All shards of a stage were sampled by one policy."""
    found: dict[str, int] = {}
    for shard in committed:
        manifest, _ = _result(read_manifest, stage, shard)
        if manifest is not None:
            found.setdefault(str((manifest["policy"] or {}).get("fingerprint")), shard)
    if len(found) > 1:
        shards = ", ".join(str(shard) for shard in found.values())
        raise Damaged(f"{stage.path}: shards {shards} were sampled by different policies", REPAIR)


def _check_frozen(stage: Stage) -> None:
    """The shards training froze as its input are those that are there."""
    path = stage.train_plan_path
    frozen = read_json(path).get("shards", {}) if path.exists() else {}
    for number, sha256 in frozen.items():
        if read_manifest(stage, int(number))["tar"]["sha256"] != sha256:
            raise Damaged(f"{path}: shard {number} is not the one that was frozen (sha256)", REPAIR)


def _uncommitted(stage: Stage, committed: list[int]) -> Iterator[Problem]:
    names = {stage.shard_path(shard).name for shard in committed} | {"index", "manifest"}
    folder = stage.rollout_dir
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        if name not in names and not name.startswith("."):
            yield Problem(
                "incomplete", f"{folder / name}: no manifest commits it", "`rushes rollout` completes the shard"
            )
    missing = stage.expected() - len(committed) if stage.plan_path.exists() and not _attempt(stage.plan) else 0
    if missing > 0:
        yield Problem(
            "incomplete",
            f"{stage.path}: {counted(missing, 'shard')} not sampled yet",
            "`rushes rollout` samples what is missing",
        )


def _leftovers(folder: Path, *, recursive: bool) -> list[Problem]:
    """Private files of writers that are dead."""
    paths = sorted(folder.rglob(f"{TEMPORARY}*") if recursive else folder.glob(f"{TEMPORARY}*"))
    return [Problem("leftover", f"{path}: left by a killed writer", LEFTOVER) for path in paths if is_abandoned(path)]


def _specification_folders(stage: Stage) -> list[Path]:
    return [stage.advantage_dir(name) for name in sidecar.specifications(stage)]


def _attempt(check: Callable[..., object], *arguments: Any) -> list[Problem]:
    return _result(check, *arguments)[1]


def _result(check: Callable[..., Any], *arguments: Any) -> tuple[Any, list[Problem]]:
    """What a check returns, and the fault it raised."""
    try:
        return check(*arguments), []
    except UserError as error:
        return None, [_problem(error)]


def _problem(error: UserError) -> Problem:
    return Problem("damaged", error.problem, error.hint)
