"""Integrity: reads every byte of a run, a stage or a shard and lists all that is not as it was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shards import index
from shards.committed_tar import map_plain, scan_tar
from shards.errors import REPAIR, Damaged
from shards.locate import Place, locate
from shards.locks import TEMPORARY, is_abandoned
from shards.process.progress import counted
from shards.reader import checked_index, read_manifest
from shards.records.kinds import Manifest
from shards.run import Run, Stage
from shards.store.files import files_at
from shards.verify.policy import policy_faults
from shards.verify.problems import LEFTOVER, Problem, attempt, of_error, result
from shards.verify.records import frozen_problems, links_out, model_problems, policy_chain, unvouched
from shards.verify.samples import sample_faults
from shards.verify.tables import folder_problems, table_problems
from shards.workers.leftovers import leftovers

if TYPE_CHECKING:
    import pyarrow


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
        return attempt(scan_tar, place.tar)
    if place.shard is not None:
        return list(_shard_problems(place.stages[0], place.shard))
    problems = [problem for stage in place.stages for problem in _stage_problems(stage)]
    if run := place.run:
        problems += attempt(_check_config, run) if run.config_path.exists() else []
        problems += model_problems(run, list(place.stages))
        problems += [problem for stage in place.stages for problem in _chain(run, stage)]
        problems += _leftovers(run.path)
    return list(dict.fromkeys(problems))  # a file that is not there fails every check in the same words


def _stage_problems(stage: Stage) -> Iterator[Problem]:
    yield from attempt(_check_plan, stage)
    for path in leftovers(stage):
        yield Problem("leftover", f"{path}: left by a killed writer", LEFTOVER)
    yield from links_out(stage.path)
    committed = stage.shards()
    for shard in committed:
        yield from _shard_problems(stage, shard)
    yield from attempt(_check_one_policy, stage, committed)
    yield from _uncommitted(stage, committed)
    yield from folder_problems(stage, committed)
    yield from frozen_problems(stage)
    yield from map(of_error, policy_faults(stage))
    yield from unvouched(stage)


def _chain(run: Run, stage: Stage) -> Iterator[Problem]:
    if stage.iteration:
        yield from policy_chain(stage, run.iteration(stage.iteration - 1))


def _shard_problems(stage: Stage, shard: int) -> Iterator[Problem]:
    """Faults of one shard and of the tables that belong to it."""
    with stage.files.borrowed(stage.shard_path(shard)):
        yield from _faults(stage, shard)


def _faults(stage: Stage, shard: int) -> Iterator[Problem]:
    manifest, problems = result(read_manifest, stage, shard)
    yield from problems
    rows, problems = result(scan_tar, stage.shard_path(shard))
    yield from problems
    table = None
    if manifest is None:
        yield _without_manifest(stage, shard)
    else:
        yield from attempt(_check_manifest, stage, manifest)
        yield from attempt(_check_bytes, stage, shard, manifest)
        table, problems = result(checked_index, stage, shard, manifest)
        yield from problems
    if rows is not None:
        yield from attempt(_check_rows, stage, shard, manifest, rows)
        yield from _sample_problems(stage, shard, rows)
        if table is not None:
            yield from attempt(_check_index, stage.index_path(shard), table, rows)
    keys = [row["key"] for row in rows] if rows is not None else table.column("key").to_pylist() if table else None
    if keys is None and manifest is None:
        keys, _ = result(stage.keys, shard)  # all that is left
    if keys is not None:
        yield from table_problems(stage, shard, keys)
    if stage.work_path(shard).is_dir():
        yield Problem("leftover", f"{stage.work_path(shard)}: the spool of a committed shard is still there", LEFTOVER)


def _without_manifest(stage: Stage, shard: int) -> Problem:
    """What a damaged manifest leaves without a checksum."""
    paths = f"{stage.shard_path(shard)} and {stage.index_path(shard)}"
    problem = f"{paths}: their checksums are in {stage.manifest_path(shard)}, which is damaged"
    return Problem("unvouched", problem, "restore the manifest from a copy, then verify again")


def _check_manifest(stage: Stage, manifest: Manifest) -> None:
    """What the manifest says of its stage is what the plan says."""
    path, plan = stage.manifest_path(manifest.shard), stage.plan()
    if plan is None:
        return
    if manifest.plan_sha256 != stage.plan_sha256():
        raise Damaged(f"{path}: committed for another plan.json", REPAIR)
    promised = plan.shards[manifest.shard] if manifest.shard < len(plan.shards) else ()
    facts = {
        "kind": (manifest.kind, plan.kind), "iteration": (manifest.iteration, plan.iteration),
        "groups": (manifest.groups, promised), "group_size": (manifest.group_size, plan.group_size),
        "policy": (manifest.policy, plan.policy),
    }  # fmt: skip
    names = [name for name, (found, planned) in facts.items() if found != planned]
    if names:
        raise Damaged(f"{path}: {', '.join(names)} {'is' if len(names) == 1 else 'are'} not as in plan.json", REPAIR)


def _check_bytes(stage: Stage, shard: int, manifest: Manifest) -> None:
    path, expected = stage.shard_path(shard), manifest.tar
    buffer = map_plain(path)
    if len(buffer) != expected.bytes:
        raise Damaged(f"{path}: has {len(buffer)} bytes, committed were {expected.bytes}", REPAIR)
    if hashlib.sha256(buffer).hexdigest() != expected.sha256:
        raise Damaged(f"{path}: is not what was committed (sha256)", REPAIR)


def _check_rows(stage: Stage, shard: int, manifest: Manifest | None, rows: list[index.Row]) -> None:
    """Keys are those of the plan and of the manifest, where that one can be read."""
    path, keys = stage.shard_path(shard), [row["key"] for row in rows]
    if keys != stage.keys(shard):
        raise Damaged(f"{path}: its samples are not those of plan.json, or in another order", REPAIR)
    if manifest and (manifest.samples, manifest.keys_sha256) != (len(keys), index.keys_sha256(keys)):
        raise Damaged(f"{stage.manifest_path(shard)}: its samples are not those of {path.name}", REPAIR)


def _sample_problems(stage: Stage, shard: int, rows: list[index.Row]) -> Iterator[Problem]:
    plan, _ = result(stage.plan)  # a damaged one is reported as such
    if plan is not None:
        path = stage.shard_path(shard)
        for fault in sample_faults(map_plain(path), rows, plan, stage.plan_sha256(), str(path)):
            yield of_error(fault)


def _check_index(path: Path, table: pyarrow.Table, rows: list[index.Row]) -> None:
    found = table.to_pylist()
    for row, other in zip(rows, found, strict=False):
        if row != other:
            names = [name for name in row if row[name] != other[name]]
            raise Damaged(f"{path}: {row['key']} differs from the tar in {', '.join(names)}", REPAIR)
    if len(rows) != len(found):
        raise Damaged(f"{path}: has {len(found)} rows for {len(rows)} samples", REPAIR)


def _check_config(run: Run) -> None:
    _ = run.config


def _check_plan(stage: Stage) -> None:
    """There is a plan where there are shards; reading one checks it."""
    if stage.plan() is None and stage.shards():
        raise Damaged(f"{stage.plan_path} is missing", "restore it from a copy")


def _check_one_policy(stage: Stage, committed: list[int]) -> None:
    """All shards of a stage were sampled by one policy."""
    found: dict[str, int] = {}
    for shard in committed:
        manifest, _ = result(read_manifest, stage, shard)
        if manifest is not None:
            found.setdefault(manifest.policy.fingerprint, shard)
    if len(found) > 1:
        shards = ", ".join(str(shard) for shard in found.values())
        raise Damaged(f"{stage.path}: shards {shards} were sampled by different policies", REPAIR)


def _uncommitted(stage: Stage, committed: list[int]) -> Iterator[Problem]:
    names = {stage.shard_path(shard).name for shard in committed} | {"index", "manifest"}
    folder = stage.rollout_dir
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        if name not in names and not name.startswith("."):
            yield Problem(
                "incomplete", f"{folder / name}: no manifest commits it", "`rushes rollout` completes the shard"
            )
    missing = stage.expected() - len(committed) if stage.plan_path.exists() and not attempt(stage.plan) else 0
    if missing > 0:
        yield Problem(
            "incomplete",
            f"{stage.path}: {counted(missing, 'shard')} not sampled yet",
            "`rushes rollout` samples what is missing",
        )


def _leftovers(folder: Path) -> list[Problem]:
    """Private files of dead writers right below a run."""
    paths = [path for path in sorted(folder.glob(f"{TEMPORARY}*")) if is_abandoned(path)]
    return [Problem("leftover", f"{path}: left by a killed writer", LEFTOVER) for path in paths]
