"""What one expert is asked about a chunk of samples: states, velocities of the policy now and then, targets, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rollout.schedule import step_slope
from rollout.step import step_log_prob, step_mean
from rollout.transitions import noise, noise_seed
from train.data import Chunk, Inputs
from train.objectives import estimators, terms
from train.objectives.settings import noised_afresh
from train.order import Unit
from train.weights import RolledOut

if TYPE_CHECKING:
    from rollout.policy import Policy
    from rollout.step import Scored
    from shards.config import TrainConfig

FRESH_NOISE = 1_000_000
"""Added to a step's number for the seed of fresh noise. No schedule is that long, so no noise of a rollout is repeated.
"""


class Forwards:
    """Forwards of one expert on chunks, with gradient unless the policy that sampled is asked."""

    def __init__(self, policy: Policy, inputs: Inputs, config: TrainConfig, expert: int, rolled_out: RolledOut) -> None:
        self.policy, self.inputs, self.config, self.expert = policy, inputs, config, expert
        self.rolled_out = rolled_out

    def state(self, chunk: Chunk) -> Tensor:
        """What the model is shown [B, C, F, H, W]: the state before the step, or the final latents noised afresh."""
        if not noised_afresh(self.config):
            return chunk.x
        sigma = self.inputs.rollouts.schedule.sigmas[chunk.unit.step]
        return (1.0 - sigma) * chunk.x0 + sigma * self.fresh_noise(chunk).to(chunk.x0.device)

    def target(self, chunk: Chunk, x: Tensor, old: Tensor) -> Tensor:
        """u of `train.objectives.estimators`: the velocity [B, C, F, H, W] that the samples pull towards at x."""
        schedule, step = self.inputs.rollouts.schedule, chunk.unit.step
        if not noised_afresh(self.config) and self.config.estimator == "noise":
            mean = step_mean(schedule, step, x, old, chunk.extra.get("x0_prev"))
            return old + (chunk.x_next - mean) / step_slope(schedule, step)
        return (x - chunk.x0) / schedule.sigmas[step]

    def weight(self, chunk: Chunk, old: Tensor, target: Tensor) -> float | Tensor:
        """w of `train.objectives.estimators`."""
        rollouts, config, step = self.inputs.rollouts, self.config, chunk.unit.step
        if config.objective != "grpo" or config.error_weight == "adaptive":
            mask = self.free(chunk, old)
            return estimators.adaptive_weight(old, target, rollouts.schedule.sigmas[step], mask)
        return estimators.step_weight(config.error_weight, rollouts.schedule, step, rollouts.window(chunk.unit.group))

    def error(self, chunk: Chunk, x: Tensor, velocity: Tensor) -> Tensor:
        """Flow-matching error [B] of a velocity at x."""
        target = (x - chunk.x0) / self.inputs.rollouts.schedule.sigmas[chunk.unit.step]
        return terms.matching_error(velocity, target, self.free(chunk, x))

    def has_noise(self, unit: Unit) -> bool:
        """Whether the rollout took this step with noise."""
        return bool(self.inputs.rollouts.groups[unit.group].window)

    def fresh_noise(self, chunk: Chunk) -> Tensor:
        """Noise [B, C, F, H, W] that no rollout has seen; of pairs, the same for all samples of a group."""
        plan, group = self.inputs.rollouts.plan, self.inputs.rollouts.groups[chunk.unit.group]
        step = FRESH_NOISE + chunk.unit.step
        samples = [0 if self.inputs.pairs else sample for sample in chunk.unit.samples]
        seeds = [noise_seed(plan.seed, plan.iteration, group.prompt_id, sample, step) for sample in samples]
        return torch.stack([noise(chunk.x0.shape[1:], seed=seed) for seed in seeds])

    def free(self, chunk: Chunk, x: Tensor) -> Tensor | None:
        """The latents that are the policy's to choose; None when all are."""
        return self.policy.free_mask(x, chunk.extra.get("condition"))

    def score(self, chunk: Chunk) -> Scored:
        """The stored transition under the policy in force."""
        schedule = self.inputs.rollouts.schedule
        return step_log_prob(
            self.policy, schedule, chunk.unit.step, chunk.x, chunk.x_next, chunk.prompt, chunk.negative, **chunk.extra
        )

    def old_mean(self, chunk: Chunk) -> Tensor:
        """Mean [B, C, F, H, W] of the stored transition under the policy that sampled, without gradient."""
        with self.rolled_out.in_place():
            mean: Tensor = self.score(chunk).mean
        return mean

    def old_velocity(self, chunk: Chunk, x: Tensor) -> Tensor:
        """Velocity [B, C, F, H, W] at x of the policy that sampled, without gradient."""
        with self.rolled_out.in_place():
            return self.velocity(chunk, x)

    def velocity(self, chunk: Chunk, x: Tensor) -> Tensor:
        """Guided velocity [B, C, F, H, W] at x of the policy in force."""
        schedule, step = self.inputs.rollouts.schedule, chunk.unit.step
        return self.policy.velocity(
            self.expert,
            x,
            schedule.timesteps[step],
            chunk.prompt,
            chunk.negative,
            schedule.guidance[step],
            chunk.extra.get("condition"),
        )
