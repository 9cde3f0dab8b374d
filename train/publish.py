"""The trained policy on disk: the weights of each expert, their averages, and policy.json, which commits all, last.

An expert that a process trains by itself has a record of its own, `policy/high_noise.json`, written when its weights
are whole; whoever then finds that of the other expert publishes the policy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from shards.errors import ANEW, RunFailed, UserError
from shards.files import sha256_file
from shards.records.kinds import read_expert
from shards.records.reading import sealed
from shards.run import AVERAGE, EXPERT_NAMES, METRICS

if TYPE_CHECKING:
    from rollout.policy import Policy
    from rollout.ranks.world import World
    from shards.run import Stage

SCHEMA = 1


@dataclass(frozen=True)
class Trained:
    """An expert that is trained, with its weights on the disk."""

    adapters: dict[str, str]
    """sha256 of its files, by their paths in the policy's folder."""
    average: dict[str, str]
    """Those of its averaged weights, by their paths in `ema`; empty without `train.ema`."""
    unmoved: list[str]
    """Layers that no gradient reached."""
    replay: float | None
    """Largest |log-ratio| of the replay gate; None when it did not run."""


def write_expert(
    policy: Policy, stage: Stage, expert: int, averages: Mapping[str, Tensor] | None, world: World
) -> tuple[dict[str, str], dict[str, str]]:
    """Write the weights of an expert and, where there are any, its averages; all ranks call this, rank 0 writes.

    Returns the sha256 of both, on rank 0; else empty. RunFailed when the disk is full.
    """
    policy.experts.use(None)
    folders = [stage.policy_dir]
    policy.experts.save(stage.policy_dir, expert)
    if averages is not None:
        folders.append(stage.policy_dir / AVERAGE)
        policy.experts.save(stage.policy_dir / AVERAGE, expert, averages)
    found: list[dict[str, str]] = []
    with world.together():
        if world.is_first:
            found = [policy.experts.hashes(folder, expert) for folder in folders]
    return found[0] if found else {}, found[1] if len(found) > 1 else {}


def write_record(stage: Stage, expert: int, trained: Trained) -> None:
    """Say that an expert is trained; whoever sees that, on whichever machine, finds its weights too."""
    name, path = EXPERT_NAMES[expert], stage.expert_record_path(EXPERT_NAMES[expert])
    _put(stage, [expert], [stage.expert_metrics_path(name).name])
    identity = {"schema": SCHEMA, "iteration": stage.iteration, "expert": name, "train_plan": _train_plan(stage)}
    stage.files.publish_new(path, sealed(identity | asdict(trained), path))


def read_trained(stage: Stage, expert: int) -> Trained | None:
    """What another process says of the expert it trained; None before it has.

    RunFailed when that was another training than the one frozen in train/plan.json.
    """
    path = stage.expert_record_path(EXPERT_NAMES[expert])
    if not stage.files.look(path):
        return None
    try:
        record = read_expert(path)
    except UserError:
        if path.exists():
            raise
        return None  # the policy has just been published
    if record.train_plan != _train_plan(stage):
        raise RunFailed(f"{path} is of another training than {stage.train_plan_path}", ANEW)
    return Trained(record.adapters, record.average, record.unmoved, record.replay)


def publish(policy: Policy, stage: Stage, trained: Mapping[int, Trained], mine: Sequence[int], *, ema: bool) -> str:
    """Commit the policy whose experts are all on the disk, `mine` written by this process; the first rank calls this.

    Several processes may do this at once: all write the same. Returns the fingerprint of the new policy. RunFailed when
    the disk is full.
    """
    identity = policy.experts.identity(_all([one.adapters for one in trained.values()]))
    _put(stage, mine, [METRICS])
    path = stage.policy_record_path
    record = {"schema": SCHEMA, "iteration": stage.iteration, **identity}
    if ema:
        average = policy.experts.identity(_all([one.average for one in trained.values()]))
        record["average"] = {name: average[name] for name in ("fingerprint", "adapters")}
    stage.files.publish_new(path, sealed(record, path))
    return str(identity["fingerprint"])


def forget_records(stage: Stage) -> None:
    """Remove what single experts said, which policy.json now says of all."""
    paths = map(stage.expert_record_path, EXPERT_NAMES)
    stage.files.remove_files([path for path in paths if path.exists()])


def _put(stage: Stage, experts: Sequence[int], files: Sequence[str]) -> None:
    """Put what we wrote of these experts to the store, and these files. What we have of others may be older there."""
    ours = tuple(f"{folder}{EXPERT_NAMES[expert]}/" for expert in experts for folder in ("", f"{AVERAGE}/"))
    stage.files.put_folder(stage.policy_dir, wanted=lambda name: name.startswith(ours) or name in files)


def _train_plan(stage: Stage) -> str:
    return sha256_file(stage.train_plan_path)


def _all(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    return {name: value for part in parts for name, value in part.items()}
