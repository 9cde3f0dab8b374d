"""Ranks that sample one video together: the first of a group decides and writes, the others compute along (Ulysses)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rollout.ranks.world import World
from rollout.sampler import Sampler, State, Tensors
from shards.errors import RunFailed, UserError
from shards.process.torchrun import world_size

if TYPE_CHECKING:
    from rollout.policy import Policy
    from shards.config import RunConfig
    from shards.plan import Chunk, RolloutPlan

END, STAY = "end", "stay"


class UlyssesGroup:
    """The ranks that share the tokens of each video: consecutive ones, as many as `rollout.ulysses` says."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        degree, size = config.rollout.ulysses, world_size()
        if size % degree:
            start = "start the program with torchrun" if size == 1 else f"a divisor of {size} would do"
            raise UserError(f"rollout.ulysses = {degree}: {size} ranks cannot be divided so", start)
        layout = config.train.model_copy(update={"ulysses": degree, "replicate": 1})
        self.world = World.of(config.model_copy(update={"train": layout}), device)
        assert self.world.device_mesh is not None
        self.peers = self.world.device_mesh["ulysses"].get_group()
        self.leader = self.world.rank - self.world.rank % degree

    @classmethod
    def of(cls, config: RunConfig, device: torch.device) -> UlyssesGroup | None:
        """The group of this rank; None where each rank samples videos of its own. All ranks must call this."""
        return cls(config, device) if config.rollout.ulysses > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this rank decides and writes."""
        return self.world.rank == self.leader

    def tell(self, what: Any) -> Any:
        """What the leader says, on every rank of the group. Raises RunFailed when the leader is gone."""
        box = [what]
        try:
            dist.broadcast_object_list(box, src=self.leader, group=self.peers, device=torch.device("cpu"))
        except RuntimeError as error:
            raise RunFailed(
                f"rank {self.world.rank}: the ranks that sample with it have ended", "the one that ended first says why"
            ) from error
        return box[0]


class Leader(Sampler):
    """The sampler of the rank that decides: it has the others of its group compute along."""

    def __init__(self, group: UlyssesGroup, policy: Policy, plan: RolloutPlan, plan_sha256: str) -> None:
        super().__init__(policy, plan, plan_sha256)
        self.group = group

    def advance(self, chunk: Chunk, state: State, shared: Mapping[str, Tensors], steps: Sequence[int]) -> None:
        """As Sampler, by all ranks of the group."""
        self.group.tell((chunk, state, {group: shared[group] for group, _ in chunk.parts}, list(steps)))
        super().advance(chunk, state, shared, steps)

    def stay(self) -> None:
        """Keep the others from giving up while there is nothing to do."""
        self.group.tell(STAY)

    def end(self) -> None:
        """Let the others go."""
        self.group.tell(END)


def follow(group: UlyssesGroup, sampler: Sampler) -> None:
    """Compute along with the leader, until it says that the stage is at its end. What comes out is the leader's."""
    while (told := group.tell(None)) != END:
        if told == STAY:
            continue
        chunk, state, shared, steps = told
        sampler.policy.experts.use(sampler.schedule.experts[steps[0]])
        sampler.advance(chunk, state, shared, steps)
