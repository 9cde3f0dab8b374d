"""The schedule of a rollout: sigmas, timesteps, experts and guidance of every step, and its table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from rollout.sigmas import grid
from rollout.transitions import Kernel, gradient_scale, kernel, resolve_form, velocity_slope
from shards.errors import UserError
from shards.records.schedule import HIGH_NOISE, LOW_NOISE, Form, Law, Schedule
from shards.run import EXPERT_NAMES

if TYPE_CHECKING:
    from rollout.policy.folder import SchedulerConfig
    from shards.config import EvalConfig, RolloutConfig


def make_schedule(
    config: RolloutConfig,
    *,
    boundary: float | None,
    scheduler_config: SchedulerConfig,
    evaluation: EvalConfig | None = None,
) -> Schedule:
    """The schedule of a rollout, or with `evaluation` that of the deterministic evaluation sampler.

    boundary: `boundary_ratio` of the model's model_index.json, None for a model with one expert. scheduler_config: the
    model's scheduler/scheduler_config.json; the run's own shift replaces the one in it. Raises UserError for two
    experts without two guidance scales, for a noise level that its law cannot use, and, in a rollout, for a schedule
    that never reaches one of two experts.
    """
    steps, shift = config.steps, config.shift
    if evaluation is not None:
        steps, shift = evaluation.steps, evaluation.shift or config.shift
    sigmas, timesteps = grid(config.schedule, steps, shift, scheduler_config)
    train_steps = int(scheduler_config.get("num_train_timesteps", 1000))
    experts = expert_ids(timesteps, boundary, train_steps)
    if evaluation is None and boundary is not None and not config.allow_untrained_expert:
        _check_both_experts(experts, boundary * train_steps)
    scales = _guidance_scales(config, evaluation, two_experts=boundary is not None)
    law: Law = "ode" if evaluation is not None else config.law
    if law != "ode":
        _check_eta(law, config.eta)
    return Schedule(
        sigmas=sigmas,
        timesteps=timesteps,
        experts=experts,
        guidance=tuple(float(np.float32(scales[expert])) for expert in experts),
        law=law,
        form=resolve_form(law, config.form),
        eta=0.0 if law == "ode" else config.eta,
        solver=config.solver if evaluation is None else evaluation.solver,
    )


def expert_ids(timesteps: Sequence[float], boundary: float | None, train_steps: int = 1000) -> tuple[int, ...]:
    """Expert of each step: high noise (0) iff t >= boundary * train_steps, as in WanPipeline and the official code."""
    if boundary is None:
        return (HIGH_NOISE,) * len(timesteps)
    return tuple(HIGH_NOISE if t >= boundary * train_steps else LOW_NOISE for t in timesteps)


class PlannedStep(TypedDict):
    """A row of `describe`, which says what each key means."""

    step: int
    sigma: float
    timestep: float
    expert: str
    guidance: float
    law: str
    std: float
    noise_share: float
    trained: bool
    gradient_share: float


def describe(schedule: Schedule, window: Sequence[int]) -> list[PlannedStep]:
    """One row per step, for `--dry-run`.

    Keys: step, sigma, timestep, expert (name), guidance, law (that of the window, or the solver), std (of the whole
    step), noise_share (std over the next sigma: above 1 the step adds more noise than the next state may hold),
    trained, gradient_share (of this step among the trained steps of its expert, by `gradient_scale`; they sum to 1).
    """
    chosen = set(window)
    scales = {step: step_scale(schedule, step) for step in chosen}
    rows: list[PlannedStep] = []
    for step in range(schedule.steps):
        expert, trained = schedule.experts[step], step in chosen
        std = step_std(schedule, step) if trained else 0.0
        total = sum(scale for other, scale in scales.items() if schedule.experts[other] == expert)
        rows.append(
            {
                "step": step,
                "sigma": schedule.sigmas[step],
                "timestep": schedule.timesteps[step],
                "expert": EXPERT_NAMES[expert],
                "guidance": schedule.guidance[step],
                "law": schedule.law if trained else schedule.solver,
                "std": std,
                "noise_share": std / schedule.sigmas[step + 1] if trained else 0.0,
                "trained": trained,
                "gradient_share": scales[step] / total if trained else 0.0,
            }
        )
    return rows


def _guidance_scales(
    config: RolloutConfig, evaluation: EvalConfig | None, *, two_experts: bool
) -> tuple[float, float | None]:
    """Guidance of the high-noise (or only) and of the low-noise expert; that of rollout where [eval] has none."""
    high, low = config.guidance_scale, config.guidance_scale_2
    if evaluation is not None:
        high = high if evaluation.guidance_scale is None else evaluation.guidance_scale
        low = low if evaluation.guidance_scale_2 is None else evaluation.guidance_scale_2
    if two_experts and low is None:
        raise UserError(
            "the model has two experts, but rollout.guidance_scale_2 is not set",
            "guidance is part of the policy: give the low-noise expert its own, e.g. rollout.guidance_scale_2=3.0 "
            "(Wan2.2 T2V-A14B: 4.0 high, 3.0 low)",
        )
    return high, low


def _check_both_experts(experts: Sequence[int], boundary: float) -> None:
    """UserError when the schedule itself never reaches one of the two experts."""
    missing = [EXPERT_NAMES[expert] for expert in (HIGH_NOISE, LOW_NOISE) if expert not in experts]
    if missing:
        raise UserError(
            f"none of the {len(experts)} steps runs the {missing[0]} expert (it changes at timestep {boundary:g})",
            "take more rollout.steps or another rollout.shift, or set rollout.allow_untrained_expert=true",
        )


def _check_eta(law: Law, eta: float) -> None:
    """UserError for a noise level that leaves the law deterministic or outside its range."""
    if eta == 0:
        raise UserError(
            f"rollout.eta is 0: the law {law} then adds no noise and has no log-prob",
            "take an eta above 0 (flow-sde: 0.7), or rollout.law=ode with train.objective=nft, dpo or sft",
        )
    if law in ("cps", "cps-unnormalised") and eta > 1:
        problem = f"rollout.eta is {eta:g}, but {law} takes the angle eta * 90 degrees"
        raise UserError(problem, "take an eta from 0 to 1")


def _law_of(schedule: Schedule, step: int) -> tuple[Law, Form, float, float, float, float]:
    """Arguments of `kernel` and `gradient_scale` for a window step."""
    return (
        schedule.law,
        schedule.form,
        schedule.sigmas[step],
        schedule.sigmas[step + 1],
        schedule.eta,
        schedule.sigmas[1],
    )


def step_std(schedule: Schedule, step: int) -> float:
    """Standard deviation of a window step, the whole of it."""
    return kernel(*_law_of(schedule, step)).std


def step_kernel(schedule: Schedule, step: int) -> Kernel:
    """Coefficients of a window step on x and v, and its std; of `dpm-sde-2m`, the first order alone."""
    return kernel(*_law_of(schedule, step))


def step_slope(schedule: Schedule, step: int) -> float:
    """d mean / d v of a window step, below 0."""
    before = schedule.sigmas[step - 1] if step > 0 else None
    return velocity_slope(*_law_of(schedule, step), sigma_previous=before)


def step_scale(schedule: Schedule, step: int) -> float:
    """How strongly the log-prob of a window step pulls on the velocity: |d mean / d v| over the std."""
    before = schedule.sigmas[step - 1] if step > 0 else None
    return gradient_scale(*_law_of(schedule, step), sigma_previous=before)
