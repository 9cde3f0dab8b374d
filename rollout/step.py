"""One sampling step: the model called, the next state drawn, its log-prob taken; for rollout and training alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from rollout.transitions import Previous, clean_estimate, dpm_2m, euler, law_log_prob, transition

if TYPE_CHECKING:
    import torch

    from rollout.policy import Policy
    from shards.records.schedule import Schedule


class StepInputs(NamedTuple):
    """What a step starts from: the state, and what the model sees beside it."""

    x: Tensor
    """[B,C,F,H,W] fp32, rounded as it is stored"""
    prompt: Tensor
    """[B,L,D] padded embeddings"""
    negative: Tensor | None
    """[B,L,D] padded embeddings of the negative prompt"""
    condition: Tensor | None = None
    """Of an image, if there is one"""
    x0_prev: Tensor | None = None
    """[B,C,F,H,W] fp32: the clean estimate of the step before, where law or solver look back at it"""


class StepScore(NamedTuple):
    """A transition under the policy."""

    log_prob: Tensor
    """[B] fp32: normalised Gaussian, averaged over the latents that the policy may choose."""
    mean: Tensor
    """[B,C,F,H,W] fp32"""
    std: float
    velocity: Tensor
    """[B,C,F,H,W] fp32, guided"""


class StepTaken(NamedTuple):
    """A step that was made."""

    x: Tensor
    """[B,C,F,H,W] fp32, the next state, rounded to the storage dtype"""
    log_prob: Tensor | None
    """[B] fp32; None for a step without noise"""
    clean: Tensor
    """[B,C,F,H,W] fp32, the estimate of the clean latents, which two-step solvers look back at"""


def step_log_prob(policy: Policy, schedule: Schedule, step: int, inputs: StepInputs, x_next: Tensor) -> StepScore:
    """The log-prob of having gone from the state to x_next [B,C,F,H,W] at a step, with everything that led to it.

    States are fp32, as they were stored; the expert of the step must be in use. Gradients reach the policy's weights.
    Raises ValueError for a step without noise.
    """
    velocity = step_velocity(policy, schedule, step, inputs)
    mean, std = _transition(schedule, step, inputs.x, velocity, inputs.x0_prev)
    mask = policy.free_mask(inputs.x, inputs.condition)
    return StepScore(law_log_prob(schedule.law, x_next, mean, std, mask), mean, std, velocity)


def take_step(
    policy: Policy, schedule: Schedule, step: int, inputs: StepInputs, noise: Tensor | None, storage: torch.dtype
) -> StepTaken:
    """Go to the next state: with `noise` [B,C,F,H,W] by the schedule's law, without it by its solver.

    The state is rounded to the storage dtype before its log-prob is taken and before the next step sees it: what is
    scored is what is stored is what training replays, so that the ratio is exactly 1 until a weight moves.
    """
    x, x0_prev = inputs.x, inputs.x0_prev
    velocity = step_velocity(policy, schedule, step, inputs)
    clean = clean_estimate(x, velocity, schedule.sigmas[step])
    if noise is None:
        return StepTaken(_deterministic(schedule, step, x, velocity, x0_prev).to(storage).float(), None, clean)
    mean, std = _transition(schedule, step, x, velocity, x0_prev)
    x_next = (mean + std * noise).to(storage).float()
    mask = policy.free_mask(x, inputs.condition)
    return StepTaken(x_next, law_log_prob(schedule.law, x_next, mean, std, mask), clean)


def step_velocity(policy: Policy, schedule: Schedule, step: int, inputs: StepInputs) -> Tensor:
    """Guided velocity [B,C,F,H,W] fp32 of the policy at a step, whose expert must be in use."""
    expert, t, guidance = schedule.experts[step], schedule.timesteps[step], schedule.guidance[step]
    return policy.velocity(expert, inputs.x, t, inputs.prompt, inputs.negative, guidance, inputs.condition)


def step_mean(schedule: Schedule, step: int, x: Tensor, velocity: Tensor, x0_prev: Tensor | None = None) -> Tensor:
    """Mean [B,C,F,H,W] fp32 of the state after a step with noise, for a velocity [B,C,F,H,W] at x."""
    return _transition(schedule, step, x, velocity, x0_prev)[0]


def looks_back(schedule: Schedule) -> bool:
    """Whether law or solver use the clean estimate of the step before."""
    return schedule.law == "dpm-sde-2m" or schedule.solver == "dpm-2m"


def _transition(
    schedule: Schedule, step: int, x: Tensor, velocity: Tensor, x0_prev: Tensor | None
) -> tuple[Tensor, float]:
    sigma, sigma_next = schedule.sigmas[step], schedule.sigmas[step + 1]
    previous = _previous(schedule, step, x0_prev) if schedule.law == "dpm-sde-2m" else None
    return transition(
        schedule.law,
        schedule.form,
        x,
        velocity,
        sigma,
        sigma_next,
        schedule.eta,
        sigma_1=schedule.sigmas[1],
        previous=previous,
    )


def _deterministic(schedule: Schedule, step: int, x: Tensor, velocity: Tensor, x0_prev: Tensor | None) -> Tensor:
    sigma, sigma_next = schedule.sigmas[step], schedule.sigmas[step + 1]
    if schedule.solver == "dpm-2m":
        return dpm_2m(x, velocity, sigma, sigma_next, _previous(schedule, step, x0_prev))
    return euler(x, velocity, sigma, sigma_next)


def _previous(schedule: Schedule, step: int, x0_prev: Tensor | None) -> Previous | None:
    """What the step before left; nothing before step 0."""
    if step == 0:
        return None
    assert x0_prev is not None, "this law or solver looks back at the step before"
    return x0_prev, schedule.sigmas[step - 1]
