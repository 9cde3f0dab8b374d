"""The sigma grids: the shifted line, and those that diffusers' UniPC and FlowMatchEuler schedulers make."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rollout.policy.folder import SchedulerConfig
    from shards.config import SigmaGrid


Grid = tuple[tuple[float, ...], tuple[float, ...]]


def grid(schedule: SigmaGrid, steps: int, shift: float, scheduler_config: SchedulerConfig) -> Grid:
    """(sigmas [N+1], timesteps [N]) of a schedule, as fp32 values; sigmas end with 0.

    scheduler_config: the model's scheduler_config.json. Its entries hold, but for the shift and for what makes it a
    flow schedule.
    """
    if schedule == "shifted":
        return _shifted_grid(steps, shift, int(scheduler_config.get("num_train_timesteps", 1000)))
    if schedule == "unipc":
        return _unipc_grid(steps, shift, scheduler_config)
    return _euler_grid(steps, shift, scheduler_config)


def _shifted_grid(steps: int, shift: float, train_steps: int) -> Grid:
    """s = linspace(1, 1/1000, N+1)[:-1], then shift s / (1 + (shift-1) s), then 0; t = 1000 s.

    The grid is rounded to fp32 before it is shifted, as FlowMatchEulerDiscreteScheduler does with given sigmas, so
    that both agree bit for bit. The timesteps stay fractional: rounding them would condition the model on another t.
    """
    line = np.linspace(1.0, 1.0 / train_steps, steps + 1)[:-1].astype(np.float32)
    sigmas = shift * line / (1 + (shift - 1) * line)
    return (*sigmas.tolist(), 0.0), tuple((sigmas * np.float32(train_steps)).tolist())


def _unipc_grid(steps: int, shift: float, scheduler_config: SchedulerConfig) -> Grid:
    """The grid of diffusers' UniPC for flow models: sigma 0 is 1 - 1e-6 and the timesteps are whole numbers."""
    from diffusers import UniPCMultistepScheduler

    settings = _accepted(UniPCMultistepScheduler, scheduler_config)
    settings |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    settings |= {"use_dynamic_shifting": False, "final_sigmas_type": "zero"}
    scheduler = UniPCMultistepScheduler(**settings)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.sigmas.tolist()), tuple(float(t) for t in scheduler.timesteps.tolist())


def _euler_grid(steps: int, shift: float, scheduler_config: SchedulerConfig) -> Grid:
    """The grid FlowMatchEulerDiscreteScheduler makes by itself: whole range, its last sigma shifted twice."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    settings = _accepted(FlowMatchEulerDiscreteScheduler, scheduler_config)
    settings |= {"shift": shift, "use_dynamic_shifting": False}
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.sigmas.tolist()), tuple(scheduler.timesteps.tolist())


def _accepted(scheduler: type, scheduler_config: SchedulerConfig) -> dict[str, object]:
    """The entries of a scheduler_config.json that this scheduler knows: a Wan folder may name another one."""
    known = signature(scheduler).parameters
    return {key: value for key, value in scheduler_config.items() if key in known}
