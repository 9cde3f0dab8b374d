"""The rollouts of one iteration as training reads them back: batch by batch, in the shape they were made in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rollout.step import StepInputs
from rollout.transitions import noise_seed, noises
from shards.errors import UserError
from shards.plan import Group, RolloutPlan, sample_key
from shards.reader import Shard, open_shard
from shards.records.schedule import Schedule
from shards.run import Stage
from shards.store.urls import in_shell
from train.order import Unit

if TYPE_CHECKING:
    from rollout.policy import Policy


FRESH_NOISE = 1_000_000
"""Added to a step's number for the seed of fresh noise. No schedule is that long, so no noise of a rollout is repeated.
"""


@dataclass(frozen=True)
class Rollouts:
    """The committed shards of a stage and the plan they were made by."""

    stage: Stage
    plan: RolloutPlan
    shards: dict[int, Shard]

    @property
    def schedule(self) -> Schedule:
        """The frozen sampler: sigmas, timesteps, experts, guidance, law."""
        return self.plan.schedule

    @property
    def groups(self) -> dict[str, Group]:
        """The plan's record of each group, by group key."""
        return self.plan.by_key

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
        opened = {number: open_shard(stage, number) for number in present}
        sha256 = stage.plan_sha256()
        for number, shard in opened.items():
            if shard.manifest.plan_sha256 != sha256:
                raise UserError(
                    f"{stage.plan_path} was changed after {stage.shard_path(number).name} was sampled by it",
                    "restore it from a copy; `rushes verify` lists all faults",
                )
        return cls(stage, plan, opened)

    def units(self) -> list[Unit]:
        """Every (chunk, stochastic step) of every shard, in plan order."""
        return [
            Unit(self.schedule.experts[step], number, chunk.group, chunk.samples, step)
            for number in self.shards
            for chunk in self.plan.chunks(self.plan.shards[number])
            for step in self.window(chunk.group)
        ]

    def steps(self, expert: int) -> list[int]:
        """The steps of an expert that any group is trained on, ascending."""
        found = {step for group in self.groups for step in self.window(group)}
        return sorted(step for step in found if self.schedule.experts[step] == expert)

    def window(self, group: str) -> list[int]:
        """The steps of a group that are trained on: the stochastic ones, or, after a rollout without noise (which only
        DiffusionNFT can use), all but the first and the last."""
        return list(self.groups[group].window) or list(range(1, self.schedule.steps - 1))

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
    pairs: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """(winner, loser) by group key, numbers of samples, for objectives that compare samples."""
    alone: bool = False
    """Units hold the samples that count and no others, for objectives that replay no transition."""

    def units(self) -> list[Unit]:
        """The units with at least one sample that counts."""
        return [unit for unit in self._all_units() if self.weight([unit]) > 0]

    def _all_units(self) -> list[Unit]:
        everything = self.rollouts.units()
        if not self.alone:
            return everything
        size = self.rollouts.plan.batch_size
        places = dict.fromkeys((unit.expert, unit.shard, unit.group, unit.step) for unit in everything)
        return [
            Unit(expert, shard, group, samples, step)
            for expert, shard, group, step in places
            for samples in _cut(self._counting(group), size)
        ]

    def _counting(self, group: str) -> list[int]:
        """Numbers of the samples of a group that count."""
        numbers = range(self.rollouts.plan.group_size)
        return [number for number in numbers if self.advantages[sample_key(group, number)][1] > 0]

    def weight(self, units: Iterable[Unit]) -> float:
        """Sum of the weights of all (sample, step) rows of the units: what a mean over them divides by."""
        return sum(self.advantages[key][1] for unit in units for key in keys_of(unit))


def _cut(numbers: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(numbers[first : first + size]) for first in range(0, len(numbers), size)]


@dataclass(frozen=True)
class Stored:
    """What the files hold of a unit: on the host, as it was read. B samples of one group."""

    unit: Unit
    states: dict[str, Tensor]
    """[B, C, F, H, W] each, as stored, those that were read: `x` before the step, `x_next` after it, `x0` the last.

    With `x0` alone also `noise`, to be added to it.
    """
    log_prob: list[float]
    """B numbers, taken during the rollout; 0 where they were not read."""
    text: dict[str, Tensor]
    """Embeddings of the group and, of image-to-video, the condition."""
    x0_prev: list[Tensor] = field(default_factory=list)
    """B times [C, F, H, W], of the 2M law."""


