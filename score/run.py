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
from shards import claims, sidecar
from shards.errors import RunFailed, StillBusy, UserError
from shards.files import read_json
from shards.run import Run, Stage
from shards.signals import check, stopping
from shards.world import world_size

if TYPE_CHECKING:
    import pandas as pd

    from shards.progress import Progress

JOB_BYTES = 64 * 2**20  # of decoded video; bounds the memory of a worker
JOB_SAMPLES = 32
LOOK_EVERY = 2.0  # seconds between two counts of what other workers have scored
AGAIN = "`rushes rollout` samples them"
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
    waited: float = 0.0
    """Seconds of those spent waiting for others."""

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
    wait: bool = False,
    advantages: bool = True,
) -> ScoreReport:
    """Score the shards of `stage` that are sampled and have no scores yet; when all have them, write the advantages.

    `rewards` (name -> weight) replaces [score].rewards. `advantages_only` loads no model and needs all scores. Worker
    (i, n) begins with the shards i, i+n, … and goes on with what others have not claimed; with `wait` it stays until
    all is sampled and scored, as long as somebody works on that. Without `advantages` it leaves them to another worker.
    Raises UserError for a wrong reward or a stage without a plan, RunFailed when too many rewards are missing,
    StillBusy when there was nothing to do but others sample or score what is left.
    """
    start, config = time.monotonic(), run.config.score
    plan = stage.plan()
    if plan is None:
        raise UserError(f"{stage.path} has no plan.json, so there is nothing to score", "`rushes rollout` comes first")
    selection = tables.select(config, rewards)
    scoring = Scoring(run, stage, plan, selection.scorers, progress, worker)
    outcome = scoring.outcome if advantages_only else scoring.score(claims.order(stage.shards(), worker))
    pending = _pending(stage, list(range(stage.expected())), selection)
    pause = claims.Pause(scoring.seconds / claims.BEATS)
    while pending and not advantages_only and scoring.stays(pending, wait):
        scoring.tell()
        check(f"in {stage.name} score, which waited for others")
        pause()
        scoring.score([shard for shard in claims.order(pending, worker) if stage.is_committed(shard)])
        pending = _pending(stage, pending, selection)
    if not pending:
        scoring.tell_rest()
    claims.sweep_claims(stage, "score", scoring.seconds)
    summary, written = None, False
    if not pending:
        summary, written = _advantages(stage, selection, config.max_missing) if advantages else (None, False)
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
        waited=pause.waited,
    )


def _pending(stage: Stage, shards: list[int], selection: tables.Selection) -> list[int]:
    return [shard for shard in shards if not _complete(stage, shard, selection)]


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
    jobs: list[Future[work.Judged]]
    release: Callable[[], None]

    def cost(self, directory: str) -> dict[str, str]:
        """What the scores of one reward took when all jobs are done: seconds of all processes together, peak memory."""
        done = [job.result() for job in self.jobs]
        seconds, peak = sum(one.seconds[directory] for one in done), max(one.peak_memory_bytes for one in done)
        return {"seconds": f"{seconds:.3f}", "peak_memory_bytes": str(peak)}


