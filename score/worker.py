"""One worker's way through the shards of a stage: jobs out to the scoring processes, tables of scores in."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from score import process, tables
from score.reward import Chosen, Scored
from shards import sidecar
from shards.errors import RunFailed, StillBusy
from shards.plan import RolloutPlan
from shards.process.machine import take_place
from shards.process.signals import check, stopping
from shards.process.torchrun import world_size
from shards.run import Stage
from shards.workers.worker import Tally, Worker

if TYPE_CHECKING:
    import pandas as pd

    from shards.config import ScoreConfig
    from shards.process.progress import Progress

JOB_BYTES = 64 * 2**20  # of decoded video; bounds the memory of a process
JOB_SAMPLES = 32
AHEAD = 2  # shards whose jobs are queued, so that no process waits while another ends a shard


@dataclass
class Outcome:
    """What was scored, by the numbers of the shards, and how many rewards are missing in it."""

    done: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    """Shards that had their scores at the first look."""
    samples: int = 0
    missing: int = 0


@dataclass(frozen=True)
class _InFlight:
    """A shard whose jobs are with the processes; `release` ends its claim."""

    shard: int
    rewards: tuple[Chosen, ...]
    keys: list[str]
    jobs: list[Future[process.Judged]]
    release: Callable[[], None]

    def cost(self, directory: str) -> dict[str, str]:
        """What the scores of one reward took when all jobs are done: seconds of all processes together, peak memory."""
        done = [job.result() for job in self.jobs]
        seconds, peak = sum(one.seconds[directory] for one in done), max(one.peak_memory_bytes for one in done)
        return {"seconds": f"{seconds:.3f}", "peak_memory_bytes": str(peak)}


class Scoring:
    """What one worker does in a stage. Only shards that lack scores are opened."""

    def __init__(
        self,
        config: ScoreConfig,
        stage: Stage,
        plan: RolloutPlan,
        scorers: list[Chosen],
        worker: Worker,
        progress: Progress | None,
    ) -> None:
        self.config, self.stage, self.scorers, self.worker = config, stage, scorers, worker
        take_place(worker.part, self._processes())  # before a reward looks for its device
        size = 3 * math.prod(plan.video.size)
        self.per_job = max(1, min(JOB_SAMPLES, JOB_BYTES // size))
        self.tally = Tally(worker, progress, "videos", self._finished)
        self.outcome = Outcome()
        self.reasons: list[str] = []
        self.held: list[tuple[_InFlight, dict[str, pd.DataFrame]]] = []
        self.last_life = time.monotonic()

    def score(self, shards: list[int]) -> None:
        """Score what is missing of `shards`.

        Tables with missing rewards are published at the end, if not too many are missing in all: a cause that can be
        mended (a disk, a service) must not be written down as a fact.
        """
        todo = [shard for shard in shards if self._lacking(shard)]
        if not self.tally.sizes:
            self.outcome.skipped = sorted(set(shards) - set(todo))
        self.tally.add({shard: len(self.stage.keys(shard)) for shard in todo if shard not in self.tally.sizes})
        self._say_what_loads(bool(todo))
        with ExitStack() as taken, self._discarding():
            self._fly(todo, taken)
            self._publish_held()
        check(f"in {self.stage.name} score")

    def _say_what_loads(self, work: bool) -> None:
        """A model can take minutes to load, before the first video is counted."""
        waiting = process.unbuilt(self.scorers, self._processes()) if work else []
        names = [one.name for one in waiting if one.name != tables.GUARDS]  # which have no model
        if names:
            self.tally.tell(f"loading {', '.join(names)}")

    def _processes(self) -> int:
        # the ranks of torchrun are the processes then; the jobs stay as large as they are, and so do their batches
        return self.config.workers if world_size() == 1 else 1

    def stays(self, pending: list[int], wait: bool) -> bool:
        """Whether to look again at shards that are not done: because they may come free, or to wait for them.

        Waiting ends with StillBusy when nobody has worked on this stage for the time that makes a claim void.
        """
        sampled = [shard for shard in pending if self.stage.is_committed(shard)]
        if not wait:
            return not self.worker.all_held(sampled)
        if self.worker.somebody_lives() or sampled:
            self.last_life = time.monotonic()
        if time.monotonic() - self.last_life > self.worker.seconds:
            raise StillBusy(
                f"{self.stage.path}: {named(pending)} not sampled, and nobody samples", "`rushes rollout` samples them"
            )
        return True

    @contextmanager
    def _discarding(self) -> Iterator[None]:
        """The processes end with whatever goes wrong inside. Raises RunFailed when one of them has died."""
        try:
            yield
        except BrokenProcessPool as error:
            process.processes.discard()
            check(f"in {self.stage.name} score")  # a signal may have reached the processes too
            raise RunFailed(
                f"a scoring process died while it scored {self.stage.path}",
                "often memory: lower [score].workers; what was scored is kept",
            ) from error
        except BaseException:
            process.processes.discard()
            raise

    def _fly(self, shards: list[int], taken: ExitStack) -> None:
        """The jobs of a few shards out at a time, and their tables in."""
        pool = process.executor(self._processes())
        ahead = 0 if isinstance(pool, process.Inline) else AHEAD  # to hold shards would only keep them from others
        flying: deque[_InFlight] = deque()
        for flight in self._take_off(shards, pool, taken):
            flying.append(flight)
            if len(flying) > ahead:
                self._land(flying.popleft())
        while flying:
            self._land(flying.popleft())

    def _take_off(self, shards: list[int], pool: Executor, taken: ExitStack) -> Iterator[_InFlight]:
        """Claim shards and hand out their jobs; a shard that another worker holds is left to it."""
        for shard in shards:
            if stopping():
                return
            claimed = ExitStack()
            taken.callback(claimed.close)
            held = claimed.enter_context(self.worker.claim(shard))
            rewards = self._lacking(shard) if held else ()
            if not rewards:
                claimed.close()
                continue
            self.tally.take(shard)
            keys = self.stage.keys(shard)
            size = min(self.per_job, math.ceil(len(keys) / self.config.workers))
            parts = [tuple(keys[first : first + size]) for first in range(0, len(keys), size)]
            jobs = [pool.submit(process.score_job, process.Job(self.stage, shard, part, rewards)) for part in parts]
            yield _InFlight(shard, rewards, keys, jobs, claimed.close)

    def _land(self, flight: _InFlight) -> None:
        """Wait for the jobs of a shard and publish its tables; those that lack rewards are held back."""
        scored: dict[str, list[Scored]] = {one.directory: [] for one in flight.rewards}
        for job in flight.jobs:
            for directory, part in job.result().scored.items():
                scored[directory].extend(part)
            self.tally.count(len(part))
        found = {one.directory: tables.score_table(one, flight.keys, scored[one.directory]) for one in flight.rewards}
        reasons = _first_reasons(found)
        self.reasons += reasons
        self.outcome.samples += len(flight.keys)
        self.outcome.missing += len(reasons)
        tables.check_missing(self.reasons, self.tally.total, self.config.max_missing, self.stage)
        if reasons:
            self.held.append((flight, found))
        else:
            self._publish(flight, found)

    def _publish_held(self) -> None:
        """Tables with missing rewards, if those are not too many of what was scored here."""
        tables.check_missing(self.reasons, self.outcome.samples, self.config.max_missing, self.stage)
        while self.held:
            self._publish(*self.held.pop(0))

    def _publish(self, flight: _InFlight, found: Mapping[str, pd.DataFrame]) -> None:
        provenance = {one.directory: tables.provenance(one) for one in self.scorers}
        for one in flight.rewards:
            tables.keep_source(self.stage, one)
        for directory, table in found.items():
            kv = provenance[directory] | flight.cost(directory)
            sidecar.write_scores(self.stage, flight.shard, directory, table, kv)
        self.outcome.done.append(flight.shard)
        flight.release()

    def _lacking(self, shard: int) -> tuple[Chosen, ...]:
        """The rewards that a shard has no scores of."""
        return tuple(one for one in self.scorers if not sidecar.scored(self.stage, shard, one.directory))

    def _finished(self, shards: list[int]) -> int:
        """Samples of those of these shards that have all their scores."""
        scored = [
            shard
            for shard in shards
            if all(self.stage.score_path(one.directory, shard).exists() for one in self.scorers)
        ]
        return sum(self.tally.sizes[shard] for shard in scored)


def named(shards: list[int]) -> str:
    """Shards as the beginning of a sentence: `shard 3 is`, or `shards 1, 2 are`."""
    shown = ", ".join(map(str, shards[:6])) + (", …" if len(shards) > 6 else "")
    return f"shard {shown} is" if len(shards) == 1 else f"shards {shown} are"


def _first_reasons(found: Mapping[str, pd.DataFrame]) -> list[str]:
    """For every sample that lacks a reward, the first reason given."""
    reasons: dict[str, str] = {}
    for table in found.values():
        missing = table[table["status"] != "ok"]
        for key, status in zip(missing["key"], missing["status"], strict=True):
            reasons.setdefault(key, status)
    return list(reasons.values())
