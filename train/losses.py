"""What one chunk of samples contributes to the loss of an expert: the clipped policy gradient, or DiffusionNFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout.schedule import step_scale, step_std
from rollout.step import step_log_prob
from rollout.transitions import noise, noise_seed
from train import objectives
from train.data import Chunk, Inputs, chunk_of, read_final, read_step
from train.order import Unit
from train.prefetch import Ahead
from train.weights import RolledOut

if TYPE_CHECKING:
    from rollout.policy import Policy
    from rollout.ranks.world import World
    from shards.config import TrainConfig

NFT_NOISE = 1_000_000  # step number of DiffusionNFT's noise: no schedule is that long, so no rollout noise is repeated


@dataclass
class Rows:
    """What one chunk contributes, sample by sample: all [B]."""

    loss: Tensor
    """The differentiable loss."""
    ratio: Tensor
    clipped: Tensor
    kl: Tensor
    shift: Tensor | None = None
    """Root mean square shift of the mean since the rollout, in standard deviations; None when not measured."""


class Losses:
    """The losses of one expert, under the policy as it is, as it was in the rollout, and under the reference."""

    def __init__(
        self, policy: Policy, inputs: Inputs, config: TrainConfig, expert: int, rolled_out: RolledOut, world: World
    ) -> None:
        self.policy, self.inputs, self.config, self.expert = policy, inputs, config, expert
        self.rolled_out, self.world = rolled_out, world
        self.references: dict[Unit, tuple[Tensor, Tensor]] = {}
        self.step_weights = _step_weights(inputs, config, expert)
        self.ahead = Ahead(partial(read_final if config.objective == "nft" else read_step, inputs.rollouts))
        self.old_log_probs: dict[Unit, Tensor] = {}

    def prepare(self, units: Sequence[Unit]) -> None:
        """Ask the reference for these units at once, where it is another set of weights that must be swapped in.

        One process keeps the answers. Ranks meet other units in later epochs than before, so that what one has kept
        another still misses; they ask anew each time, and so make the same number of forwards.
        """
        if not (self.policy.is_full and self.config.kl_beta > 0):
            return
        if self.world.size > 1:
            self.references.clear()
        missing = [unit for unit in units if unit not in self.references]
        if not missing:
            return
        with torch.no_grad(), self.policy.reference():
            for unit, following in zip(missing, [*missing[1:], units[0]], strict=True):
                chunk = self.read(unit, following)
                velocity, mean = self._under_reference(chunk, self._noised(chunk))
                self.references[unit] = velocity.to(self.rolled_out.away), mean.to(self.rolled_out.away)

    def rows(self, chunk: Chunk, advantage: Tensor, *, measure: bool, moved: bool) -> Rows:
        """The losses of a chunk, with gradient. `measure` asks for the shift of the mean, if the expert has `moved`."""
        if self.config.objective == "nft":
            return self._nft(chunk, advantage)
        return self._grpo(chunk, advantage, measure, moved)

    def _grpo(self, chunk: Chunk, advantage: Tensor, measure: bool, moved: bool) -> Rows:
        config, step = self.config, chunk.unit.step
        old_mean = self._old_mean(chunk) if config.ratio_norm or (measure and moved) else None
        scored = self._score(chunk)
        old_log_prob = self.old_log_probs[chunk.unit] if config.recompute_log_probs else chunk.log_prob
        log_ratio = scored.log_prob - old_log_prob
        if config.ratio_norm and old_mean is not None:
            log_ratio = objectives.ratio_norm(log_ratio, scored.mean, old_mean, scored.std, self._free(chunk))
        policy_loss = objectives.policy_loss(log_ratio, advantage, config.clip_range)
        kl = self._kl(chunk, scored)
        loss = self.step_weights[step] * policy_loss.loss + config.kl_beta * kl
        shift = None
        if old_mean is not None:
            shift = objectives.mean_shift(scored.mean.detach(), old_mean, scored.std, self._free(chunk))
        if measure and not moved:
            shift = torch.zeros_like(kl)
        return Rows(loss, policy_loss.ratio, policy_loss.clipped, kl, shift)

    def _nft(self, chunk: Chunk, advantage: Tensor) -> Rows:
        """DiffusionNFT on the final latents, noised afresh to the sigma of the unit's step."""
        rollouts, config = self.inputs.rollouts, self.config
        sigma = rollouts.schedule.sigmas[chunk.unit.step]
        x0, x, mask = chunk.x, self._noised(chunk), self._free(chunk)
        with self.rolled_out.in_place():
            old = self._velocity(chunk, x)
        velocity = self._velocity(chunk, x)
        optimality = objectives.nft_optimality(advantage, config.advantage_clip)
        error = objectives.nft_loss(velocity, old, x, x0, sigma, optimality, config.nft_beta, mask)
        loss = config.advantage_clip * error
        kl = torch.zeros_like(loss)
        if config.kl_beta > 0:
            reference, _ = self._reference(chunk, x)
            kl = objectives.kl_divergence("velocity", velocity=velocity, reference_velocity=reference,
                                          mean=velocity, reference_mean=reference, std=1.0, mask=mask)  # fmt: skip
        return Rows(loss + config.kl_beta * kl, torch.ones_like(loss), torch.zeros_like(loss, dtype=torch.bool), kl)

    def _kl(self, chunk: Chunk, scored: Any) -> Tensor:
        if self.config.kl_beta == 0:
            return torch.zeros_like(scored.log_prob)
        velocity, mean = self._reference(chunk, chunk.x)
        return objectives.kl_divergence(
            self.config.kl,
            velocity=scored.velocity,
            reference_velocity=velocity,
            mean=scored.mean,
            reference_mean=mean,
            std=scored.std,
            mask=self._free(chunk),
        )

    def _reference(self, chunk: Chunk, x: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and mean of the reference policy: as prepared, or asked for now, with the adapter off."""
        if chunk.unit in self.references:
            velocity, mean = self.references[chunk.unit]
            return velocity.to(x.device), mean.to(x.device)
        with torch.no_grad(), self.policy.reference():
            return self._under_reference(chunk, x)

    def _under_reference(self, chunk: Chunk, x: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and mean of the policy in force; where the mean is not needed the velocity stands for it."""
        if self.config.objective == "grpo" and self.config.kl == "transition":
            scored = self._score(chunk)
            return scored.velocity, scored.mean
        velocity = self._velocity(chunk, x)
        return velocity, velocity

    def read(self, unit: Unit, following: Unit | None = None) -> Chunk:
        """The chunk of a unit, as the objective needs it; `following` is then read in the background, to come next."""
        with self.world.together():
            return chunk_of(self.ahead.take(unit, following), self.policy)

    def _noised(self, chunk: Chunk) -> Tensor:
        """What the model is shown: the latents of the step, or, for DiffusionNFT, the final ones noised afresh."""
        if self.config.objective == "grpo":
            return chunk.x
        sigma = self.inputs.rollouts.schedule.sigmas[chunk.unit.step]
        return (1.0 - sigma) * chunk.x + sigma * self._fresh_noise(chunk).to(chunk.x.device)

    def _free(self, chunk: Chunk) -> Tensor | None:
        """The latents that are the policy's to choose; None when all are."""
        return self.policy.free_mask(chunk.x, chunk.extra.get("condition"))

    def _score(self, chunk: Chunk) -> Any:
        schedule = self.inputs.rollouts.schedule
        return step_log_prob(
            self.policy, schedule, chunk.unit.step, chunk.x, chunk.x_next, chunk.prompt, chunk.negative, **chunk.extra
        )

    def _old_mean(self, chunk: Chunk) -> Tensor:
        with self.rolled_out.in_place():
            mean: Tensor = self._score(chunk).mean
        return mean

    def _velocity(self, chunk: Chunk, x: Tensor) -> Tensor:
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

    def _fresh_noise(self, chunk: Chunk) -> Tensor:
        plan, group = self.inputs.rollouts.plan, self.inputs.rollouts.groups[chunk.unit.group]
        step = NFT_NOISE + chunk.unit.step
        samples = range(chunk.unit.first, chunk.unit.first + chunk.unit.size)
        seeds = [noise_seed(plan["seed"], plan["iteration"], group["prompt_id"], sample, step) for sample in samples]
        return torch.stack([noise(chunk.x.shape[1:], seed=seed) for seed in seeds])


def _step_weights(inputs: Inputs, config: TrainConfig, expert: int) -> dict[int, float]:
    """Loss weight of every step this expert trains on; the frozen plan decides, so all updates use the same."""
    if config.objective == "nft":
        return {}
    schedule = inputs.rollouts.schedule
    steps = inputs.rollouts.steps(expert)
    stds = {step: step_std(schedule, step) for step in steps}
    # RatioNorm takes the division by std out of the log-ratio, and so out of its gradient
    scales = {step: step_scale(schedule, step) * (stds[step] if config.ratio_norm else 1.0) for step in steps}
    return objectives.step_weights(config.step_weight, stds, scales)
