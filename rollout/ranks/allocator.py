"""What PyTorch takes from a GPU for the tensors that live there: its allocator, by sizes alone."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(eq=False)
class Block:
    """A piece of a segment, and its neighbours there."""

    size: int
    pool: list[Block]
    """The free blocks among which this one is when it is free."""
    used: bool = True
    before: Block | None = None
    after: Block | None = None


class Allocator:
    """PyTorch's caching allocator by its sizes, without `expandable_segments`: c10/cuda/CUDACachingAllocator.cpp.

    Blocks are multiples of 512 bytes; up to 1 MiB they come from segments of 2 MiB, up to 10 MiB from segments of 20
    MiB, and beyond from a segment of their own in steps of 2 MiB. The smallest free block that is large enough is
    taken and split, unless what is left of a large one is 1 MiB or less. Segments are never given back.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self.small: list[Block] = []
        self.large: list[Block] = []

    def allocate(self, size: int) -> Block:
        """A block of at least `size` bytes."""
        size = max(512, -(-size // 512) * 512)
        pool = self.small if size <= MIB else self.large
        fitting = [block for block in pool if block.size >= size]
        block = min(fitting, key=lambda one: one.size) if fitting else self._segment(size, pool)
        if fitting:
            pool.remove(block)
        block.used = True
        rest = block.size - size
        if rest >= 512 if pool is self.small else rest > MIB:
            block.size = size
            left = Block(rest, pool, False, block, block.after)
            if block.after:
                block.after.before = left
            block.after = left
            pool.append(left)
        return block

    def free(self, block: Block) -> None:
        """Give a block back; free neighbours become one."""
        block.used = False
        for other in (block.before, block.after):
            if other is None or other.used:
                continue
            other.pool.remove(other)
            block.size += other.size
            if other is block.before:
                block.before = other.before
                if block.before:
                    block.before.after = block
            else:
                block.after = other.after
                if block.after:
                    block.after.before = block
        block.pool.append(block)

    def _segment(self, size: int, pool: list[Block]) -> Block:
        whole = 2 * MIB if size <= MIB else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        self.reserved += whole
        return Block(whole, pool)
