"""The scoring stage: every shard once per reward, then the advantages of the whole stage."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from score import tables
from score.worker import Scoring, named
from shards import sidecar
from shards.errors import StillBusy, UserError
from shards.measures import StageReward, measure_of, stage_reward
from shards.process.progress import counted
from shards.records.kinds import read_summary
from shards.run import Run, Stage
from shards.store.urls import in_shell
from shards.workers.leftovers import sweep_run
from shards.workers.worker import Part, Worker, order

if TYPE_CHECKING:
    from shards.plan import RolloutPlan
    from shards.process.progress import Progress


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
    reward: StageReward | None = None
    """The mean reward and its change; None while `summary` is."""
    edited: Mapping[str, list[str]] = field(default_factory=dict)
    """Rewards of one's own that scored this stage before in another form, with the folders of those scores."""

    @property
    def nothing_done(self) -> bool:
        """Whether everything was there already."""
        return not self.done and not self.advantages_written

    def __str__(self) -> str:
        if self.nothing_done:
            there = f"{counted(len(self.skipped), 'shard')} scored already, advantages {self.advantages} there"
            return f"nothing to do: {there}"
        words = []
        if self.done or not self.skipped:
            done = counted(len(self.done), "shard")
            words += [f"{done} scored ({self.samples} videos, {self.missing} without a reward)"]
        words += [f"{counted(len(self.skipped), 'shard')} there already"] if self.skipped else []
        words += [f"{len(self.pending)} are still to come"] if self.pending else []
        words += [f"advantages {self.advantages} written"] if self.advantages_written else []
        words += [f"{name} has changed since {', '.join(kept)}, which is kept" for name, kept in self.edited.items()]
        return f"{', '.join(words)}; {self.seconds:.1f} s"


def score(
    run: Run,
    stage: Stage,
    rewards: Mapping[str, float] | None = None,
    advantages_only: bool = False,
    progress: Progress | None = None,
    worker: Part = (0, 1),
    wait: bool = False,
    advantages: bool = True,
) -> ScoreReport:
    """Score the shards of `stage` that are sampled and have no scores yet; when all have them, write the advantages.

    `rewards` (name -> weight) replaces [score].rewards. `advantages_only` loads no model and needs all scores. Worker
    (i, n) begins with the shards i, i+n, … and continues with what others have not claimed; with `wait` it stays until
    all is sampled and scored, as long as somebody works on that. Without `advantages` it leaves them to another worker.
    Raises UserError for a wrong reward or a stage without a plan, RunFailed when too many rewards are missing,
    StillBusy when there was nothing to do but others sample or score what is left.
    """
    start, config = time.monotonic(), run.config.score
    sweep_run(run)
    plan = stage.plan()
    if plan is None:
        hint = f"`rushes rollout {in_shell(run.path)} --iteration {stage.iteration}` comes first"
        raise UserError(f"{stage.path} has no plan.json, so there is nothing to score", hint)
    selection = tables.select(config, rewards)
    ours = Worker(stage, "score", worker, run.config.workers.claim_seconds)
    scoring = Scoring(config, stage, plan, selection.scorers, ours, progress)
    edited = {chosen.name: before for chosen in selection.scorers if (before := tables.edited(stage, chosen))}
    if not advantages_only:
        _check_rewards(selection, plan, stage, config.max_missing)
    everything = range(stage.expected())
    pending = _pending(stage, everything, selection) if advantages_only else _score_all(scoring, selection, wait)
    ours.sweep()
    if pending and advantages_only:
        raise UserError(
            f"{stage.path}: {named(pending)} not sampled or not scored", "run `rushes score` without --advantages-only"
        )
    if pending and not scoring.outcome.done:
        raise StillBusy(f"{stage.path}: {named(pending)} not sampled or not scored yet", "run it again later")
    summary, written = None, False
    if advantages and not pending:
        summary, written = _advantages(stage, selection, config.max_missing)
    now = measure_of(summary) if summary else None
    weights = selection.specification.weights
    return ScoreReport(
        done=scoring.outcome.done,
        skipped=list(everything) if advantages_only else scoring.outcome.skipped,
        pending=pending,
        samples=scoring.outcome.samples,
        missing=scoring.outcome.missing,
        seconds=time.monotonic() - start,
        advantages=selection.digest,
        summary=summary,
        advantages_written=written,
        waited=ours.waited,
        reward=stage_reward(run, stage, weights, now) if now else None,
        edited=edited,
    )


def _check_rewards(selection: tables.Selection, plan: RolloutPlan, stage: Stage, max_missing: float) -> None:
    """UserError, before a video is decoded, when a file of a reward is missing, or when a reward can score so few of
    the prompts that the stage must fail. A few that it cannot are missing with that reason."""
    for name, chosen in selection.rewards.items():
        chosen.check_files()
        found = [(group, chosen.unscorable(group.prompt, group.target)) for group in plan.groups]
        refused = [(group, error) for group, error in found if error is not None]
        if len(refused) > max_missing * len(found):
            group, error = refused[0]
            some = f"{len(refused)} of {counted(len(found), 'prompt')}"
            which = f"prompt {group.prompt_id} ({group.prompt[:60]!r})"
            problem = f"{stage.path}: reward {name!r} cannot score {some}; {which}: {error.problem}"
            raise UserError(problem, error.hint)


def _score_all(scoring: Scoring, selection: tables.Selection, wait: bool) -> list[int]:
    """Score what can be claimed, and what comes free or is sampled while we stay; returns the shards that are left."""
    stage, worker = scoring.stage, scoring.worker
    scoring.score(order(stage.shards(), worker.part))
    pending = _pending(stage, range(stage.expected()), selection)
    while pending and scoring.stays(pending, wait):
        scoring.tally.tell()
        worker.wait()
        scoring.score([shard for shard in order(pending, worker.part) if stage.is_committed(shard)])
        pending = _pending(stage, pending, selection)
    if not pending:
        scoring.tally.tell_rest()
    return pending


def _pending(stage: Stage, shards: Iterable[int], selection: tables.Selection) -> list[int]:
    """Those of the shards that lack scores which the advantages need."""
    needed = [chosen.directory for chosen in selection.rewards.values()]
    return [
        shard
        for shard in shards
        if not (stage.is_committed(shard) and all(sidecar.scored(stage, shard, directory) for directory in needed))
    ]


def _advantages(stage: Stage, selection: tables.Selection, max_missing: float) -> tuple[dict[str, Any], bool]:
    """The summary, and whether the advantages had to be written for it."""
    path = stage.summary_path(selection.digest)
    if path.exists() and all(sidecar.advantaged(stage, shard, selection.digest) for shard in stage.shards()):
        with suppress(UserError):  # damaged: like a damaged table it is written again
            return read_summary(path).to_dict(), False
    return tables.write_advantages(stage, selection, max_missing), True
