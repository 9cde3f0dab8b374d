"""What one batch of samples contributes to the loss of an expert, by objective and estimator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rollout.schedule import step_scale, step_std
from shards.plan import sample_key
from train.data import Batch, Inputs, Rollouts, Stored, read_end, read_final, read_step, to_batch
from train.forwards import Forwards
from train.objectives import estimators, losses
from train.objectives.estimators import Compared
from train.objectives.settings import noised_afresh
from train.order import Unit
from train.prefetch import Ahead
from train.weights import RolledOut

if TYPE_CHECKING:
    from rollout.policy import Policy
    from rollout.ranks.world import World
    from shards.config import TrainConfig


@dataclass
class Rows:
    """What one batch contributes, sample by sample: all [B]."""

    loss: Tensor
    """The differentiable loss."""
    ratio: Tensor
    clipped: Tensor
    kl: Tensor
    shift: Tensor | None = None
    """Root mean square shift of the mean since the rollout, in standard deviations; None when not measured."""
    more: dict[str, Tensor] = field(default_factory=dict)
    """Measurements of the objective at hand, detached: see docs/metrics.md."""


class Losses:
    """The losses of one expert, under the policy as it is, as it was in the rollout, and under the reference."""

    def __init__(
        self, policy: Policy, inputs: Inputs, config: TrainConfig, expert: int, rolled_out: RolledOut, world: World
    ) -> None:
        self.policy, self.inputs, self.config, self.expert = policy, inputs, config, expert
        self.rolled_out, self.world = rolled_out, world
        self.forwards = Forwards(policy, inputs, config, rolled_out)
        self.references: dict[Unit, tuple[Tensor, Tensor]] = {}
        self.gains: dict[tuple[str, int], float] = {}
        self.step_weights = weights_of_steps(inputs, config, expert)
        self.ahead = Ahead(partial(_reader(config), inputs.rollouts))
        self.old_log_probs: dict[Unit, Tensor] = {}

    @property
    def proximal(self) -> float:
        """lambda of this expert."""
        second = self.config.proximal_2
        return second if self.expert == 1 and second is not None else self.config.proximal

    def prepare(self, units: Sequence[Unit], moved: bool) -> None:
        """Compute ahead what the losses of these units need of other weights or of each other."""
        self._prepare_references(units)
        if self.inputs.pairs and any(unit.size < self._group_size(unit) for unit in units):
            self._prepare_gains(units, moved)

    def _prepare_references(self, units: Sequence[Unit]) -> None:
        """Ask the reference for these units at once, where it is another set of weights that must be swapped in.

        One process keeps the answers. Ranks meet other units in later epochs than before, so that what one has kept
        another still misses; they ask anew each time, and so make the same number of forwards.
        """
        if not (self.policy.experts.is_full and self.config.kl_beta > 0):
            return
        if self.world.size > 1:
            self.references.clear()
        missing = [unit for unit in units if unit not in self.references]
        if not missing:
            return
        with torch.no_grad(), self.policy.experts.reference():
            for unit, following in zip(missing, [*missing[1:], units[0]], strict=True):
                batch = self.read(unit, following)
                self.ahead.begin()
                velocity, mean = self._under_reference(batch, self.forwards.state(batch))
                self.references[unit] = velocity.to(self.rolled_out.away), mean.to(self.rolled_out.away)

    @torch.no_grad()
    def _prepare_gains(self, units: Sequence[Unit], moved: bool) -> None:
        """The gain of every sample of these units, on all ranks: partners of a pair may be in different batches."""
        keys: list[tuple[str, int]] = []
        gains: list[Tensor] = []
        for unit, following in zip(units, [*units[1:], units[0]], strict=True):
            batch = self.read(unit, following)
            self.ahead.begin()
            x = self.forwards.state(batch)
            old = self.forwards.old_velocity(batch, x)
            velocity = self.forwards.velocity(batch, x) if moved else old
            gains.append(self.forwards.error(batch, x, velocity) - self.forwards.error(batch, x, old))
            keys += [(key, unit.step) for key in batch.keys]
        found = dict(zip(keys, torch.cat(gains).tolist(), strict=True))
        self.gains = {name: value for part in self.world.gather_data(found) for name, value in part.items()}

    def _group_size(self, unit: Unit) -> int:
        """Number of samples of a unit's group that have a pair."""
        return len({sample for pair in self.inputs.pairs.get(unit.group, ()) for sample in pair})

    def rows(self, batch: Batch, advantage: Tensor, *, measure: bool, moved: bool) -> Rows:
        """The losses of a batch with advantages [B], with gradient.

        `measure` asks for the shift of the mean, if the expert has `moved`.
        """
        if self.config.is_published:
            return self._published(batch, advantage, measure, moved)
        if self.config.objective == "sft":
            return self._supervised(batch)
        return self._matched(batch, advantage, moved)

    def _supervised(self, batch: Batch) -> Rows:
        """Flow matching of the final latents, as in pretraining."""
        x = self.forwards.state(batch)
        velocity = self.forwards.velocity(batch, x)
        error = self.forwards.error(batch, x, velocity)
        kl = self._kl(batch, x, velocity, velocity)
        one = torch.ones_like(kl)
        return Rows(error + self.config.kl_beta * kl, one, torch.zeros_like(one, dtype=torch.bool), kl)

    def _published(self, batch: Batch, advantage: Tensor, measure: bool, moved: bool) -> Rows:
        """The clipped ratio of a step's log-prob, by the stored transition."""
        config, step = self.config, batch.unit.step
        mask = self.forwards.free(batch, batch.x)
        old_mean = self._old_mean(batch) if config.ratio_norm or (measure and moved) else None
        scored = self.forwards.score(batch)
        old_log_prob = self.old_log_probs[batch.unit] if config.recompute_log_probs else batch.log_prob
        log_ratio = scored.log_prob - old_log_prob
        if config.ratio_norm and old_mean is not None:
            log_ratio = losses.ratio_norm(log_ratio, scored.mean, old_mean, scored.std, mask)
        policy_loss = losses.policy_loss(log_ratio, advantage, config.clip_range)
        kl = self._kl(batch, batch.x, scored.velocity, scored.mean)
        loss = self.step_weights[step] * policy_loss.loss + config.kl_beta * kl
        shift = None
        if old_mean is not None:
            shift = losses.mean_shift(scored.mean.detach(), old_mean, scored.std, mask)
        if measure and not moved:
            shift = torch.zeros_like(kl)
        return Rows(loss, policy_loss.ratio, policy_loss.clipped, kl, shift)

    def _old_mean(self, batch: Batch) -> Tensor:
        """Mean [B, C, F, H, W] of the stored transition when it was sampled.

        The noise of the step gives it back without a forward, within the rounding of the stored states. That is small
        beside any shift in fp32, not in half precision; and what enters the loss is 0 to the bit before the first
        update only from a forward.
        """
        whole = self.inputs.rollouts.plan.storage_dtype == "float32"
        if whole and not self.config.ratio_norm:
            return self.forwards.sampled_mean(batch)
        return self.forwards.old_mean(batch)

    def _matched(self, batch: Batch, advantage: Tensor, moved: bool) -> Rows:
        """Losses in the velocity of the policy, that of the policy that sampled, and a target, at one state.

        Before the first update both policies are one, which saves a forward. The old one goes first, as no backward
        pass may be pending when its weights are put in place.
        """
        x = self.forwards.state(batch)
        old = self.forwards.old_velocity(batch, x) if moved else None
        velocity = self.forwards.velocity(batch, x)
        old = velocity.detach() if old is None else old
        target = self.forwards.target(batch, x, old)
        weight, mask = self.forwards.weight(batch, old, target), self.forwards.free(batch, x)
        compared = estimators.compare(velocity, old, target, weight, mask)
        rows = self._objective(batch, advantage, x, velocity, old, target, compared)
        rows.kl = self._kl(batch, x, velocity, velocity)
        rows.loss = rows.loss + self.config.kl_beta * rows.kl
        rows.more |= {"moved": compared.square.detach(), "wanted": compared.wanted}
        if self.forwards.has_noise(batch.unit):
            scale = step_scale(self.inputs.rollouts.schedule, batch.unit.step)
            rows.shift = (compared.square.detach() * (scale**2 / weight)).sqrt()
        return rows

    def _objective(
        self,
        batch: Batch,
        advantage: Tensor,
        x: Tensor,
        velocity: Tensor,
        old: Tensor,
        target: Tensor,
        compared: Compared,
    ) -> Rows:
        config, zero = self.config, torch.zeros_like(advantage)
        if config.objective == "grpo":
            held = self._held(compared, advantage)
            weight = self.step_weights.get(batch.unit.step, 1.0)
            more = {
                "pull": (advantage * compared.pull).detach(),
                "hold": 0.5 * self.proximal * compared.square.detach(),
            }
            return Rows(weight * held.loss, held.ratio, held.clipped, zero, more=more)
        if config.objective == "nft":
            sigma = self.inputs.rollouts.schedule.sigmas[batch.unit.step]
            optimality = losses.nft_optimality(advantage, config.advantage_clip)
            mask = self.forwards.free(batch, x)
            error = losses.nft_loss(velocity, old, x, batch.x0, sigma, optimality, config.nft_beta, mask)
            return Rows(config.advantage_clip * error, zero + 1.0, zero.bool(), zero)
        error = self.forwards.error(batch, x, velocity)
        return self._preferred(batch, error, (error - self.forwards.error(batch, x, old)).detach())

    def _held(self, compared: Compared, advantage: Tensor) -> losses.PolicyLoss:
        """The loss of the policy gradient: with a hold, or the clipped ratio of the log-ratio <e, q> - |q|²/2."""
        if self.proximal > 0:
            arguments = compared.pull, compared.square, advantage
            return losses.held_loss(*arguments, self.proximal, self.config.clip_range)
        return losses.policy_loss(compared.pull - 0.5 * compared.square, advantage, self.config.clip_range)

    def _preferred(self, batch: Batch, error: Tensor, gain: Tensor) -> Rows:
        """DPO on the pairs of the batch's group; `error` and `gain` are [B]."""
        group, step = batch.unit.group, batch.unit.step
        pairs = self.inputs.pairs[group]
        samples = sorted({sample for pair in pairs for sample in pair})
        own = dict(zip(batch.unit.samples, gain, strict=True))
        everyone = torch.stack([
            own[sample] if sample in own else gain.new_tensor(self.gains[sample_key(group, sample), step])
            for sample in samples
        ])  # fmt: skip
        place = {sample: index for index, sample in enumerate(samples)}
        winners, losers = (torch.tensor([place[pair[side]] for pair in pairs], device=gain.device) for side in (0, 1))
        found = losses.pair_loss(everyone, winners, losers, self.config.dpo_beta)
        mine = torch.tensor([place[sample] for sample in batch.unit.samples], device=gain.device)
        push, loss, right, wins = (value[mine] for value in found)
        pulled = push * error
        total = pulled - pulled.detach() + loss + self.config.dpo_sft * wins * error
        zero = torch.zeros_like(loss)
        return Rows(total, zero + 1.0, zero.bool(), zero, more={"pairs_right": right, "gain": gain})

    # --- The reference -----------------------------------------------------------------------------------------------

    def _kl(self, batch: Batch, x: Tensor, velocity: Tensor, mean: Tensor) -> Tensor:
        """Distance [B] to the reference; of velocities wherever no transition is scored."""
        if self.config.kl_beta == 0:
            return torch.zeros(len(x), device=x.device)
        reference_velocity, reference_mean = self._reference(batch, x)
        transition = self.config.is_published
        return losses.kl_divergence(
            self.config.kl if transition else "velocity",
            velocity=velocity,
            reference_velocity=reference_velocity,
            mean=mean,
            reference_mean=reference_mean,
            std=step_std(self.inputs.rollouts.schedule, batch.unit.step) if transition else 1.0,
            mask=self.forwards.free(batch, x),
        )

    def _reference(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and mean of the reference policy: as prepared, or asked for now, with the adapter off."""
        if batch.unit in self.references:
            velocity, mean = self.references[batch.unit]
            return velocity.to(x.device), mean.to(x.device)
        with torch.no_grad(), self.policy.experts.reference():
            return self._under_reference(batch, x)

    def _under_reference(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity and mean of the policy in force; where the mean is not needed the velocity stands for it."""
        if self.config.is_published and self.config.kl == "transition":
            scored = self.forwards.score(batch)
            return scored.velocity, scored.mean
        velocity = self.forwards.velocity(batch, x)
        return velocity, velocity

    def read(self, unit: Unit, following: Unit | None = None) -> Batch:
        """The batch of a unit, as the objective needs it; `following` is what `ahead.begin` then begins to read."""
        with self.world.together():
            return to_batch(self.ahead.take(unit, following), self.policy)


def _reader(config: TrainConfig) -> Callable[[Rollouts, Unit], Stored]:
    """The function that reads what the objective needs of a unit, and draws its noise."""
    if noised_afresh(config):
        return partial(read_final, shared=config.objective == "dpo")
    return read_step if config.estimator == "noise" else read_end


def weights_of_steps(inputs: Inputs, config: TrainConfig, expert: int) -> dict[int, float]:
    """Loss weight of every step this expert trains on; the frozen plan decides, so all updates use the same."""
    if config.objective != "grpo" or config.step_weight == "none":
        return dict.fromkeys(inputs.rollouts.steps(expert), 1.0)
    schedule = inputs.rollouts.schedule
    steps = inputs.rollouts.steps(expert)
    stds = {step: step_std(schedule, step) for step in steps}
    # RatioNorm takes the division by std out of the log-ratio, and so out of its gradient
    scales = {step: step_scale(schedule, step) * (stds[step] if config.ratio_norm else 1.0) for step in steps}
    return losses.step_weights(config.step_weight, stds, scales)
