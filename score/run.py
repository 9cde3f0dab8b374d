"""The scoring stage: every shard once per reward, then the advantages of the whole stage."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from score import tables, work
from score.reward import Chosen, Scored
from shards import sidecar
from shards.errors import RunFailed, StillBusy, UserError
from shards.files import read_json
from shards.run import Run, Stage, claim

if TYPE_CHECKING:
    import pandas as pd

    from shards.progress import Progress

JOB_BYTES = 64 * 2**20  # of decoded video; bounds the memory of a worker
JOB_SAMPLES = 32
AHEAD = 2  # shards whose jobs are queued, so that no worker waits while another ends a shard


@dataclass(frozen=True)
class ScoreReport:
    """What the stage did. `summary` is None while shards of the plan are not sampled or scored."""

    done: list[int]
    skipped: list[int]
    pending: list[int]
    samples: int
    missing: int
    seconds: float
    advantages: str
    summary: dict[str, Any] | None
    advantages_written: bool

    @property
    def nothing_done(self) -> bool:
        """Whether everything was there already."""
        return not self.done and not self.advantages_written

    def __str__(self) -> str:
        if self.nothing_done:
            return f"nothing to do: {len(self.skipped)} shards are scored, advantages {self.advantages} are there"
        words = [f"{len(self.done)} shards scored ({self.samples} samples, {self.missing} without a reward)"]
        words += [f"{len(self.skipped)} were there"] if self.skipped else []
        words += [f"{len(self.pending)} are still to come"] if self.pending else []
        words += [f"advantages {self.advantages} written"] if self.advantages_written else []
        return f"{', '.join(words)}; {self.seconds:.1f} s"


def score(
    run: Run,
    stage: Stage,
    rewards: Mapping[str, float] | None = None,
    advantages_only: bool = False,
    progress: Progress | None = None,
    worker: tuple[int, int] = (0, 1),
) -> ScoreReport:
    """Score the shards of `stage` that are sampled and have no scores yet; when all have them, write the advantages.

    `rewards` (name -> weight) replaces [score].rewards. `advantages_only` loads no model and needs all scores. `worker`
    (i, n) takes every n-th shard beginning with i. Raises UserError for a wrong reward or a stage without a plan,
    RunFailed when too many rewards are missing, StillBusy when others sample or score what is left.
    """
    start, config = time.monotonic(), run.config.score
    plan = stage.plan()
    if plan is None:
        raise UserError(f"{stage.path} has no plan.json, so there is nothing to score", "`rushes rollout` comes first")
    selection = tables.select(config, rewards)
    outcome = Outcome()
    if not advantages_only:
        shards = [shard for shard in stage.shards() if shard % worker[1] == worker[0]]
        scoring = Scoring(stage, plan, selection.scorers, config.max_missing, config.workers, progress)
        outcome = scoring.score(shards)
    pending = [shard for shard in range(stage.expected()) if not _complete(stage, shard, selection)]
    summary, written = None, False
    if not pending:
        summary, written = _advantages(stage, selection, config.max_missing)
    elif advantages_only:
        raise UserError(
            f"{stage.path}: {_shards(pending)} not sampled or not scored",
            "run `rushes score` without --advantages-only",
        )
    elif not outcome.done:
        raise StillBusy(f"{stage.path}: {_shards(pending)} not sampled or not scored yet", "run it again later")
    return ScoreReport(
        done=outcome.done,
        skipped=outcome.skipped,
        pending=pending,
        samples=outcome.samples,
        missing=outcome.missing,
        seconds=time.monotonic() - start,
        advantages=selection.digest,
        summary=summary,
        advantages_written=written,
    )


def _complete(stage: Stage, shard: int, selection: tables.Selection) -> bool:
    """Whether a shard has the scores that the advantages need."""
    return stage.is_committed(shard) and all(
        sidecar.scored(stage, shard, chosen.directory) for chosen in selection.rewards.values()
    )


def _shards(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:6])) + (", …" if len(numbers) > 6 else "")
    return f"shard {shown} is" if len(numbers) == 1 else f"shards {shown} are"


def _advantages(stage: Stage, selection: tables.Selection, max_missing: float) -> tuple[dict[str, Any], bool]:
    """The summary, and whether the advantages had to be written for it."""
    path = stage.advantage_dir(selection.digest) / "summary.json"
    if path.exists() and all(sidecar.advantaged(stage, shard, selection.digest) for shard in stage.shards()):
        return read_json(path), False
    return tables.write_advantages(stage, selection, max_missing), True


@dataclass
class Outcome:
    """What one call scored."""

    done: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    samples: int = 0
    missing: int = 0


@dataclass(frozen=True)
class _InFlight:
    """A shard whose jobs are with the workers; `release` ends its claim."""

    shard: int
    rewards: tuple[Chosen, ...]
    keys: list[str]
    jobs: list[Future[dict[str, list[Scored]]]]
    release: Callable[[], None]


class Scoring:
    """One pass over shards: jobs out, tables in. Only shards that lack scores are opened."""

    def __init__(
        self,
        stage: Stage,
        plan: Mapping[str, Any],
        scorers: list[Chosen],
        max_missing: float,
        workers: int,
        progress: Progress | None,
    ) -> None:
        self.stage, self.scorers, self.workers, self.progress = stage, scorers, workers, progress
        self.max_missing = max_missing
        video = plan["video"]
        size = 3 * int(video["height"]) * int(video["width"]) * int(video["frames"])
        self.per_job = max(1, min(JOB_SAMPLES, JOB_BYTES // size))
        self.outcome = Outcome()
        self.reasons: list[str] = []
        self.held: list[tuple[int, dict[str, pd.DataFrame]]] = []
        self.finished, self.total = 0, 0

    def score(self, shards: list[int]) -> Outcome:
        """Score what is missing of `shards`.

        Tables with missing rewards are published at the end, if not too many are missing in all: a cause that can be
        mended (a disk, a service) must not be written down as a fact.
        """
        todo = [shard for shard in shards if self._lacking(shard)]
        self.outcome.skipped = [shard for shard in shards if shard not in set(todo)]
        self.total = sum(len(self.stage.keys(shard)) for shard in todo)
        flying: deque[_InFlight] = deque()
        pool = work.executor(self.workers)
        with ExitStack() as claims:
            try:
                for flight in self._take_off(todo, pool, claims):
                    flying.append(flight)
                    if len(flying) > AHEAD:
                        self._land(flying.popleft())
                while flying:
                    self._land(flying.popleft())
            except BrokenProcessPool as error:
                work.discard_executors()
                raise RunFailed(
                    f"a scoring process died while it scored {self.stage.path}",
                    "often memory: lower [score].workers; what was scored is kept",
                ) from error
            except BaseException:
                work.discard_executors()
                raise
        for shard, held in self.held:
            self._publish(shard, held)
        return self.outcome

    def _lacking(self, shard: int) -> tuple[Chosen, ...]:
        return tuple(one for one in self.scorers if not sidecar.scored(self.stage, shard, one.directory))

    def _take_off(self, shards: list[int], pool: Executor, claims: ExitStack) -> Iterator[_InFlight]:
        """Claim shards and hand out their jobs; a shard that another worker holds is left to it."""
        for shard in shards:
            claimed = ExitStack()
            claims.callback(claimed.close)
            held = claimed.enter_context(claim(self.stage, shard, "score"))
            rewards = self._lacking(shard) if held else ()
            if not rewards:
                claimed.close()
                continue
            keys = self.stage.keys(shard)
            size = min(self.per_job, math.ceil(len(keys) / self.workers))
            parts = [tuple(keys[first : first + size]) for first in range(0, len(keys), size)]
            jobs = [pool.submit(work.score_job, work.Job(self.stage, shard, part, rewards)) for part in parts]
            yield _InFlight(shard, rewards, keys, jobs, claimed.close)

    def _land(self, flight: _InFlight) -> None:
        scored: dict[str, list[Scored]] = {one.directory: [] for one in flight.rewards}
        for job in flight.jobs:
            for directory, part in job.result().items():
                scored[directory].extend(part)
            self._report(len(part))
        found = {one.directory: tables.score_table(one, flight.keys, scored[one.directory]) for one in flight.rewards}
        reasons = _first_reasons(found)
        self.reasons += reasons
        self.outcome.samples += len(flight.keys)
        self.outcome.missing += len(reasons)
        tables.check_missing(self.reasons, self.total, self.max_missing, self.stage)
        if reasons:
            self.held.append((flight.shard, found))
        else:
            self._publish(flight.shard, found)
        flight.release()

    def _report(self, count: int) -> None:
        self.finished += count
        if self.progress:
            self.progress(self.finished, self.total, "samples")

    def _publish(self, shard: int, found: Mapping[str, pd.DataFrame]) -> None:
        provenance = {one.directory: tables.provenance(one) for one in self.scorers}
        for directory, table in found.items():
            sidecar.write_scores(self.stage, shard, directory, table, provenance[directory])
        self.outcome.done.append(shard)


def _first_reasons(found: Mapping[str, pd.DataFrame]) -> list[str]:
    """For every sample that lacks a reward, the first reason given."""
    reasons: dict[str, str] = {}
    for table in found.values():
        missing = table[table["status"] != "ok"]
        for key, status in zip(missing["key"], missing["status"], strict=True):
            reasons.setdefault(key, status)
    return list(reasons.values())
