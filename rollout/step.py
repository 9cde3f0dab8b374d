"""One sampling step: the model called, the next state drawn, its log-prob taken; for rollout and training alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from rollout.transitions import Previous, clean_estimate, dpm_2m, euler, law_log_prob, transition

if TYPE_CHECKING:
    import torch

    from rollout.policy import Policy
    from shards.plan import Schedule


@dataclass(frozen=True)
class Scored:
    """A transition under the policy."""

    log_prob: Tensor
    """[B] fp32: normalised Gaussian, averaged over the latents that the policy may choose."""
    mean: Tensor
    """[B,C,F,H,W] fp32"""
    std: float
    velocity: Tensor
    """[B,C,F,H,W] fp32, guided"""


class Inputs(NamedTuple):
    """What a step sees beside the state: embeddings [B,L,D], padded, and the condition of an image, if any."""

    prompt: Tensor
    negative: Tensor | None
    condition: Tensor | None = None


class Taken(NamedTuple):
    """A step that was made."""

    x: Tensor
    """[B,C,F,H,W] fp32, the next state, rounded to the storage dtype"""
    log_prob: Tensor | None
    """[B] fp32; None for a step without noise"""
    clean: Tensor
    """[B,C,F,H,W] fp32, the estimate of the clean latents, which two-step solvers look back at"""


def step_log_prob(
    policy: Policy,
    schedule: Schedule,
    step: int,
    x: Tensor,
    x_next: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor | None,
    condition: Tensor | None = None,
    x0_prev: Tensor | None = None,
) -> Scored:
    """The log-prob of having gone from x to x_next at `step` of the schedule, with everything that led to it.

    x, x_next, x0_prev: [B,C,F,H,W] fp32, as they were stored; the expert of the step must be in use. Gradients reach
    the policy's weights. Raises ValueError for a step without noise.
    """
    inputs = Inputs(prompt_embeds, negative_embeds, condition)
    velocity = _velocity(policy, schedule, step, x, inputs)
    mean, std = _transition(schedule, step, x, velocity, x0_prev)
    return Scored(law_log_prob(schedule.law, x_next, mean, std, policy.free_mask(x, condition)), mean, std, velocity)


def take_step(
    policy: Policy,
    schedule: Schedule,
    step: int,
    x: Tensor,
    noise: Tensor | None,
    storage: torch.dtype,
    inputs: Inputs,
    x0_prev: Tensor | None = None,
) -> Taken:
    """Go from x to the next state: with `noise` [B,C,F,H,W] by the schedule's law, without it by its solver.

    The state is rounded to the storage dtype before its log-prob is taken and before the next step sees it: what is
    scored is what is stored is what training replays, so that the ratio is exactly 1 until a weight moves.
    """
    velocity = _velocity(policy, schedule, step, x, inputs)
    clean = clean_estimate(x, velocity, schedule.sigmas[step])
    if noise is None:
        return Taken(_deterministic(schedule, step, x, velocity, x0_prev).to(storage).float(), None, clean)
    mean, std = _transition(schedule, step, x, velocity, x0_prev)
    x_next = (mean + std * noise).to(storage).float()
    return Taken(x_next, law_log_prob(schedule.law, x_next, mean, std, policy.free_mask(x, inputs.condition)), clean)


def step_mean(schedule: Schedule, step: int, x: Tensor, velocity: Tensor, x0_prev: Tensor | None = None) -> Tensor:
    """Mean [B,C,F,H,W] fp32 of the state after a step with noise, for a velocity [B,C,F,H,W] at x."""
    return _transition(schedule, step, x, velocity, x0_prev)[0]


def looks_back(schedule: Schedule) -> bool:
    """Whether law or solver use the clean estimate of the step before."""
    return schedule.law == "dpm-sde-2m" or schedule.solver == "dpm-2m"


def _velocity(policy: Policy, schedule: Schedule, step: int, x: Tensor, inputs: Inputs) -> Tensor:
    expert, t, guidance = schedule.experts[step], schedule.timesteps[step], schedule.guidance[step]
    return policy.velocity(expert, x, t, inputs.prompt, inputs.negative, guidance, inputs.condition)


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
