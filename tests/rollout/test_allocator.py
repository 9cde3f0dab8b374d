"""The simulated allocator against its rules, by hand: segments, splits, blocks that grow together again."""

from __future__ import annotations

import random

from rollout.ranks.allocator import MIB, Allocator, Block


def test_small_blocks_share_a_segment_of_2_mib() -> None:
    allocator = Allocator()
    first = [allocator.allocate(MIB // 2) for _ in range(4)]
    assert allocator.reserved == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved == 4 * MIB
    allocator.free(first[1])
    allocator.free(first[2])
    allocator.allocate(MIB)  # the two halves have become one block
    assert allocator.reserved == 4 * MIB


def test_middle_blocks_share_20_mib_and_large_ones_have_their_own() -> None:
    allocator = Allocator()
    for _ in range(4):
        allocator.allocate(5 * MIB)
    assert allocator.reserved == 20 * MIB
    large = allocator.allocate(11 * MIB + 1)
    assert allocator.reserved == 32 * MIB
    allocator.free(large)
    allocator.allocate(6 * MIB)  # cut from the large block
    assert allocator.reserved == 32 * MIB
    allocator.allocate(6 * MIB + 512)  # what is left of it is too small by half a KiB
    assert allocator.reserved == 52 * MIB


def test_gaps_that_fit_nothing_are_the_price() -> None:
    """Blocks of two segments never become one."""
    allocator = Allocator()
    whole = [allocator.allocate(30 * MIB), allocator.allocate(30 * MIB)]
    for block in whole:
        allocator.free(block)
    allocator.allocate(40 * MIB)  # 60 MiB are free, in two pieces
    assert allocator.reserved == 100 * MIB


def test_nothing_is_lost_and_what_is_reserved_is_enough() -> None:
    draw, allocator, alive = random.Random(0), Allocator(), list[Block]()
    peak = now = 0
    for _ in range(2000):
        if alive and draw.random() < 0.5:
            block = alive.pop(draw.randrange(len(alive)))
            now -= block.size
            allocator.free(block)
        else:
            alive.append(allocator.allocate(int(2 ** draw.uniform(0, 26))))
            now += alive[-1].size
        peak = max(peak, now)
        free = sum(block.size for block in allocator.small + allocator.large)
        assert now + free == allocator.reserved
    assert peak <= allocator.reserved < 1.6 * peak
