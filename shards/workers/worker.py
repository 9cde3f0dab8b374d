"""One of the workers that share a stage: what it takes, how it waits for the others, and how far all of them are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from shards.errors import UserError
from shards.process.signals import check
from shards.workers.claims import BEATS, Claim, Pause, claim
from shards.workers.owners import Life, claims_of, life, sweep

if TYPE_CHECKING:
    from shards.process.progress import Progress
    from shards.run import Stage

LOOK_EVERY = 2.0  # seconds between two counts of what others have finished

Part = tuple[int, int]
"""(i, n): worker i of n, counted from 0."""


def order(shards: Iterable[int], part: Part) -> list[int]:
    """Shards in the order in which worker (i, n) tries them: its own share, then that of the next worker, and so on."""
    index, count = part
    if not 0 <= index < count:
        raise UserError(f"worker {index}/{count} does not exist", "workers are counted from 0: 0/4, 1/4, 2/4, 3/4")
    return sorted(shards, key=lambda shard: ((shard - index) % count, shard))


class Worker:
    """One worker on the shards of a stage. `what` it does is rollout or score; `seconds` make a claim void."""

    def __init__(self, stage: Stage, what: str, part: Part, seconds: float) -> None:
        self.stage, self.what, self.part, self.seconds = stage, what, part, seconds
        self.pause = Pause(seconds / BEATS)

    @property
    def waited(self) -> float:
        """Seconds that it has waited for others."""
        return self.pause.waited

    def claim(self, shard: int) -> AbstractContextManager[Claim | None]:
        """Hold a shard; None when a living worker holds it."""
        return claim(self.stage, shard, self.what, self.seconds, self.part)

    def all_held(self, shards: Iterable[int]) -> bool:
        """Whether workers that are known to live hold all of these shards."""
        states = self._owners()
        return all(states.get((shard, self.what)) == "alive" for shard in shards)

    def somebody_lives(self) -> bool:
        """Whether anybody who holds a claim on the stage, to roll out or to score, may live."""
        return any(state in ("alive", "silent") for state in self._owners().values())

    def wait(self) -> None:
        """Give the others time, ever more of it. Raises Stopped when a signal asked for the end."""
        check(f"in {self.stage.name} {self.what}, which waited for others")
        self.pause()

    def sweep(self) -> None:
        """At the end: remove the claims of the dead on this work."""
        sweep(self.stage, self.what, self.seconds)

    def _owners(self) -> dict[tuple[int, str], Life]:
        """What is known of all who hold a claim on the stage, by shard and what they do."""
        return {(one.shard, one.what): life(one, self.seconds) for one in claims_of(self.stage)}


class Tally:
    """How far a stage is, for its progress: units (videos, samples) that this worker finished, and those of the others.

    `finished` counts, from the files that others leave, the units they have finished of the shards it is given.
    """

    def __init__(
        self, worker: Worker, progress: Progress | None, unit: str, finished: Callable[[list[int]], int]
    ) -> None:
        self.shared = worker.part[1] > 1
        self.progress, self.unit, self.finished = progress, unit, finished
        self.sizes: dict[int, int] = {}
        self.mine: set[int] = set()
        self.done, self.elsewhere, self.shown = 0, 0, 0
        self.looked = -math.inf

    @property
    def total(self) -> int:
        """Units of all shards that there is something to do for."""
        return sum(self.sizes.values())

    def add(self, sizes: Mapping[int, int]) -> None:
        """Shards that there is something to do for, with the number of units in each."""
        self.sizes.update(sizes)

    def take(self, shard: int) -> None:
        """From now on `count` receives what is finished of this shard."""
        self.mine.add(shard)

    def count(self, new: int, note: str = "") -> None:
        """Units that this worker has finished or found finished in a shard that it took."""
        self.done += new
        self.tell(note)

    def tell(self, note: str = "") -> None:
        """Report the progress of the whole stage."""
        if self.progress:
            self.shown = min(self.done + self._others(), self.total)
            self.progress(self.shown, self.total, self.unit, note)

    def tell_rest(self) -> None:
        """Report once more when others finished the rest."""
        if self.shared and self.shown < self.total:
            self.looked = -math.inf
            self.tell()

    def _others(self) -> int:
        """Units that others have finished since we began, looked up now and then."""
        if self.shared and time.monotonic() - self.looked >= LOOK_EVERY:
            self.elsewhere = self.finished([shard for shard in self.sizes if shard not in self.mine])
            self.looked = time.monotonic()
        return self.elsewhere
