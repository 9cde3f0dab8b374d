"""The rollouts of one iteration as training reads them back: chunk by chunk, in the shape they were made in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout.schedule import Plan
from shards.errors import UserError
from shards.reader import Shard, open_shard
from shards.run import Stage, sample_key
from shards.urls import in_shell
from train.order import Unit, chunks

if TYPE_CHECKING:
    from rollout.policy import Policy


@dataclass(frozen=True)
class Rollouts:
    """The committed shards of a stage and the plan they were made by."""

    stage: Stage
    plan: dict[str, Any]
    """plan.json of the stage."""
    schedule: Plan
    """The frozen sampler: sigmas, timesteps, experts, guidance, law."""
    shards: dict[int, Shard]
    groups: dict[str, dict[str, Any]]
    """The plan's entry of each group, by group key."""

    @classmethod
    def open(cls, stage: Stage, *, partial: bool = False) -> Rollouts:
        """Open every shard of a stage.

        UserError when the plan or, unless `partial`, a shard is missing, and when shards were made by another plan.
        """
        plan, again = stage.plan(), f"rushes rollout {in_shell(stage.run_path)} --iteration {stage.iteration}"
        if plan is None:
            raise UserError(f"{stage.path} has no rollouts", f"run `{again}` first")
        present = stage.shards()
        missing = sorted(set(range(stage.expected())) - set(present))
        if missing and not partial:
            names = ", ".join(stage.shard_path(number).name for number in missing[:8])
            raise UserError(
                f"{stage.path} lacks {len(missing)} of {stage.expected()} shards: {names}",
                f"run `{again}`; it makes only what is missing",
            )
        groups = {group["key"]: group for group in plan["groups"]}
        opened = {number: open_shard(stage, number) for number in present}
        sha256 = stage.plan_sha256()
        for number, shard in opened.items():
            if shard.manifest.get("plan_sha256") != sha256:
                raise UserError(
                    f"{stage.plan_path} was changed after {stage.shard_path(number).name} was sampled by it",
                    "restore it from a copy; `rushes verify` lists all faults",
                )
        return cls(stage, plan, Plan.from_dict(plan["sampler"]), opened, groups)

    def units(self) -> list[Unit]:
        """Every (chunk, stochastic step) of every shard, in plan order."""
        return [
            Unit(self.schedule.experts[step], number, group, first, count, step)
            for number in self.shards
            for group in self.plan["shards"][number]
            for first, count in chunks(self.plan["group_size"], self.plan["batch_size"])
            for step in self.window(group)
        ]

    def steps(self, expert: int) -> list[int]:
        """The steps of an expert that any group is trained on, ascending."""
        found = {step for group in self.groups for step in self.window(group)}
        return sorted(step for step in found if self.schedule.experts[step] == expert)

    def window(self, group: str) -> list[int]:
        """The steps of a group that are trained on: the stochastic ones, or, after a rollout without noise (which only
        DiffusionNFT can use), all but the first and the last."""
        return list(self.groups[group]["window"]) or list(range(1, self.schedule.steps - 1))

    def keys(self) -> list[str]:
        """Sample keys of all shards, in plan order."""
        return [key for number in self.shards for key in self.stage.keys(number)]


@dataclass(frozen=True)
class Inputs:
    """Rollouts with the advantages they are trained on."""

    rollouts: Rollouts
    specification: str
    """Name of the advantage specification, 8 hexadecimal digits."""
    advantages: Mapping[str, tuple[float, float]]
    """(advantage, weight) of each sample key; weight 0 means that the sample is not trained on."""

    def units(self) -> list[Unit]:
        """The units with at least one sample that counts."""
        return [unit for unit in self.rollouts.units() if self.weight([unit]) > 0]

    def weight(self, units: Iterable[Unit]) -> float:
        """Sum of the weights of all (sample, step) rows of the units: what a mean over them divides by."""
        return sum(self.advantages[key][1] for unit in units for key in keys_of(unit))


@dataclass(frozen=True)
class Stored:
    """What the files hold of a unit: on the host, as it was read. B samples of one group."""

    unit: Unit
    latents: Tensor
    """[B, n, C, F, H, W] as they are stored: before and after the step, or only the final ones."""
    log_prob: list[float]
    """B numbers, taken during the rollout; 0 where the objective needs none."""
    text: dict[str, Tensor]
    """Embeddings of the group and, of image-to-video, the condition."""
    x0_prev: list[Tensor] = field(default_factory=list)
    """B times [C, F, H, W], of the 2M law."""


@dataclass(frozen=True)
class Chunk:
    """One forward batch of the rollout at one step, on the policy's device. B samples of one group."""

    unit: Unit
    keys: list[str]
    x: Tensor
    """[B, C, F, H, W] fp32 latents before the step."""
    x_next: Tensor
    """[B, C, F, H, W] fp32 latents after the step, rounded as they were stored."""
    log_prob: Tensor
    """[B] fp32, taken during the rollout."""
    prompt: Tensor
    """[B, text_length, D] padded embeddings."""
    negative: Tensor
    """[B, text_length, D] padded embeddings of the negative prompt."""
    extra: dict[str, Any]
    """`condition` of image-to-video and `x0_prev` of the 2M law, where there are any."""


def keys_of(unit: Unit) -> list[str]:
    """Sample keys of a unit, in the order of the rollout's forward batch."""
    return [sample_key(unit.group, sample) for sample in range(unit.first, unit.first + unit.size)]


def read_step(rollouts: Rollouts, unit: Unit) -> Stored:
    """Read a unit from its shard, checksums verified: the states of a transition. Any thread may do this."""
    shard, keys = rollouts.shards[unit.shard], keys_of(unit)
    latents = torch.stack([shard.latents(key, [unit.step, unit.step + 1]) for key in keys])
    position = rollouts.window(unit.group).index(unit.step)
    two_steps = rollouts.schedule.law == "dpm-sde-2m"
    return Stored(
        unit,
        latents,
        [shard.row(key)["log_prob"][position] for key in keys],
        shard.group(unit.group),
        [shard.trajectory(key)["x0_prev"][position] for key in keys] if two_steps else [],
    )


def read_final(rollouts: Rollouts, unit: Unit) -> Stored:
    """The same for objectives that need no transition: the final latents."""
    shard, last = rollouts.shards[unit.shard], rollouts.schedule.steps
    latents = torch.stack([shard.latents(key, [last]) for key in keys_of(unit)])
    return Stored(unit, latents, [0.0] * unit.size, shard.group(unit.group))


def chunk_of(stored: Stored, policy: Policy) -> Chunk:
    """What was read, on the policy's device in the rollout's batch shape; of final latents x and x_next are equal."""
    latents = stored.latents.float().to(policy.device)
    extra: dict[str, Any] = {}
    if stored.x0_prev:
        extra["x0_prev"] = torch.stack(stored.x0_prev).float().to(policy.device)
    if "condition" in stored.text:
        extra["condition"] = stored.text["condition"].to(policy.device)
    prompt, negative = (policy.pad(stored.text[name], stored.unit.size) for name in ("prompt", "negative"))
    x, x_next = latents[:, 0].contiguous(), latents[:, -1].contiguous()
    return Chunk(stored.unit, keys_of(stored.unit), x, x_next, row(stored.log_prob, x), prompt, negative, extra)


def read_chunk(rollouts: Rollouts, policy: Policy, unit: Unit) -> Chunk:
    """Read a transition and bring it to the policy's device."""
    return chunk_of(read_step(rollouts, unit), policy)


def row(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as an fp32 tensor [B] on the device of `like`."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)
