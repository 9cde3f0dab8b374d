"""Which transitions an update trains on: a pure function of seed, iteration, expert and the frozen inputs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")


class Unit(NamedTuple):
    """The smallest piece of work: one forward batch, at one step; of the rollout's own shape where it is replayed."""

    expert: int
    """0 = high noise (or the only expert), 1 = low noise."""
    shard: int
    group: str
    """Group key, `i000003-p000017`."""
    samples: tuple[int, ...]
    """Numbers of the samples in their group. A replayed transition takes a whole chunk of the rollout."""
    step: int
    """From `sigmas[step]` to `sigmas[step + 1]`."""

    @property
    def size(self) -> int:
        """Samples in the batch."""
        return len(self.samples)


def generator(seed: int, *names: object) -> np.random.Generator:
    """A Philox generator keyed by sha256 of the seed and the names: the same on every machine and numpy."""
    text = "/".join(str(part) for part in (seed, *names))
    return np.random.Generator(np.random.Philox(key=int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")))


def epoch_order(units: Iterable[Unit], *, seed: int, iteration: int, epoch: int, expert: int) -> list[Unit]:
    """The units of one expert, each exactly once, shuffled; independent of the order in which they were listed."""
    mine = sorted({unit for unit in units if unit.expert == expert})
    permutation = generator(seed, "order", iteration, epoch, expert).permutation(len(mine))
    return [mine[index] for index in permutation]


def minibatches(
    units: Sequence[Unit], *, seed: int, iteration: int, expert: int, updates: int, whole_groups: bool = False
) -> list[tuple[Unit, ...]]:
    """The units of each of `updates` optimizer steps of one expert; empty when the expert has no unit at all.

    One epoch is cut into `updates` parts that differ by one unit at most. With fewer units than updates, further epochs
    follow, each in its own order, so that no update is ever empty. With `whole_groups` all units of a group at a step
    stay in one minibatch, for losses that compare samples.
    """
    batches: list[tuple[Unit, ...]] = []
    if not any(unit.expert == expert for unit in units):
        return batches
    epoch = 0
    while len(batches) < updates:
        order = epoch_order(units, seed=seed, iteration=iteration, epoch=epoch, expert=expert)
        parts = _inseparable(order) if whole_groups else [(unit,) for unit in order]
        cut = split(parts, min(len(parts), updates - len(batches)))
        batches += [tuple(itertools.chain.from_iterable(batch)) for batch in cut]
        epoch += 1
    return batches


def _inseparable(order: Sequence[Unit]) -> list[tuple[Unit, ...]]:
    """The units of each group and step together, where the first of them stands in the order."""
    found: dict[tuple[str, int], list[Unit]] = {}
    for unit in order:
        found.setdefault((unit.group, unit.step), []).append(unit)
    return [tuple(units) for units in found.values()]


def split(order: Sequence[T], parts: int) -> list[tuple[T, ...]]:
    """Cut a list into consecutive parts whose lengths differ by one at most."""
    edges = [len(order) * part // parts for part in range(parts + 1)]
    return [tuple(order[start:stop]) for start, stop in itertools.pairwise(edges)]


class Slot(NamedTuple):
    """One forward batch of one rank."""

    unit: Unit
    counts: bool
    """False for padding: the unit is run, because all ranks must make the same number of forwards, with weight 0."""


@dataclass(frozen=True)
class RankPlan:
    """Which unit every data-parallel rank works on at every moment of one expert's training."""

    batches: list[tuple[Unit, ...]]
    """The units of each optimizer step, as one process would take them."""
    slots: list[NDArray[np.int64]]
    """[slots, ranks] for each optimizer step: position in its batch, -1 for padding."""

    def of_rank(self, update: int, rank: int) -> list[Slot]:
        """What a rank does in an update; every rank has the same number of slots."""
        batch = self.batches[update]
        return [Slot(batch[max(position, 0)], position >= 0) for position in self.slots[update][:, rank].tolist()]

    @property
    def padding(self) -> float:
        """Share of all forward batches that are padding, 0 to 1."""
        total = sum(table.size for table in self.slots)
        return sum(int((table < 0).sum()) for table in self.slots) / total if total else 0.0

    @property
    def imbalance(self) -> float:
        """How many samples more than the average the busiest rank gets, as a share of the average."""
        if not self.slots:
            return 0.0
        per_rank = np.zeros(self.slots[0].shape[1])
        for batch, table in zip(self.batches, self.slots, strict=True):
            sizes = np.array([*(unit.size for unit in batch), 0])  # -1 is the 0 at the end
            per_rank += sizes[table].sum(axis=0)
        return float(per_rank.max() / per_rank.mean() - 1.0)


def plan_ranks(
    units: Sequence[Unit],
    ranks: int,
    *,
    seed: int,
    iteration: int,
    expert: int,
    updates: int,
    whole_groups: bool = False,
) -> RankPlan:
    """Divide the minibatches of one expert among ranks: a pure function, so that all of them know the whole plan.

    The order is that of one process; the ranks take its units in turn, and the last turn of a minibatch is padded.
    """
    batches = minibatches(
        units, seed=seed, iteration=iteration, expert=expert, updates=updates, whole_groups=whole_groups
    )
    return RankPlan(batches, [deal(len(batch), ranks) for batch in batches])


def deal(count: int, ranks: int) -> NDArray[np.int64]:
    """Numbers 0 to count-1 dealt to ranks in turn: [turns, ranks], the last turn filled up with -1."""
    turns = -(-count // ranks)
    table = np.full(turns * ranks, -1, dtype=np.int64)
    table[:count] = np.arange(count)
    return table.reshape(turns, ranks)
