"""The trained policy on disk: its weights, their average beside them, and policy.json, which commits both, last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from shards.records.reading import sealed
from shards.run import AVERAGE
from shards.store.files import of_policy

if TYPE_CHECKING:
    from rollout.policy import Policy
    from rollout.ranks.world import World
    from shards.run import Stage

SCHEMA = 1


def publish(policy: Policy, stage: Stage, averages: dict[int, dict[str, Tensor]], world: World, ema: bool) -> str:
    """Write what was trained and, with `ema`, the averages; all ranks call this, rank 0 writes.

    Returns the fingerprint of the new policy, on all ranks. RunFailed when the disk is full.
    """
    policy.experts.use(None)
    policy.experts.save(stage.policy_dir)
    if ema:
        policy.experts.save(stage.policy_dir / AVERAGE, averages)
    fingerprint = ""
    with world.together():
        if world.is_first:
            identity = policy.experts.fingerprint(stage.policy_dir)
            stage.files.put_folder(stage.policy_dir, wanted=of_policy)
            path = stage.policy_record_path
            record = {"schema": SCHEMA, "iteration": stage.iteration, **identity}
            if ema:
                average = policy.experts.fingerprint(stage.policy_dir / AVERAGE)
                record["average"] = {name: average[name] for name in ("fingerprint", "adapters")}
            stage.files.publish_new(path, sealed(record, path))
            fingerprint = str(identity["fingerprint"])
    return world.broadcast(fingerprint)
