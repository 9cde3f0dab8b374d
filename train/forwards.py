"""What one expert is asked about a batch of samples: states, velocities of the policy now and then, targets, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from rollout.schedule import step_slope, step_std
from rollout.step import StepScore, step_log_prob, step_mean, step_velocity
from train.data import Batch, Inputs, noise_of
from train.objectives import estimators, losses
from train.objectives.settings import noised_afresh
from train.order import Unit
from train.weights import RolledOut

if TYPE_CHECKING:
    from rollout.policy import Policy
    from shards.config import TrainConfig


class Forwards:
    """Forwards of one expert on batches, with gradient unless the policy that sampled is asked."""

    def __init__(self, policy: Policy, inputs: Inputs, config: TrainConfig, rolled_out: RolledOut) -> None:
        self.policy, self.inputs, self.config = policy, inputs, config
        self.rolled_out = rolled_out

    def state(self, batch: Batch) -> Tensor:
        """What the model is shown [B, C, F, H, W]: the state before the step, or the final latents noised afresh."""
        if not noised_afresh(self.config):
            return batch.x
        sigma = self.inputs.rollouts.schedule.sigmas[batch.unit.step]
        return (1.0 - sigma) * batch.x0 + sigma * batch.states["noise"]

    def target(self, batch: Batch, x: Tensor, old: Tensor) -> Tensor:
        """u of `train.objectives.estimators`: the velocity [B, C, F, H, W] that the samples pull towards at x."""
        schedule, step = self.inputs.rollouts.schedule, batch.unit.step
        if not noised_afresh(self.config) and self.config.estimator == "noise":
            mean = step_mean(schedule, step, x, old, batch.x0_prev)
            return old + (batch.x_next - mean) / step_slope(schedule, step)
        return (x - batch.x0) / schedule.sigmas[step]

    def weight(self, batch: Batch, old: Tensor, target: Tensor) -> float | Tensor:
        """w of `train.objectives.estimators`, one number or [B]; `old` and `target` are velocities [B, C, F, H, W]."""
        rollouts, config, step = self.inputs.rollouts, self.config, batch.unit.step
        if config.objective != "grpo" or config.error_weight == "adaptive":
            mask = self.free(batch, old)
            return estimators.adaptive_weight(old, target, rollouts.schedule.sigmas[step], mask)
        return estimators.step_weight(config.error_weight, rollouts.schedule, step, rollouts.window(batch.unit.group))

    def error(self, batch: Batch, x: Tensor, velocity: Tensor) -> Tensor:
        """Flow-matching error [B] of a velocity at x."""
        target = (x - batch.x0) / self.inputs.rollouts.schedule.sigmas[batch.unit.step]
        return losses.matching_error(velocity, target, self.free(batch, x))

    def has_noise(self, unit: Unit) -> bool:
        """Whether the rollout took this step with noise."""
        return bool(self.inputs.rollouts.groups[unit.group].window)

    def free(self, batch: Batch, x: Tensor) -> Tensor | None:
        """Mask of the latents x [B, C, F, H, W] that are the policy's to choose; None when all are."""
        return self.policy.free_mask(x, batch.condition)

    def score(self, batch: Batch) -> StepScore:
        """The stored transition under the policy in force."""
        schedule = self.inputs.rollouts.schedule
        return step_log_prob(self.policy, schedule, batch.unit.step, batch.inputs(batch.x), batch.x_next)

    def old_mean(self, batch: Batch) -> Tensor:
        """Mean [B, C, F, H, W] of the stored transition under the policy that sampled, without gradient."""
        with self.rolled_out.in_place():
            return self.score(batch).mean

    def sampled_mean(self, batch: Batch) -> Tensor:
        """The same without a forward: x' - std z, with the noise z of the rollout drawn again from its seeds.

        It differs from `old_mean` by the rounding of the stored x'.
        """
        rollouts, unit = self.inputs.rollouts, batch.unit
        drawn = noise_of(rollouts, unit, unit.step, unit.samples, batch.x_next.shape[1:])
        return batch.x_next - step_std(rollouts.schedule, unit.step) * drawn.to(batch.x_next.device)

    def old_velocity(self, batch: Batch, x: Tensor) -> Tensor:
        """Velocity [B, C, F, H, W] at x of the policy that sampled, without gradient."""
        with self.rolled_out.in_place():
            return self.velocity(batch, x)

    def velocity(self, batch: Batch, x: Tensor) -> Tensor:
        """Guided velocity [B, C, F, H, W] at x of the policy in force."""
        return step_velocity(self.policy, self.inputs.rollouts.schedule, batch.unit.step, batch.inputs(x))
