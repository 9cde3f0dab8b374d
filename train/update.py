"""One expert in training: its losses, its optimizer, one update after another."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout.schedule import EXPERT_NAMES
from rollout.step import step_log_prob
from rollout.transitions import gradient_scale, noise, noise_seed, transition
from shards.errors import RunFailed
from train import objectives
from train.checkpoint import TrainerState
from train.data import Chunk, Inputs, read_chunk, read_final, row
from train.masters import Masters
from train.order import Unit

if TYPE_CHECKING:
    from rollout.policy import Policy
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


class ExpertTrainer:
    """Trains one expert, its LoRA or all of it, and brings it into memory; the others stay away from the device.

    Full training keeps, besides what the policy keeps: on the device, in fp32, masters of all bfloat16 weights, their
    gradients, two AdamW moments and the average (20 bytes a weight, 16 without `train.ema`); on the host the weights of
    the rollout and, with a KL term, the base model's velocities of all transitions.
    """

    def __init__(self, policy: Policy, inputs: Inputs, config: TrainConfig, expert: int) -> None:
        policy.use(expert)
        self.policy, self.inputs, self.config, self.expert = policy, inputs, config, expert
        self.name = EXPERT_NAMES[expert]
        self.masters = Masters(dict(policy.trainable(expert)))
        self.state = _new_state(self.masters.parameters, config)
        self.away = torch.device("cpu") if policy.is_full else policy.device  # where weights wait that are not in use
        weights = self.masters.weights.items()
        self.rollout_weights = {name: value.detach().to(self.away, copy=True) for name, value in weights}
        self.references: dict[Unit, tuple[Tensor, Tensor]] = {}
        self.step_weights = _step_weights(inputs, config, expert)
        self.old_log_probs: dict[Unit, Tensor] = {}
        self.moved = False
        if config.gradient_checkpointing:
            policy.module(expert).enable_gradient_checkpointing()  # type: ignore[operator]

    def finish(self) -> None:
        """Leave the expert as rollout expects it."""
        self.state.optimizer.zero_grad(set_to_none=True)
        self.masters.close()
        if self.config.gradient_checkpointing:
            self.policy.module(self.expert).disable_gradient_checkpointing()  # type: ignore[operator]

    @property
    def base_rate(self) -> float:
        """The learning rate of this expert, before warm-up."""
        second = self.config.learning_rate_2
        return second if self.expert == 1 and second is not None else self.config.learning_rate

    def learning_rate(self) -> float:
        """The rate of the next update: it rises linearly from 0 over `warmup` updates, counted over all iterations."""
        return self.base_rate * min(1.0, (self.state.updates + 1) / max(1, self.config.warmup))

    def update(self, units: Sequence[Unit]) -> dict[str, float]:
        """One optimizer step on a minibatch; returns its metrics.

        Gradients add up chunk by chunk, each with its own backward pass, and every row is divided by the weight of the
        whole minibatch, so that the result does not depend on how the rows are cut into chunks.
        """
        started = time.monotonic()
        self.state.optimizer.zero_grad(set_to_none=True)
        total = self.inputs.weight(units)
        self.prepare(units)
        collected = [self.backward(unit, total, measure=index == 0) for index, unit in enumerate(units)]
        norm = self._step()
        size = sum(value.numel() for value in self.state.parameters.values())
        return _summary(collected) | {
            "gradient_norm": norm,
            "gradient_rms": norm / math.sqrt(size),
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "seconds": time.monotonic() - started,
        }

    def prepare(self, units: Sequence[Unit]) -> None:
        """Ask the reference for these units at once, where it is another set of weights that must be swapped in."""
        missing = [unit for unit in units if unit not in self.references]
        if not (missing and self.policy.is_full and self.config.kl_beta > 0):
            return
        with torch.no_grad(), self.policy.reference():
            for unit in missing:
                chunk = self._read(unit)
                velocity, mean = self._under_reference(chunk, self._noised(chunk))
                self.references[unit] = velocity.to(self.away), mean.to(self.away)

    def backward(self, unit: Unit, total: float, *, measure: bool = False) -> dict[str, Tensor]:
        """Add the gradient of one chunk at one step, its rows weighted and divided by `total`; returns its rows."""
        nft = self.config.objective == "nft"
        chunk = self._read(unit)
        pairs = [self.inputs.advantages[key] for key in chunk.keys]
        weight = row([pair[1] for pair in pairs], chunk.x)
        advantage = objectives.clip_advantage(row([pair[0] for pair in pairs], chunk.x), self.config.advantage_clip)
        rows = self._nft(chunk, advantage) if nft else self._grpo(chunk, advantage, measure)
        (rows.loss * (weight / total)).sum().backward()
        return _detached(rows, advantage, weight)

    def recompute_log_probs(self, units: Sequence[Unit]) -> None:
        """Take the old log-probs of these units from the rollout's weights on this machine, not from the shards."""
        from train.replay import log_probs

        with self.as_rolled_out():
            for unit in units:
                chunk = read_chunk(self.inputs.rollouts, self.policy, unit)
                self.old_log_probs[unit] = log_probs(self.policy, self.inputs.rollouts, chunk)

    @contextmanager
    def as_rolled_out(self) -> Iterator[None]:
        """Inside, the expert has the weights that sampled the rollouts, and no gradient is recorded."""
        weights = self.masters.weights
        now = {name: weight.data.to(self.away) for name, weight in weights.items()}
        try:
            for name, weight in weights.items():
                weight.data = self.rollout_weights[name].to(self.policy.device)
            with torch.no_grad():
                yield
        finally:
            for name, weight in weights.items():
                weight.data = now[name].to(self.policy.device)

    def unmoved(self) -> list[str]:
        """Layers that no gradient has ever reached: adapters that are still zero, or weights without a moment."""
        if self.policy.is_full:
            moments = self.state.optimizer.state
            second = {name: moments.get(one, {}).get("exp_avg_sq") for name, one in self.state.parameters.items()}
            return [name for name, moment in second.items() if moment is None or not bool(moment.any())]
        ups = {name: value for name, value in self.state.parameters.items() if ".lora_B." in name}
        return [name.partition(".lora_B.")[0] for name, value in ups.items() if not bool(value.any())]

    def _grpo(self, chunk: Chunk, advantage: Tensor, measure: bool) -> Rows:
        config, step = self.config, chunk.unit.step
        old_mean = self._old_mean(chunk) if config.ratio_norm or (measure and self.moved) else None
        scored = self._score(chunk)
        old_log_prob = self.old_log_probs.get(chunk.unit, chunk.log_prob)
        log_ratio = scored.log_prob - old_log_prob
        if config.ratio_norm and old_mean is not None:
            log_ratio = objectives.ratio_norm(log_ratio, scored.mean, old_mean, scored.std, self._free(chunk))
        policy_loss = objectives.policy_loss(log_ratio, advantage, config.clip_range)
        kl = self._kl(chunk, scored)
        loss = self.step_weights[step] * policy_loss.loss + config.kl_beta * kl
        shift = None
        if old_mean is not None:
            shift = objectives.mean_shift(scored.mean.detach(), old_mean, scored.std, self._free(chunk))
        if measure and not self.moved:
            shift = torch.zeros_like(kl)
        return Rows(loss, policy_loss.ratio, policy_loss.clipped, kl, shift)

    def _nft(self, chunk: Chunk, advantage: Tensor) -> Rows:
        """DiffusionNFT on the final latents, noised afresh to the sigma of the unit's step."""
        rollouts, config = self.inputs.rollouts, self.config
        sigma = rollouts.schedule.sigmas[chunk.unit.step]
        x0, x, mask = chunk.x, self._noised(chunk), self._free(chunk)
        with self.as_rolled_out():
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

    def _read(self, unit: Unit) -> Chunk:
        read = read_final if self.config.objective == "nft" else read_chunk
        return read(self.inputs.rollouts, self.policy, unit)

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
        with self.as_rolled_out():
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

    def _step(self) -> float:
        """Clip the gradient, step, average; returns the norm before clipping."""
        state = self.state
        norm = torch.nn.utils.clip_grad_norm_(state.parameters.values(), self.config.max_grad_norm).item()
        if not math.isfinite(norm):
            raise RunFailed(
                f"{self.name} expert, update {state.updates + 1}: the gradient norm is {norm}",
                "a latent or a weight is not finite, or float16 overflowed; `rushes verify` checks the shards",
            )
        for group in state.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        state.optimizer.step()
        self.masters.publish()
        state.updates += 1
        self.moved = True
        with torch.no_grad():
            for name, average in state.ema.items():
                average.lerp_(state.parameters[name].to(average), 1.0 - self.config.ema)
        return norm


