"""Who works on what when, for any number of ranks: the order of one process, dealt out; and the ranks themselves."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.ranks.world import World, full, local
from shards.config import RunConfig
from shards.errors import UserError
from shards.process import torchrun
from tests.train.test_order import make_units
from train.order import Unit, deal, minibatches, plan_ranks
from train.trainer import checksum


@settings(deadline=None)
@given(
    groups=st.integers(1, 6), chunk_count=st.integers(1, 3), steps=st.integers(2, 5), ranks=st.integers(1, 4),
    updates=st.integers(1, 9), seed=st.integers(0, 99), expert=st.integers(0, 1),
)  # fmt: skip
def test_every_transition_once_whatever_the_ranks(
    groups: int, chunk_count: int, steps: int, ranks: int, updates: int, seed: int, expert: int
) -> None:
    units = make_units(groups, chunk_count, steps)
    arguments = {"seed": seed, "iteration": 2, "expert": expert, "updates": updates}
    alone = minibatches(units, **arguments)
    plan = plan_ranks(units, ranks, **arguments)
    assert plan.batches == alone
    for update, batch in enumerate(alone):
        slots = [plan.of_rank(update, rank) for rank in range(ranks)]
        assert len({len(one) for one in slots}) == 1  # all ranks make the same number of forwards
        turns = [slot for turn in zip(*slots, strict=True) for slot in turn]
        assert tuple(slot.unit for slot in turns if slot.counts) == batch  # in the order of one process
        assert all(slot.counts for slot in turns[: len(batch)])
        assert len(turns) - len(batch) < ranks
        assert {slot.unit.expert for slot in turns} == {expert}
    first_epoch = alone[: sum(unit.expert == expert for unit in set(units))]
    used = [
        slot.unit for u in range(len(first_epoch)) for r in range(ranks) for slot in plan.of_rank(u, r) if slot.counts
    ]
    assert sorted(used) == sorted(unit for unit in units if unit.expert == expert)


def test_the_share_of_padding_is_that_of_the_last_turns() -> None:
    units = [Unit(0, 0, "i000000-p000000", (first,), 1) for first in range(10)]
    plan = plan_ranks(units, 4, seed=0, iteration=0, expert=0, updates=2)  # 5 and 5: two turns of four each
    assert [table.tolist() for table in plan.slots] == [[[0, 1, 2, 3], [4, -1, -1, -1]]] * 2
    assert plan.padding == 6 / 16
    assert plan.imbalance == 4 / 2.5 - 1
    assert deal(0, 3).shape == (0, 3)


def test_a_plan_for_512_ranks_and_100_000_transitions_takes_seconds() -> None:
    steps, size, groups = 5, 4, 1250  # 1250 groups of 16 samples in batches of 4, 5 steps of each: 100,000 transitions
    units = [
        Unit(step % 2, group // 8, f"i000000-p{group:06d}", tuple(range(first, first + size)), step)
        for group in range(groups)
        for first in range(0, 16, size)
        for step in range(steps)
    ]
    assert sum(unit.size for unit in units) == 100_000
    started = time.process_time()
    plans = [plan_ranks(units, 512, seed=0, iteration=0, expert=expert, updates=4) for expert in (0, 1)]
    work = [[plan.of_rank(update, 511) for update in range(4)] for plan in plans]
    assert time.process_time() - started < 5.0
    forwards = [sum(len(slots) for slots in updates) for updates in work]
    assert forwards == [32, 20]  # 15,000 and 10,000 units in 4 updates: 8 turns each of 3,750, 5 of 2,500
    assert plans[0].padding == pytest.approx(1 - 15_000 / (512 * 32))
    assert plans[1].padding == pytest.approx(1 - 10_000 / (512 * 20))
    assert max(plan.imbalance for plan in plans) < 0.1
    used = [tuple(slot.unit) for u in range(4) for r in range(512) for slot in plans[1].of_rank(u, r) if slot.counts]
    assert len(used) == len(set(used)) == 10_000


def test_one_process_is_a_world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = World.of(RunConfig(), "cpu")
    assert (alone.rank, alone.size, alone.data_parallel, alone.data_rank) == (0, 1, 1, 0)
    assert alone.gather("a") == alone.gather_data("a") == ["a"]
    assert alone.broadcast("b") == "b"
    alone.agree("thing", "c")
    alone.barrier()
    with pytest.raises(UserError) as raised, alone.together():
        raise UserError("wrong")
    assert not raised.value.told
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (torchrun.rank(), torchrun.world_size(), torchrun.local_rank(), torchrun.is_first()) == (3, 8, 1, False)
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(UserError, match="RANK = 'three' in the environment is not a number"):
        torchrun.rank()


def test_ranks_that_nobody_started_are_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RunConfig().train.model_copy(update={"ulysses": 2})
    with pytest.raises(UserError) as raised:
        World.of(RunConfig().model_copy(update={"train": settings}), "cpu")
    assert str(raised.value) == (
        "train.ulysses = 2: 1 rank cannot be divided so (hint: 1 would do; torchrun --nproc-per-node N starts N ranks)"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE = 2 in the environment, but no MASTER_ADDR"):
        World.joined()


def test_plain_tensors_are_their_own_shards_and_their_sum_sees_every_bit() -> None:
    tensor = torch.arange(6.0)
    assert local(tensor) is tensor
    assert full(tensor) is tensor
    changed = tensor.clone()
    changed.view(torch.int32)[3] += 1
    sums = {checksum({"a": tensor}), checksum({"a": changed}), checksum({"b": tensor}), checksum({})}
    assert len(sums) == 4
    assert checksum({"a": tensor}) == checksum({"a": torch.arange(6.0)})
