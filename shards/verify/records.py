"""Integrity of the records of a stage: what was frozen, links that lead away, and what older versions did not seal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from shards import parquet, sidecar
from shards.errors import ANEW, REPAIR, Damaged, UserError
from shards.process.progress import counted
from shards.reader import read_manifest
from shards.records.kinds import read_checkpoint, read_model_record, read_policy, read_summary, read_train_plan
from shards.records.opening import COPY, refuse_escape
from shards.records.updates import unsealed
from shards.run import COMMIT, Run, Stage
from shards.verify.problems import Problem, attempt, of_error, result


def frozen_problems(stage: Stage) -> Iterator[Problem]:
    """What training froze as its input is what is there."""
    path = stage.train_plan_path
    frozen, problems = result(read_train_plan, path) if os.path.lexists(path) else (None, [])
    yield from problems
    if frozen is None:
        return
    for number, sha256 in frozen.shards.items():
        manifest, problems = result(read_manifest, stage, int(number))
        yield from problems
        if manifest is not None and manifest.tar.sha256 != sha256:
            yield Problem("damaged", f"{path}: shard {number} is not the one that was frozen (sha256)", REPAIR)
    plan, _ = result(stage.plan)
    if plan is not None:
        facts = {
            "iteration": (frozen.iteration, stage.iteration), "order_seed": (frozen.order_seed, plan.seed),
            "policy": (frozen.policy, plan.policy.fingerprint),
            "plan_sha256": (frozen.plan_sha256, stage.plan_sha256()),
        }  # fmt: skip
        for name in (name for name, (found, planned) in facts.items() if found != planned):
            yield Problem("damaged", f"{path}: {name} is not that of {stage.plan_path}", ANEW)


def model_problems(run: Run, stages: list[Stage]) -> Iterator[Problem]:
    """model.json names the model that the plans name."""
    path = run.model_path
    if not os.path.lexists(path):
        return
    record, problems = result(read_model_record, path)
    yield from problems
    for stage in stages if record is not None else ():
        plan, _ = result(stage.plan)
        if plan is not None and plan.policy.base != record.base:
            hint = f"{COPY}, or delete it"
            yield Problem("damaged", f"{path}: its model is not that of {stage.plan_path}", hint)
            return
    if record is not None and record.content_sha256 is None:
        yield _unvouched([path])


def links_out(folder: Path) -> Iterator[Problem]:
    """Links in a stage that lead out of its run, or nowhere; what lies behind them is not read and not written."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_symlink():
                yield from attempt(refuse_escape, entry.path)
                if not os.path.exists(entry.path):
                    yield Problem("damaged", f"{entry.path}: a link to nothing", f"{COPY}, or delete it")
            elif entry.is_dir(follow_symlinks=False):
                yield from links_out(Path(entry.path))


def unvouched(stage: Stage) -> Iterator[Problem]:
    """Files that were written before each had a checksum of its own; damaged ones are reported elsewhere."""
    found: list[Path] = []
    readers = {
        read_policy: [stage.policy_record_path], read_train_plan: [stage.train_plan_path],
        read_summary: [stage.summary_path(name) for name in sidecar.specifications(stage)],
        read_checkpoint: sorted(stage.policy_dir.glob(f"trainer/*/update-*/{COMMIT}")),
    }  # fmt: skip
    for reader, paths in readers.items():
        for path in filter(os.path.lexists, paths):
            record, _ = result(reader, path)
            found += [path] if record is not None and record.content_sha256 is None else []
    for shard in stage.shards():
        manifest, _ = result(read_manifest, stage, shard)
        found += [stage.manifest_path(shard)] if manifest is not None and manifest.content_sha256 is None else []
        tables = [stage.score_path(name, shard) for name in sidecar.scorers(stage)]
        tables += [stage.advantage_path(name, shard) for name in sidecar.specifications(stage)]
        found += [path for path in filter(os.path.lexists, tables) if _is_unsealed(path)]
    with suppress(Damaged):
        found += [stage.metrics_path] if unsealed(stage.metrics_path) else []
    if found:
        yield _unvouched(found)
    yield from _unvouched_weights(stage)


def _unvouched_weights(stage: Stage) -> Iterator[Problem]:
    """Weights whose checksums are in a damaged record; the record itself is reported elsewhere."""
    record = stage.policy_record_path
    if record.exists() and result(read_policy, record)[0] is None:
        weights = sorted(stage.policy_dir.rglob("*.safetensors"))
        for path in (one for one in weights if "trainer" not in one.relative_to(stage.policy_dir).parts):
            problem = f"{path}: its checksum is in {record}, which is damaged"
            yield Problem("unvouched", problem, "restore the record from a copy, then verify again")


def policy_chain(stage: Stage, before: Stage) -> Iterator[Problem]:
    """A stage was sampled by the policy that the iteration before trained, unless it was planned for an older one."""
    plan, _ = result(stage.plan)
    if plan is None or plan.policy.lag_of != stage.iteration or not before.policy_record_path.exists():
        return
    try:
        record = read_policy(before.policy_record_path)
    except UserError as error:
        yield of_error(error)
        return
    known = {record.fingerprint} | ({record.average.fingerprint} if record.average else set())
    if plan.policy.fingerprint not in known:
        problem = f"{stage.plan_path}: its policy is not the one of {before.policy_record_path}"
        yield Problem("damaged", problem, "restore the policy of that iteration, or sample this stage again")


def _is_unsealed(path: Path) -> bool:
    kv, _ = result(parquet.metadata, path, COPY)
    return kv is not None and parquet.FILE not in kv


def _unvouched(paths: list[Path]) -> Problem:
    more = f" and {counted(len(paths) - 1, 'more file')}" if len(paths) > 1 else ""
    problem = f"{paths[0]}{more}: written before files had checksums of their own"
    return Problem("unvouched", problem, "what they say of themselves is taken as it is; new stages are vouched for")
