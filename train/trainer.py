"""One expert in training: its losses, its optimizer, one update after another."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rollout.ranks.world import World, full, local
from shards.errors import RunFailed
from shards.process.peak_memory import peak_memory_bytes
from shards.run import EXPERT_NAMES
from train.batch_loss import Losses, Rows
from train.checkpoint import TrainerState
from train.data import Inputs, read_batch, row
from train.objectives import losses
from train.order import Slot, Unit, deal
from train.weights import Masters, RolledOut

if TYPE_CHECKING:
    from rollout.policy import Policy
    from shards.config import TrainConfig


class ExpertTrainer:
    """Trains one expert, its LoRA or all of it, and brings it into memory; the others stay away from the device.

    Full training keeps, besides what the policy keeps: on the device, in fp32, masters of all bfloat16 weights, their
    gradients, two AdamW moments and the average (20 bytes a weight, 16 without `train.ema`); on the host the weights of
    the rollout and, with a KL term, the base model's velocities of all transitions.
    """

    def __init__(
        self, policy: Policy, inputs: Inputs, config: TrainConfig, expert: int, world: World | None = None
    ) -> None:
        policy.experts.use(expert)
        self.policy, self.inputs, self.config, self.expert = policy, inputs, config, expert
        self.world = world or World()
        self.name = EXPERT_NAMES[expert]
        self.masters = Masters(dict(policy.experts.trainable(expert)), policy.experts.dtypes(expert))
        self.state = _new_state(self.masters.parameters, config)
        # where weights wait that are not in use
        away = torch.device("cpu") if policy.experts.is_full else policy.device
        self.rolled_out = RolledOut(self.masters.weights, away)
        self.losses = Losses(policy, inputs, config, expert, self.rolled_out, self.world)
        self.moved = False
        if config.gradient_checkpointing:
            policy.experts.module(expert).enable_gradient_checkpointing()  # type: ignore[operator]

    def close(self) -> None:
        """Leave the expert as rollout expects it, and end the thread that reads ahead."""
        self.losses.ahead.close()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.masters.close()
        if self.config.gradient_checkpointing:
            self.policy.experts.module(self.expert).disable_gradient_checkpointing()  # type: ignore[operator]

    @property
    def base_rate(self) -> float:
        """The learning rate of this expert, before warm-up."""
        second = self.config.learning_rate_2
        return second if self.expert == 1 and second is not None else self.config.learning_rate

    def learning_rate(self) -> float:
        """The rate of the next update: it rises linearly from 0 over `warmup` updates, counted over all iterations."""
        return self.base_rate * min(1.0, (self.state.updates + 1) / max(1, self.config.warmup))

    def update(self, units: Sequence[Unit], slots: Sequence[Slot], following: Unit | None = None) -> dict[str, float]:
        """One optimizer step on a minibatch, of which this rank does its slots; returns the metrics of the whole.

        Gradients add up batch by batch, each with its own backward pass (on ranks, one per forward). Every row is
        divided by the weight of the whole minibatch, so that the result does not depend on how the rows are cut into
        chunks or dealt to ranks.
        `following` is the first unit of the next update, to be read in the meantime.
        """
        started = time.monotonic()
        self.state.optimizer.zero_grad(set_to_none=True)
        total = self.inputs.weight(units)
        self.losses.prepare([slot.unit for slot in slots], self.moved)
        after = [*(slot.unit for slot in slots[1:]), following]
        collected, first_half = [], None
        for index, slot in enumerate(slots):
            if index == len(slots) // 2 > 0 and not self.policy.experts.is_full:
                first_half = {name: gradient.clone() for name, gradient in self._gradients().items()}
            collected.append(
                self.backward(slot.unit, total, measure=index == 0, counts=slot.counts, following=after[index])
            )
        signal = {} if first_half is None else {"signal": self._agreement(first_half)}
        norm = self._step()
        size = sum(value.numel() for value in self.state.parameters.values())
        return (
            _summary(self._of_all_ranks(_on_host(collected)))
            | signal
            | {
                "gradient_norm": norm,
                "gradient_rms": norm / math.sqrt(size),
                "learning_rate": self.state.optimizer.param_groups[0]["lr"],
                "seconds": time.monotonic() - started,
                "peak_memory_bytes": float(peak_memory_bytes()),
            }
        )

    def backward(
        self, unit: Unit, total: float, *, measure: bool = False, counts: bool = True, following: Unit | None = None
    ) -> dict[str, Tensor]:
        """Add the gradient of one batch at one step, its rows weighted and divided by `total`; returns its rows.

        Those that count, on the device: the host waits for nothing here.
        FSDP averages gradients over all ranks. What is wanted is their sum over samples and over parts of the token
        sequence, so the loss is multiplied by the number of ranks. Without `counts` every row has weight 0.
        `following` is the unit of the next call, which is read during the backward pass.
        """
        batch = self.losses.read(unit, following)
        pairs = [self.inputs.advantages[key] for key in batch.keys]
        weight = row([pair[1] if counts else 0.0 for pair in pairs], batch.log_prob)
        advantage = losses.clip_advantage(row([pair[0] for pair in pairs], batch.log_prob), self.config.advantage_clip)
        rows = self.losses.rows(batch, advantage, measure=measure, moved=self.moved)
        loss = (rows.loss * (weight / total)).sum()
        self.losses.ahead.begin()
        self.policy.experts.backward(loss * self.world.size if self.world.size > 1 else loss)
        if measure and self.config.is_published and not self.config.ratio_norm and self.world.data_rank > 0:
            rows.shift = None  # all ranks measured it, to stay in step; the first batch of the minibatch tells it
        kept = [index for index, pair in enumerate(pairs) if counts and pair[1] > 0]
        return _detached(rows, advantage, weight, None if len(kept) == len(pairs) else kept)

    def recompute_log_probs(self, units: Sequence[Unit]) -> None:
        """Take the old log-probs of these units from the rollout's weights on this machine, not from the shards."""
        from train.replay import log_probs

        found = {}
        with self.rolled_out.in_place():
            for position in deal(len(units), self.world.data_parallel)[:, self.world.data_rank].tolist():
                unit = units[max(position, 0)]
                with self.world.together():
                    batch = read_batch(self.inputs.rollouts, self.policy, unit)
                found[unit] = log_probs(self.policy, self.inputs.rollouts, batch).cpu()
        for part in self.world.gather_data(found):
            device = self.policy.device
            self.losses.old_log_probs |= {unit: value.to(device) for unit, value in part.items()}

    def unmoved(self) -> list[str]:
        """Layers that no gradient has ever reached: adapters that are still zero, or weights without a moment."""
        if self.policy.experts.is_full:
            moments = self.state.optimizer.state
            second = {name: moments.get(one, {}).get("exp_avg_sq") for name, one in self.state.parameters.items()}
            return self._zero_everywhere(second)
        ups = {name: value for name, value in self.state.parameters.items() if ".lora_B." in name}
        return [name.partition(".lora_B.")[0] for name in self._zero_everywhere(ups)]

    def check_ranks(self) -> str:
        """Checksum of the weights this rank computes with. RunFailed, from rank 0, when it is not that of all ranks."""
        own = f"{self.state.updates} updates, {checksum(self.state.parameters)}"
        found = self.world.gather(own)
        others = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
        if others:
            problem = f"{self.name} expert, update {self.state.updates}: rank {others[0]} has other weights than rank 0"
            hint = "a machine computes wrongly or a message was damaged; the checkpoint before this update is good"
            raise self.world.one_voice(RunFailed(problem, hint))
        return own

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights, whole, on the host of the first rank, as the module would round them; else empty."""
        found = {}
        for name, value in self.state.ema.items():
            whole = full(value).to(self.masters.dtypes[name])  # by all ranks at once
            if self.world.is_first:
                found[name] = whole.cpu()
        return found

    def _zero_everywhere(self, tensors: Mapping[str, Tensor | None]) -> list[str]:
        """Names of tensors that are missing, or hold nothing but zeros on any rank."""
        there = {name: local(value).any() for name, value in tensors.items() if value is not None}
        flags = torch.stack([*there.values()]).tolist() if there else []
        moved = dict.fromkeys(tensors, False) | dict(zip(there, flags, strict=True))
        everywhere = self.world.gather(moved)
        return [name for name in tensors if not any(found[name] for found in everywhere)]

    def _of_all_ranks(self, mine: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Rows of all chunks of the minibatch, in its order."""
        return [rows for turn in zip(*self.world.gather_data(mine), strict=True) for rows in turn]

    def _gradients(self) -> dict[str, Tensor]:
        """The gradients so far, by the names of their weights."""
        return {name: value.grad.detach() for name, value in self.state.parameters.items() if value.grad is not None}

    def _agreement(self, first: Mapping[str, Tensor]) -> float:
        """Cosine of the gradients of the two halves of a minibatch, of which `first` is one; 0 where one has none.

        The sums are added up where the gradients are, so that three numbers come to the host, not three a tensor.
        """
        second = {name: both - first[name] for name, both in self._gradients().items() if name in first}

        def dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
            products = [(one[name] * other[name]).sum() for name in second]
            return full(sum(products[1:], products[0])).item() if products else 0.0

        lengths = math.sqrt(dot(first, first) * dot(second, second))
        return dot(first, second) / lengths if lengths > 0 else 0.0

    def _step(self) -> float:
        """Clip the gradient, step, average; returns the norm before clipping."""
        state = self.state
        norm = full(torch.nn.utils.clip_grad_norm_(state.parameters.values(), self.config.max_grad_norm)).item()
        if not math.isfinite(norm):
            problem = f"{self.name} expert, update {state.updates + 1}: the gradient norm is {norm}"
            hint = "a latent or a weight is not finite, or float16 overflowed; `rushes verify` checks the shards"
            raise self.world.one_voice(RunFailed(problem, hint))
        for group in state.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        state.optimizer.step()
        self.masters.publish()
        state.updates += 1
        self.moved = True
        with torch.no_grad():
            for name, average in state.ema.items():
                value = local(state.parameters[name])
                local(average).lerp_(value.to(local(average)), 1.0 - self.config.ema)
        if self.world.size > 1:
            self.check_ranks()
        return norm


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits of all values of named tensors, whole; all ranks that share them must ask at once.

    The bits are added up where the tensors are, so that nothing but one number a tensor comes to the host.
    """
    sums = [full(value.detach()).contiguous().view(torch.int32).sum(dtype=torch.int64) for value in tensors.values()]
    numbers = torch.stack(sums).tolist() if sums else []
    return hashlib.sha256(repr([*zip(tensors, numbers, strict=True)]).encode()).hexdigest()[:16]


def _new_state(parameters: dict[str, torch.nn.Parameter], config: TrainConfig) -> TrainerState:
    """A new optimizer, in one kernel on a GPU; on a CPU that would change the last bits."""
    on_gpu = bool(parameters) and all(value.device.type == "cuda" for value in parameters.values())
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=on_gpu or None,
    )
    ema = {name: value.detach().float().clone() for name, value in parameters.items()} if config.ema > 0 else {}
    return TrainerState(parameters, optimizer, ema)


def _detached(rows: Rows, advantage: Tensor, weight: Tensor, kept: list[int] | None) -> dict[str, Tensor]:
    """Rows for the metrics, fp32: those at the indices `kept`, or all."""
    found = {"weight": weight, "loss": rows.loss, "ratio": rows.ratio, "clipped": rows.clipped, "kl": rows.kl}
    found["advantage"] = advantage
    found |= rows.more
    if rows.shift is not None:
        found["shift"] = rows.shift
    everything = {name: value.detach().float() for name, value in found.items()}
    if kept is None:
        return everything
    return {name: value[kept] for name, value in everything.items()}


def _on_host(collected: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Rows of all batches on the host, which waits for the device once."""
    values = [value for rows in collected for value in rows.values()]
    pieces = iter(torch.cat(values).cpu().split([len(value) for value in values]))
    return [{name: next(pieces) for name in rows} for rows in collected]


def _summary(collected: list[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics of an update from the rows of its chunks, averaged by weight."""
    joined = {name: torch.cat([rows[name] for rows in collected if name in rows]) for name in collected[0]}
    weight = joined["weight"] / joined["weight"].sum()

    def mean(name: str) -> float:
        return float((joined[name] * weight).sum())

    advantage, strength = joined["advantage"], joined["weight"] * joined["advantage"].abs()
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
        "effective_rows": (strength.sum().square() / strength.square().sum().clamp_min(1e-30)).item(),
    }
    if "moved" in joined:
        wanted = mean("wanted")
        summary["movement"] = math.sqrt(mean("moved") / wanted) if wanted > 0 else 0.0
    summary |= {name: mean(name) for name in ("pull", "hold", "gain", "pairs_right") if name in joined}
    if "shift" in joined:
        summary["mean_shift"] = joined["shift"].square().mean().sqrt().item()
    return summary
