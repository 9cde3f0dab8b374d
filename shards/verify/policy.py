"""Integrity of what training leaves: the weights, their averages, the checkpoints of the trainer and its log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from shards.errors import ANEW, Damaged, UserError
from shards.files import canonical_sha256, sha256_file
from shards.measures import read_metrics
from shards.records.kinds import PolicyRecord, read_checkpoint, read_expert, read_policy
from shards.records.updates import update_faults
from shards.run import AVERAGE, COMMIT, EXPERT_NAMES, Stage


def policy_faults(stage: Stage) -> Iterator[Damaged]:
    """All that is not as training wrote it; what an unfinished training has left so far is looked at too."""
    for commit in sorted(stage.policy_dir.glob(f"trainer/*/update-*/{COMMIT}")):
        yield from _checkpoint_faults(commit, stage.trained())
    for log in (stage.metrics_path, *map(stage.expert_metrics_path, EXPERT_NAMES)):
        yield from _log_faults(stage, log)
    if stage.trained():
        yield from _log_gaps(stage)
        yield from _weight_faults(stage, stage.fetched_policy())
    else:
        yield from _expert_faults(stage)


def _log_faults(stage: Stage, log: Path) -> Iterator[Damaged]:
    """Damaged lines of a log, the common one or that of one expert, which may still be written to."""
    try:
        yield from update_faults(log, stage.iteration, ended=log == stage.metrics_path and stage.trained())
    except Damaged as error:
        yield error


def _log_gaps(stage: Stage) -> Iterator[Damaged]:
    """Updates that a checkpoint covers and that the log does not have."""
    with suppress(Damaged):  # a log that cannot be read is reported as such
        known = {(one["expert"], one["update"]) for one in read_metrics(stage)}
        for folder in sorted(stage.policy_dir.glob("trainer/*/update-*")):
            expert, update = folder.parent.name, folder.name.removeprefix("update-")
            if update.isdigit() and int(update) and (expert, int(update)) not in known:
                problem = f"update {int(update)} of {expert} is missing, but its checkpoint is not"
                yield Damaged(
                    f"{stage.metrics_path}: {problem}",
                    "restore it from a copy; only what is shown of this training depends on it",
                )


def _weight_faults(stage: Stage, folder: Path) -> Iterator[Damaged]:
    """What policy.json contradicts, and every file of weights that it names, those of the average in ema/ included."""
    path = stage.policy_record_path
    try:
        record = read_policy(path)
    except UserError as error:
        yield Damaged(error.problem, error.hint)
        return
    for problem in _contradictions(record, stage):
        yield Damaged(f"{path}: {problem}", ANEW)
    averages = record.average.adapters if record.average else {}
    yield from _file_faults(folder, path, record.adapters, averages)


def _expert_faults(stage: Stage) -> Iterator[Damaged]:
    """Records of experts that are trained while the policy is not, and the files of weights that they name."""
    for path in map(stage.expert_record_path, EXPERT_NAMES):
        if not path.exists():
            continue
        try:
            record = read_expert(path)
        except UserError as error:
            if path.exists():  # the policy is published while we look
                yield Damaged(error.problem, error.hint)
            continue
        if record.iteration != stage.iteration or path != stage.expert_record_path(record.expert):
            yield Damaged(f"{path}: it is of {record.expert} of iteration {record.iteration}", ANEW)
        yield from _file_faults(stage.policy_dir, path, record.adapters, record.average)


def _file_faults(
    folder: Path, path: Path, adapters: Mapping[str, str], averages: Mapping[str, str]
) -> Iterator[Damaged]:
    """Files of weights in a policy's folder that are not those that a record names."""
    named = {**adapters, **{f"{AVERAGE}/{name}": sha256 for name, sha256 in averages.items()}}
    for name, sha256 in named.items():
        found = _sha256(folder / name)
        if found is None:
            yield Damaged(f"{folder / name} is missing, but {path} names it", ANEW)
        elif found != sha256:
            yield Damaged(f"{folder / name} is not what {path} committed (sha256)", ANEW)


def _contradictions(record: PolicyRecord, stage: Stage) -> Iterator[str]:
    """Facts of policy.json that follow from others: fingerprints are hashes of the base and of the weights."""
    if record.iteration != stage.iteration:
        yield f"it is of iteration {record.iteration}"
    for what, one in (("fingerprint", record), ("average.fingerprint", record.average)):
        if one and one.fingerprint != canonical_sha256({"base": record.base, "adapters": one.adapters}):
            yield f"{what} is not that of its base and its adapters"
    with suppress(UserError):  # a damaged plan is reported elsewhere
        plan = stage.plan()
        if plan is not None and plan.policy.base != record.base:
            yield f"its base is not that of {stage.plan_path}"


def _checkpoint_faults(commit: Path, trained: bool) -> Iterator[Damaged]:
    folder = commit.parent
    hint = f"restore it from a copy, or delete {folder.name}: training then continues from the checkpoint before"
    if trained:
        hint = f"restore it from a copy, or delete {folder.parent.parent}: the next iteration makes a new optimizer"
    try:
        record = read_checkpoint(commit, hint)
    except UserError as error:
        if commit.exists():  # a training drops its old checkpoints while we look
            yield Damaged(error.problem, hint)
        return
    if folder.name != f"update-{record.update:06d}" or (record.sha256 and record.sha256.keys() != record.files.keys()):
        yield Damaged(f"{commit} is damaged: it is not that of this checkpoint", hint)
    changed = [name for name, sha256 in sorted(record.sha256.items()) if _sha256(folder / name) != sha256]
    if changed and commit.exists():
        yield Damaged(f"{folder / changed[0]} is damaged: its sha256 is not that in {COMMIT}", hint)
        return
    sizes = [name for name, size in sorted(record.files.items()) if _size(folder / name) != size]
    if sizes and commit.exists():
        yield Damaged(f"{folder / sizes[0]} is damaged: its size is not that in {commit}", hint)


def _size(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_size
    return None


def _sha256(path: Path) -> str | None:
    """The hash of a plain file; None when there is none."""
    with suppress(OSError, Damaged):
        return sha256_file(path)
    return None
