"""The window of a group: which of its steps are stochastic and trained, by policy, range and quota of each expert."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.records.schedule import LOW_NOISE, Schedule
from shards.run import EXPERT_NAMES

if TYPE_CHECKING:
    from shards.config import RolloutConfig

_QUOTA_KEYS = ("rollout.high_steps", "rollout.low_steps")


def choose_window(schedule: Schedule, config: RolloutConfig, *, iteration: int, prompt_id: int) -> tuple[int, ...]:
    """The stochastic steps of one group, rising: a pure function of (run seed, iteration, prompt id) and the schedule.

    Each expert gets its quota (`high_steps`, `low_steps`; a schedule with one expert ignores the other quota) among its
    steps from `first_step` to `last_step`. The last step of all is never taken: its Gaussian would have no width. All
    videos of a group share the window. `fixed` takes the first steps of the range, `random` any, `progressive` a block
    that moves on by one step every `window_iterations` iterations and starts over at the end (MixGRPO). The law `ode`
    has no window. Raises UserError when a quota cannot be met, or when one of two experts gets no step and
    `allow_untrained_expert` is off.
    """
    window: list[int] = []
    for expert, (candidates, quota) in _quotas(schedule, config).items():
        window += _choose(candidates, quota, config, iteration, f"{iteration} {prompt_id} {expert}")
    return tuple(sorted(window))


def window_range(schedule: Schedule, config: RolloutConfig) -> range:
    """The steps a window may take. Raises UserError for a range that is empty or leaves the schedule."""
    final, first, last = schedule.steps - 1, config.first_step, config.last_step
    if first >= final:
        raise UserError(
            f"rollout.first_step={first} leaves no step to train: "
            f"of {schedule.steps} steps the last, number {final}, is never stochastic",
            f"take rollout.first_step <= {final - 1}, or more rollout.steps",
        )
    if last is None:
        return range(first, final)
    if last >= final:
        raise UserError(
            f"rollout.last_step={last}, but of {schedule.steps} steps (0 to {final}) the last is never stochastic",
            f"take rollout.last_step <= {final - 1}, or more rollout.steps",
        )
    if last < first:
        raise UserError(
            f"rollout.last_step={last} comes before rollout.first_step={first}: no step is left to train",
            f"take rollout.last_step >= {first}, or a lower rollout.first_step",
        )
    return range(first, last + 1)


def trained_steps(schedule: Schedule, config: RolloutConfig) -> list[int]:
    """The steps that the window of some group of some iteration takes. Raises UserError as `choose_window` does."""
    first = config.window == "fixed"
    quotas = _quotas(schedule, config).values()
    return sorted(step for candidates, quota in quotas if quota for step in candidates[: quota if first else None])


def _quotas(schedule: Schedule, config: RolloutConfig) -> dict[int, tuple[list[int], int]]:
    """(steps it may take, number it must take) of each expert in the schedule, checked; of none under the law `ode`."""
    if schedule.law == "ode":
        return {}
    allowed = window_range(schedule, config)
    present = sorted(set(schedule.experts))
    quotas = {}
    for expert in present:
        candidates = [step for step in allowed if schedule.experts[step] == expert]
        quota = _quota(expert, len(candidates), config, alone=len(present) == 1)
        quotas[expert] = (candidates, quota)
    if not any(quota for _, quota in quotas.values()):
        keys = " and ".join(_QUOTA_KEYS[expert] for expert in present)
        raise UserError(f"no step of the rollout is trained ({keys})", f"set {_QUOTA_KEYS[present[0]]} to 1 or more")
    return quotas


def _quota(expert: int, available: int, config: RolloutConfig, *, alone: bool) -> int:
    """How many steps an expert gets. A zero, asked for or forced, needs `allow_untrained_expert`."""
    key, name = _QUOTA_KEYS[expert], EXPERT_NAMES[expert]
    quota = config.low_steps if expert == LOW_NOISE else config.high_steps
    if config.allow_untrained_expert and not alone and available == 0:
        return 0
    if quota == 0 and not alone and not config.allow_untrained_expert:
        raise UserError(
            f"{key}=0 never trains the {name} expert",
            f"set {key} to 1 or more, or rollout.allow_untrained_expert=true if that is wanted",
        )
    if quota > available:
        raise UserError(
            f"{key}={quota}, but only {available} steps of the {'model' if alone else name + ' expert'} can be "
            f"stochastic (from rollout.first_step={config.first_step} to {_end(config)})",
            _more_room(key, available, config),
        )
    return quota


def _end(config: RolloutConfig) -> str:
    """The end of the range in words."""
    if config.last_step is None:
        return f"the last but one of {config.steps}"
    return f"rollout.last_step={config.last_step}"


def _more_room(key: str, available: int, config: RolloutConfig) -> str:
    """What to do about a quota that is larger than its range."""
    wider = "lower rollout.first_step" if config.last_step is None else "widen rollout.first_step to rollout.last_step"
    if available:
        return f"set {key} to {available} or less, {wider}, or take more rollout.steps"
    return f"{wider}, take more rollout.steps or another rollout.shift"


def _choose(candidates: list[int], quota: int, config: RolloutConfig, iteration: int, salt: str) -> list[int]:
    """`quota` of the candidate steps, by the window policy."""
    if config.window == "fixed":
        return candidates[:quota]
    if config.window == "progressive":
        start = max(iteration, 0) // config.window_iterations % (len(candidates) - quota + 1)
        return candidates[start : start + quota]
    # The steps with the smallest hashes: a random subset that no change of a random generator can alter.
    keys = {i: hashlib.sha256(f"rushes window {config.seed} {salt} {i}".encode()).digest() for i in candidates}
    return sorted(candidates, key=keys.__getitem__)[:quota]