class Scoring:
    """One pass over shards: jobs out, tables in. Only shards that lack scores are opened."""

    def __init__(
        self,
        run: Run,
        stage: Stage,
        plan: Mapping[str, Any],
        scorers: list[Chosen],
        progress: Progress | None,
        worker: tuple[int, int],
    ) -> None:
        self.stage, self.scorers, self.progress, self.worker = stage, scorers, progress, worker
        self.workers, self.max_missing = run.config.score.workers, run.config.score.max_missing
        self.seconds = run.config.workers.claim_seconds
        video = plan["video"]
        size = 3 * int(video["height"]) * int(video["width"]) * int(video["frames"])
        self.per_job = max(1, min(JOB_SAMPLES, JOB_BYTES // size))
        self.outcome = Outcome()
        self.reasons: list[str] = []
        self.held: list[tuple[_InFlight, dict[str, pd.DataFrame]]] = []
        self.finished, self.total, self.missing = 0, 0, set[int]()
        self.last_life = time.monotonic()
        self.mine: set[int] = set()
        self.elsewhere, self.looked, self.shown = 0, -LOOK_EVERY, 0

    def score(self, shards: list[int]) -> Outcome:
        """Score what is missing of `shards`.

        Tables with missing rewards are published at the end, if not too many are missing in all: a cause that can be
        mended (a disk, a service) must not be written down as a fact.
        """
        todo = [shard for shard in shards if self._lacking(shard)]
        if not self.missing:
            self.outcome.skipped = sorted(set(shards) - set(todo))
        self.total += sum(len(self.stage.keys(shard)) for shard in set(todo) - self.missing)
        self.missing.update(todo)
        flying: deque[_InFlight] = deque()
        # the ranks of torchrun are the processes then; the jobs stay as large as they are, and so do their batches
        pool = work.executor(self.workers if world_size() == 1 else 1)
        ahead = 0 if isinstance(pool, work.Inline) else AHEAD  # to hold shards would only keep them from others
        with ExitStack() as taken:
            try:
                for flight in self._take_off(todo, pool, taken):
                    flying.append(flight)
                    if len(flying) > ahead:
                        self._land(flying.popleft())
                while flying:
                    self._land(flying.popleft())
                self._publish_held()
            except BrokenProcessPool as error:
                work.discard_executors()
                check(f"in {self.stage.name} score")  # it may have reached the processes too
                raise RunFailed(
                    f"a scoring process died while it scored {self.stage.path}",
                    "often memory: lower [score].workers; what was scored is kept",
                ) from error
            except BaseException:
                work.discard_executors()
                raise
        check(f"in {self.stage.name} score")
        return self.outcome

    def stays(self, pending: list[int], wait: bool) -> bool:
        """Whether to look again at shards that are not done: because they may come free, or to wait for them.

        Waiting ends with StillBusy when nobody has worked on this stage for the time that makes a claim void.
        """
        found = {(one.shard, one.what): claims.life(one, self.seconds) for one in claims.claims(self.stage)}
        mine = [found.get((shard, "score"), "gone") for shard in pending if self.stage.is_committed(shard)]
        if not wait:
            return any(state != "alive" for state in mine)
        if mine or any(state in ("alive", "silent") for state in found.values()):
            self.last_life = time.monotonic()
        if time.monotonic() - self.last_life > self.seconds:
            raise StillBusy(f"{self.stage.path}: {_shards(pending)} not sampled, and nobody samples", AGAIN)
        return True

    def _publish_held(self) -> None:
        """Tables with missing rewards, if those are not too many of what was scored here."""
        tables.check_missing(self.reasons, self.outcome.samples, self.max_missing, self.stage)
        while self.held:
            flight, found = self.held.pop(0)
            self._publish(flight, found)
            flight.release()

    def _lacking(self, shard: int) -> tuple[Chosen, ...]:
        return tuple(one for one in self.scorers if not sidecar.scored(self.stage, shard, one.directory))

    def _take_off(self, shards: list[int], pool: Executor, taken: ExitStack) -> Iterator[_InFlight]:
        """Claim shards and hand out their jobs; a shard that another worker holds is left to it."""
        for shard in shards:
            if stopping():
                return
            claimed = ExitStack()
            taken.callback(claimed.close)
            held = claimed.enter_context(claims.claim(self.stage, shard, "score", self.seconds, self.worker))
            rewards = self._lacking(shard) if held else ()
            if not rewards:
                claimed.close()
                continue
            self.mine.add(shard)
            keys = self.stage.keys(shard)
            size = min(self.per_job, math.ceil(len(keys) / self.workers))
            parts = [tuple(keys[first : first + size]) for first in range(0, len(keys), size)]
            jobs = [pool.submit(work.score_job, work.Job(self.stage, shard, part, rewards)) for part in parts]
            yield _InFlight(shard, rewards, keys, jobs, claimed.close)

    def _land(self, flight: _InFlight) -> None:
        scored: dict[str, list[Scored]] = {one.directory: [] for one in flight.rewards}
        for job in flight.jobs:
            for directory, part in job.result().scored.items():
                scored[directory].extend(part)
            self.finished += len(part)
            self.tell()
        found = {one.directory: tables.score_table(one, flight.keys, scored[one.directory]) for one in flight.rewards}
        reasons = _first_reasons(found)
        self.reasons += reasons
        self.outcome.samples += len(flight.keys)
        self.outcome.missing += len(reasons)
        tables.check_missing(self.reasons, self.total, self.max_missing, self.stage)
        if reasons:
            self.held.append((flight, found))
        else:
            self._publish(flight, found)
            flight.release()

    def tell(self) -> None:
        """Report the progress of the whole stage: where there are several workers, what others scored counts too."""
        if self.progress:
            self.shown = min(self.finished + self._others(), self.total)
            self.progress(self.shown, self.total, "samples")

    def tell_rest(self) -> None:
        """Report once more when others finished the rest."""
        if self.worker[1] > 1 and self.shown < self.total:
            self.looked = -LOOK_EVERY
            self.tell()

    def _others(self) -> int:
        """Samples that other workers have scored since we began, from the files they left."""
        if self.worker[1] > 1 and time.monotonic() - self.looked >= LOOK_EVERY:
            theirs = [
                shard
                for shard in self.missing - self.mine
                if all(self.stage.score_path(one.directory, shard).exists() for one in self.scorers)
            ]
            self.elsewhere = sum(len(self.stage.keys(shard)) for shard in theirs)
            self.looked = time.monotonic()
        return self.elsewhere

    def _publish(self, flight: _InFlight, found: Mapping[str, pd.DataFrame]) -> None:
        provenance = {one.directory: tables.provenance(one) for one in self.scorers}
        for directory, table in found.items():
            kv = provenance[directory] | flight.cost(directory)
            sidecar.write_scores(self.stage, flight.shard, directory, table, kv)
        self.outcome.done.append(flight.shard)


def _first_reasons(found: Mapping[str, pd.DataFrame]) -> list[str]:
    """For every sample that lacks a reward, the first reason given."""
    reasons: dict[str, str] = {}
    for table in found.values():
        missing = table[table["status"] != "ok"]
        for key, status in zip(missing["key"], missing["status"], strict=True):
            reasons.setdefault(key, status)
    return list(reasons.values())
