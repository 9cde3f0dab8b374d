"""A plan for stages whose files alone are measured: no policy sampled them, and their videos have a few pixels."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.plan import SCHEMA, Group, PolicyIdentity, RolloutPlan, VideoShape, group_key, sample_key
from shards.records.schedule import Schedule
from shards.spool import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shards.run import Stage


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


def bare_sample(stage: Stage, group: str, number: int, latents: NDArray[np.float16], video: bytes) -> Sample:
    """A sample of a stage with such a plan: latents [states, C, F, H, W] and any bytes as its video."""
    plan, plan_sha256 = stage.plan(), stage.plan_sha256()
    assert plan
    entry, key, states = plan.by_key[group], sample_key(group, number), list(range(len(latents)))
    schedule = asdict(plan.schedule)
    record = {
        "schema": SCHEMA, "key": key, "group": group, "text": group, "iteration": plan.iteration, "sample": number,
        "prompt_id": entry.prompt_id, "prompt": entry.prompt, "chunk": [number, 1], "seed": plan.seed,
        "noise_seeds": {"initial": number}, "policy": plan.policy.fingerprint, "plan_sha256": plan_sha256, **schedule,
        "window": [], "log_prob": [], "states": states,
        **{name: getattr(plan.video, name) for name in ("height", "width", "frames", "fps")},
    }  # fmt: skip
    tensors: dict[str, NDArray[Any]] = {
        "latents": latents, "states": np.array(states, np.int32), "step_index": np.empty(0, np.int32),
        "log_prob": np.empty(0, np.float32), "experts": np.array(plan.schedule.experts, np.uint8),
        **{name: np.array(schedule[name], np.float32) for name in ("sigmas", "timesteps", "guidance")},
    }  # fmt: skip
    return Sample(key, record, video, tensors)
