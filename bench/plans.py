"""A plan for stages whose files alone are measured: no policy sampled them, and their videos have a few pixels."""

from __future__ import annotations

from shards.plan import SCHEMA, Group, PolicyIdentity, RolloutPlan, Schedule, VideoShape, group_key


def bare_plan(iteration: int, groups: int, group_size: int, groups_per_shard: int = 1) -> RolloutPlan:
    """A rollout of that many groups, without prompts and without a window."""
    keys = [group_key(iteration, number) for number in range(groups)]
    return RolloutPlan(
        schema=SCHEMA,
        kind="rollout",
        iteration=iteration,
        seed=0,
        policy=PolicyIdentity("0" * 64, "0" * 64, {}, iteration),
        schedule=Schedule((1.0, 0.0), (1000.0,), (0,), (1.0,), "ode", "exact", 0.0, "euler"),
        video=VideoShape(32, 64, 5, 16, 12),
        storage_dtype="float16",
        group_size=group_size,
        batch_size=1,
        negative_prompt="",
        groups=tuple(Group(key, number, "", None, None, ()) for number, key in enumerate(keys)),
        shards=tuple(tuple(keys[first : first + groups_per_shard]) for first in range(0, groups, groups_per_shard)),
        same_initial_noise=False,
    )