def _new_state(parameters: dict[str, torch.nn.Parameter], config: TrainConfig) -> TrainerState:
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    ema = {name: value.detach().float().clone() for name, value in parameters.items()} if config.ema > 0 else {}
    return TrainerState(parameters, optimizer, ema)


def _step_weights(inputs: Inputs, config: TrainConfig, expert: int) -> dict[int, float]:
    """Loss weight of every step this expert trains on; the frozen plan decides, so all updates use the same."""
    if config.objective == "nft":
        return {}
    schedule = inputs.rollouts.schedule
    steps = sorted({unit.step for unit in inputs.rollouts.units() if unit.expert == expert})
    nothing = torch.zeros(1, 1)
    stds, scales = {}, {}
    for step in steps:
        law = (schedule.law, schedule.form)
        edge = (schedule.sigmas[step], schedule.sigmas[step + 1], schedule.eta)
        stds[step] = transition(*law, nothing, nothing, *edge, sigma_1=schedule.sigmas[1])[1]
        scales[step] = gradient_scale(*law, *edge, schedule.sigmas[1])
    return objectives.step_weights(config.step_weight, stds, scales)


def _detached(rows: Rows, advantage: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Rows that count, on the CPU, for the metrics."""
    counts = weight > 0
    found = {"weight": weight, "loss": rows.loss, "ratio": rows.ratio, "clipped": rows.clipped, "kl": rows.kl}
    found["advantage"] = advantage
    if rows.shift is not None:
        found["shift"] = rows.shift
    return {name: value.detach()[counts].float().cpu() for name, value in found.items()}


def _summary(collected: list[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics of an update from the rows of its chunks, averaged by weight."""
    joined = {name: torch.cat([rows[name] for rows in collected if name in rows]) for name in collected[0]}
    weight = joined["weight"] / joined["weight"].sum()

    def mean(name: str) -> float:
        return float((joined[name] * weight).sum())

    advantage = joined["advantage"]
    summary = {
        "loss": mean("loss"),
        "ratio_mean": mean("ratio"),
        "ratio_min": joined["ratio"].min().item(),
        "ratio_max": joined["ratio"].max().item(),
        "clip_fraction": mean("clipped"),
        "kl": mean("kl"),
        "advantage_mean": mean("advantage"),
        "advantage_std": advantage.std(correction=0).item(),
        "advantage_max": advantage.abs().max().item(),
        "rows": float(len(weight)),
    }
    if "shift" in joined:
        summary["mean_shift"] = joined["shift"].square().mean().sqrt().item()
    return summary
