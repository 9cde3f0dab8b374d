"""Integrity of what training leaves: the weights, their averages, the checkpoints of the trainer and its log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shards.errors import ANEW, Damaged, UserError
from shards.files import read_json, sha256_file
from shards.run import AVERAGE, COMMIT, EXPERT_NAMES, POLICY_RECORD, Stage


def policy_faults(stage: Stage) -> Iterator[Damaged]:
    """All that is not as training wrote it; what an unfinished training has left so far is looked at too."""
    for commit in sorted(stage.policy_dir.glob(f"trainer/*/update-*/{COMMIT}")):
        yield from _checkpoint_faults(commit, stage.trained())
    for log in (stage.metrics_path, *map(stage.expert_metrics_path, EXPERT_NAMES)):
        yield from _log_faults(log)
    if stage.trained():
        yield from _weight_faults(stage.fetched_policy())


def _weight_faults(folder: Path) -> Iterator[Damaged]:
    """Every file of weights that policy.json names, those of the average in ema/ included."""
    path = folder / POLICY_RECORD
    try:
        record = read_json(path)
        named = {**record.get("adapters", {}), **_below(AVERAGE, record.get("average", {}).get("adapters", {}))}
    except UserError as error:
        yield Damaged(error.problem, ANEW)
        return
    except (AttributeError, TypeError):
        yield Damaged(f"{path} is damaged: it does not name the files of the policy", ANEW)
        return
    for name, sha256 in named.items():
        found = _sha256(folder / name)
        if found is None:
            yield Damaged(f"{folder / name} is missing, but {path} names it", ANEW)
        elif found != sha256:
            yield Damaged(f"{folder / name} is not what {path} committed (sha256)", ANEW)


def _checkpoint_faults(commit: Path, trained: bool) -> Iterator[Damaged]:
    folder = commit.parent
    hint = f"restore it from a copy, or delete {folder.name}: training then continues from the checkpoint before"
    if trained:
        hint = f"restore it from a copy, or delete {folder.parent.parent}: the next iteration makes a new optimizer"
    try:
        sums = dict(read_json(commit)["sha256"])
    except UserError as error:
        if commit.exists():  # a training drops its old checkpoints while we look
            yield Damaged(error.problem, hint)
        return
    except (KeyError, TypeError, ValueError):
        yield Damaged(f"{commit} is damaged: it does not name the files of the checkpoint", hint)
        return
    changed = [name for name, sha256 in sorted(sums.items()) if _sha256(folder / name) != sha256]
    if changed and commit.exists():
        yield Damaged(f"{folder / changed[0]} is damaged: its sha256 is not that in {COMMIT}", hint)


def _log_faults(path: Path) -> Iterator[Damaged]:
    """A line that is not JSON; the last one may have been cut by a kill, and the next update mends that."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            json.loads(line)
        except ValueError:
            yield Damaged(f"{path}: line {number} is not JSON, so the rest is not read either", "delete that line")
            return


def _below(folder: str, names: dict[str, Any]) -> dict[str, Any]:
    return {f"{folder}/{name}": value for name, value in names.items()}


def _sha256(path: Path) -> str | None:
    """The hash of a plain file; None when there is none."""
    with suppress(OSError):
        return sha256_file(path) if path.is_file() else None
    return None
