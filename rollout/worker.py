"""One worker's way through the shards of a stage: sampled chunk by chunk, one expert at a time, spooled and sealed."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rollout.sampler import Sampler, State, Tensors
from shards.plan import Chunk
from shards.process.background import Background
from shards.process.peak_memory import peak_memory_bytes
from shards.process.signals import check
from shards.process.versions import version_of
from shards.spool import (
    Sample,
    read_group,
    read_phase,
    remove_phase,
    spooled,
    write_group,
    write_phase,
    write_samples,
)
from shards.workers.worker import Tally, Worker, order
from shards.writer import seal

if TYPE_CHECKING:
    from shards.process.progress import Progress
    from shards.run import Stage
    from shards.workers.claims import Claim

PACKAGES = ("rushes", "torch", "diffusers", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class _InHand:
    """A shard that is being sampled."""

    shard: int
    held: Claim
    chunks: list[Chunk]
    """Those that were not finished."""
    shared: dict[str, Tensors]
    """What the samples of a group share, by group."""
    states: dict[Chunk, State]
    """Chunks between two experts."""


class Work:
    """What one worker does in a stage.

    Videos are encoded, spooled and sealed in a thread, one chunk behind the sampling, at best while the next chunk is
    decoded. What is counted is on the disk, and a claim is held until its shard is sealed.
    """

    def __init__(self, stage: Stage, sampler: Sampler, worker: Worker, progress: Progress | None) -> None:
        self.stage, self.sampler, self.worker = stage, sampler, worker
        self.made = 0
        """Videos sampled here."""
        self.broken = 0
        """Those of them that are not finite."""
        self.background = Background()
        self.tally = Tally(worker, progress, "videos", self._finished)
        self.tally.add(
            {shard: size for shard, size in sampler.plan.shard_sizes.items() if not stage.is_committed(shard)}
        )

    def run(self, wait: bool) -> list[int]:
        """Sample what is missing; returns the shards that living workers hold.

        With `wait` it stays until there are none.
        """
        with self.background:
            busy = self._go(order(range(self.stage.expected()), self.worker.part))
            while busy and (wait or not self.worker.all_held(busy)):
                self.tally.tell(f"waiting for {len(busy)} shards of others")
                self.sampler.stay()
                self.worker.wait()
                busy = self._go(busy)
        if not busy:
            self.tally.tell_rest()
        self.worker.sweep()
        return busy

    def _go(self, shards: Iterable[int]) -> list[int]:
        """Sample the shards that are missing and free; returns those that other workers hold."""
        busy = []
        for shard in shards:
            if self.stage.is_committed(shard):
                continue
            with ExitStack() as claimed:
                held = claimed.enter_context(self.worker.claim(shard))
                if not held or not (self.stage.is_committed(shard) or self._sample(shard, held)):
                    busy.append(shard)
                else:
                    self.background.add(claimed.pop_all().close)
        self.background.settle()
        return [shard for shard in busy if not self.stage.is_committed(shard)]

    def _sample(self, shard: int, held: Claim) -> bool:
        """All chunks of a shard through the high-noise steps, then all through the rest: one swap of experts.

        False when another worker took the shard from us in the meantime; what it finished is not made again.
        """
        began = time.monotonic()
        self.tally.take(shard)
        finished = spooled(self.stage, shard)
        groups = self.stage.groups(shard)
        self.tally.count(len(finished), f"shard {shard}")
        shared = self._shared(shard, groups)
        if len(shared) < len(groups):  # without our claim: another worker has just committed the shard
            return self.stage.is_committed(shard)
        chunks = [chunk for chunk in self.sampler.plan.chunks(groups) if not finished.issuperset(chunk.keys)]
        hand = _InHand(shard, held, chunks, shared, self._restore(shard, chunks))
        for phase in range(len(self.sampler.phases)):
            if not self._phase(hand, phase):
                return False
        if chunks:
            self.sampler.policy.experts.use(None)
        self.background.add(lambda: seal(self.stage, shard, self._circumstances(time.monotonic() - began)))
        return True

    def _phase(self, hand: _InHand, phase: int) -> bool:
        """The chunks of a shard through the steps of one expert; False when another worker took the shard from us."""
        phases = self.sampler.phases
        expert, steps = phases[phase]
        waiting = [chunk for chunk in hand.chunks if phase > 0 or chunk not in hand.states]
        if waiting:
            self.sampler.policy.experts.use(expert)
        for chunk in waiting:
            check(f"in shard {hand.shard} of {self.stage.name}")
            if hand.held.lost:
                return False
            if self.stage.is_committed(hand.shard) or spooled(self.stage, hand.shard).issuperset(chunk.keys):
                continue
            state = hand.states.pop(chunk, None) or self.sampler.start(chunk)
            self.sampler.advance(chunk, state, hand.shared, steps)
            if phase + 1 < len(phases):
                self._park(hand, chunk, state)
            else:
                self._commit(hand, chunk, state)
        return True

    def _shared(self, shard: int, groups: list[str]) -> dict[str, Tensors]:
        """The tensors of the groups as the spool has them; what is missing is encoded and put there first.

        They are always read back: whoever continues with this shard, here or elsewhere, uses the same bits.
        """
        missing = [group for group in groups if read_group(self.stage, shard, group) is None]
        if missing:
            for group, tensors in self.sampler.group_tensors(missing).items():
                write_group(self.stage, shard, group, tensors)
        found = {group: read_group(self.stage, shard, group) for group in groups}
        return {group: tensors for group, tensors in found.items() if tensors is not None}

    def _restore(self, shard: int, chunks: Sequence[Chunk]) -> dict[Chunk, State]:
        """Chunks that have their high-noise steps behind them, from the spool."""
        states = {}
        for chunk in chunks if len(self.sampler.phases) > 1 else ():
            kept = read_phase(self.stage, shard, chunk.keys[0])
            state = State.from_tensors(kept, chunk.count) if kept else None
            if state:
                states[chunk] = state
        return states

    def _park(self, hand: _InHand, chunk: Chunk, state: State) -> None:
        """Keep and spool a chunk between its phases."""
        self.background.collect()  # that a disk is full is known now, not after the phase
        hand.states[chunk] = state
        tensors = state.to_tensors()  # as they are now: the next steps put others in their place
        self.background.add(lambda: write_phase(self.stage, hand.shard, chunk.keys[0], tensors))
        self.tally.tell(f"shard {hand.shard}, {chunk.keys[0]}: high-noise steps done")

    def _commit(self, hand: _InHand, chunk: Chunk, state: State) -> None:
        """Decode a chunk and have its samples spooled; those that were there stay as they are."""
        self.background.collect()
        with self.background.long_calls():
            decoded = self.sampler.decode(state)
        self.background.settle()

        def write() -> list[Sample]:
            samples = self.sampler.put_together(chunk, state, decoded)
            written = write_samples(self.stage, hand.shard, *samples)
            remove_phase(self.stage, hand.shard, chunk.keys[0])
            return samples if written else []

        def count(written: list[Sample]) -> None:
            self.made += len(written)
            self.broken += sum(sample.meta["status"] != "ok" for sample in written)
            self.tally.count(len(written), f"shard {hand.shard}, {chunk.keys[-1]}")

        self.background.add(write, count)

    def _finished(self, shards: list[int]) -> int:
        """Videos of these shards that are there, in the shard or in its spool."""
        committed = set(self.stage.shards())
        return sum(
            self.tally.sizes[shard] if shard in committed else len(spooled(self.stage, shard)) for shard in shards
        )

    def _circumstances(self, seconds: float) -> dict[str, object]:
        """What the manifest keeps about the making of a shard."""
        index, count = self.worker.part
        return {
            "host": socket.gethostname(),
            "device": str(self.sampler.policy.device),
            "python": platform.python_version(),
            "versions": {name: version_of(name) for name in PACKAGES},
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "worker": f"{index}/{count}",
        }