@dataclass(frozen=True)
class Batch:
    """One forward batch at one step, on the policy's device. B samples of one group."""

    unit: Unit
    keys: list[str]
    states: dict[str, Tensor]
    """As in `Stored`, in fp32: rounded as they were stored."""
    log_prob: Tensor
    """[B] fp32, taken during the rollout."""
    prompt: Tensor
    """[B, text_length, D] padded embeddings."""
    negative: Tensor
    """[B, text_length, D] padded embeddings of the negative prompt."""
    condition: Tensor | None = None
    """Of image-to-video; one for all samples."""
    x0_prev: Tensor | None = None
    """[B, C, F, H, W] of the 2M law."""

    def inputs(self, x: Tensor) -> StepInputs:
        """What the step of the unit starts from at a state [B, C, F, H, W]: the stored one, or another."""
        return StepInputs(x, self.prompt, self.negative, self.condition, self.x0_prev)

    @property
    def x(self) -> Tensor:
        """[B, C, F, H, W] the state before the step."""
        return self.states["x"]

    @property
    def x_next(self) -> Tensor:
        """[B, C, F, H, W] the state after the step."""
        return self.states["x_next"]

    @property
    def x0(self) -> Tensor:
        """[B, C, F, H, W] the final latents."""
        return self.states["x0"]


def keys_of(unit: Unit) -> list[str]:
    """Sample keys of a unit, in the order of its forward batch."""
    return [sample_key(unit.group, sample) for sample in unit.samples]


def read_step(rollouts: Rollouts, unit: Unit) -> Stored:
    """Read a unit from its shard, checksums verified: the states of a transition. Safe in any thread."""
    shard, keys = rollouts.shards[unit.shard], keys_of(unit)
    position = rollouts.window(unit.group).index(unit.step)
    two_steps = rollouts.schedule.law == "dpm-sde-2m"
    return Stored(
        unit,
        _states(rollouts, unit, {"x": unit.step, "x_next": unit.step + 1}),
        [shard.row(key)["log_prob"][position] for key in keys],
        shard.group(unit.group),
        [shard.tensor(key, "x0_prev")[position] for key in keys] if two_steps else [],
    )


def read_end(rollouts: Rollouts, unit: Unit) -> Stored:
    """The same for the estimator that looks from the state before a step to the end of the video."""
    states = _states(rollouts, unit, {"x": unit.step, "x0": rollouts.schedule.steps})
    return Stored(unit, states, [0.0] * unit.size, rollouts.shards[unit.shard].group(unit.group))


def read_final(rollouts: Rollouts, unit: Unit, *, shared: bool = False) -> Stored:
    """The same for objectives that need no state of the trajectory but the final latents, and `noise` beside them.

    No rollout has seen that noise. With `shared` all samples of a group have the same, as pairs need it.
    """
    states = _states(rollouts, unit, {"x0": rollouts.schedule.steps})
    samples = [0] * unit.size if shared else unit.samples
    states["noise"] = noise_of(rollouts, unit, FRESH_NOISE + unit.step, samples, states["x0"].shape[1:])
    return Stored(unit, states, [0.0] * unit.size, rollouts.shards[unit.shard].group(unit.group))


def noise_of(rollouts: Rollouts, unit: Unit, step: int, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise [B, *shape] fp32 of these samples of the unit's group at a step, on the host. Safe in any thread."""
    plan, prompt = rollouts.plan, rollouts.groups[unit.group].prompt_id
    return noises(shape, (noise_seed(plan.seed, plan.iteration, prompt, sample, step) for sample in samples))


def _states(rollouts: Rollouts, unit: Unit, wanted: dict[str, int]) -> dict[str, Tensor]:
    """Stored latents of a unit [B, C, F, H, W] by name; `wanted` has the number of each state, ascending."""
    shard = rollouts.shards[unit.shard]
    latents = torch.stack([shard.latents(key, list(wanted.values())) for key in keys_of(unit)])
    return {name: latents[:, index] for index, name in enumerate(wanted)}


def to_batch(stored: Stored, policy: Policy) -> Batch:
    """What was read, on the policy's device."""
    states = {name: latents.float().to(policy.device).contiguous() for name, latents in stored.states.items()}
    like = next(iter(states.values()))
    x0_prev = torch.stack(stored.x0_prev).float().to(policy.device) if stored.x0_prev else None
    condition = stored.text["condition"].to(policy.device) if "condition" in stored.text else None
    prompt, negative = (policy.text.pad(stored.text[name], stored.unit.size) for name in ("prompt", "negative"))
    log_prob = row(stored.log_prob, like)
    return Batch(stored.unit, keys_of(stored.unit), states, log_prob, prompt, negative, condition, x0_prev)


def read_batch(rollouts: Rollouts, policy: Policy, unit: Unit) -> Batch:
    """Read a transition and bring it to the policy's device."""
    return to_batch(read_step(rollouts, unit), policy)


def row(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as an fp32 tensor [B] on the device of `like`."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)
