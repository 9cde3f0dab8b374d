"""The order of training: every unit once, one expert at a time, the same on every machine."""

from __future__ import annotations

import random
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from shards.plan import spans
from train.order import Unit, epoch_order, minibatches


def make_units(groups: int, chunk_count: int, steps: int) -> list[Unit]:
    return [
        Unit(int(step % 2), group // 3, f"i000001-p{group:06d}", tuple(range(4 * chunk, 4 * chunk + 4)), step)
        for group in range(groups)
        for chunk in range(chunk_count)
        for step in range(steps)
    ]


@given(group_size=st.integers(1, 40), batch_size=st.integers(1, 40))
def test_chunks_cover_a_group_once(group_size: int, batch_size: int) -> None:
    samples = [first + offset for first, count in spans(group_size, batch_size) for offset in range(count)]
    assert samples == list(range(group_size))
    assert all(count == batch_size for _, count in spans(group_size, batch_size)[:-1])


@settings(deadline=None)
@given(
    groups=st.integers(1, 6), chunk_count=st.integers(1, 3), steps=st.integers(2, 5),
    updates=st.integers(1, 9), seed=st.integers(0, 99), expert=st.integers(0, 1),
)  # fmt: skip
def test_every_unit_once_per_epoch_and_one_expert_per_minibatch(
    groups: int, chunk_count: int, steps: int, updates: int, seed: int, expert: int
) -> None:
    units = make_units(groups, chunk_count, steps)
    mine = sorted(unit for unit in units if unit.expert == expert)
    batches = minibatches(units, seed=seed, iteration=2, expert=expert, updates=updates)
    assert len(batches) == updates
    assert all(batch for batch in batches)
    assert {unit.expert for batch in batches for unit in batch} == {expert}
    first_epoch = [unit for batch in batches[: len(mine)] for unit in batch]
    assert sorted(first_epoch) == mine
    sizes = [len(batch) for batch in batches[: len(mine)]]
    assert max(sizes) - min(sizes) <= 1


def test_the_order_ignores_how_the_units_were_listed() -> None:
    units = make_units(5, 2, 4)
    shuffled = random.Random(7).sample(units, len(units))
    arguments = {"seed": 3, "iteration": 1, "expert": 0, "updates": 3}
    assert minibatches(units, **arguments) == minibatches(shuffled + units[:3], **arguments)


def test_seed_iteration_epoch_and_expert_all_change_the_order() -> None:
    units = [unit._replace(expert=expert) for unit in make_units(5, 2, 4) for expert in (0, 1)]
    base = {"seed": 3, "iteration": 1, "epoch": 0, "expert": 0}
    orders = [tuple(unit._replace(expert=0) for unit in epoch_order(units, **base))]
    for name in base:
        changed = epoch_order(units, **(base | {name: 1 if base[name] == 0 else 0}))
        orders.append(tuple(unit._replace(expert=0) for unit in changed))
    assert len(set(orders)) == len(orders)


def test_the_order_is_the_same_in_another_process() -> None:
    code = (
        "from tests.train.test_order import make_units; from train.order import minibatches;"
        "print(minibatches(make_units(4, 2, 3), seed=5, iteration=0, expert=0, updates=2))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == str(minibatches(make_units(4, 2, 3), seed=5, iteration=0, expert=0, updates=2))


def test_no_unit_of_an_expert_means_no_update() -> None:
    assert minibatches(make_units(2, 1, 1), seed=0, iteration=0, expert=1, updates=2) == []
