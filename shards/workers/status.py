"""How far a run is and who works on it, from its files alone and while everything runs."""

from __future__ import annotations

import os
import textwrap
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shards.measures import StageReward, read_metrics, stage_reward
from shards.plan import RolloutPlan
from shards.run import EXPERT_NAMES, Run, Stage
from shards.sidecar import scorers, specifications
from shards.spool import spool_files
from shards.workers import owners

WINDOW = 3600.0  # seconds back that a rate is taken from
LOOK = 0.25  # seconds between two looks at the claims
WIDTH = 80  # of a terminal
SHORTEST_NAME = 18  # characters of a part that are always shown


@dataclass(frozen=True)
class Part:
    """One part of a stage: the rollout, one scorer, the advantages or the training of an expert."""

    stage: str
    what: str
    """rollout, score, advantage or train"""
    name: str
    """Directory of a scorer or of a specification of advantages, or one of two experts in training; else empty."""
    unit: str
    """What `done`, `claimed`, `left` and `total` count: shards, or updates of the training."""
    total: int
    done: int
    claimed: int
    """Held by a worker that is not known to be dead."""
    left: int
    """Neither done nor claimed."""
    samples: int
    """Samples finished, those in the spools included."""
    samples_total: int
    per_hour: float | None
    """Samples (updates of the training) in an hour; None before there is something to take it from."""
    seconds_left: float | None
    """At that rate; None while nobody works on it."""


@dataclass(frozen=True)
class Worker:
    """A claim and what is known of its owner."""

    stage: str
    what: str
    shard: int
    """Of the training: 0 the high-noise expert or the only one, 1 the low-noise one."""
    host: str
    pid: int
    worker: str
    state: str
    """alive: it counts, or its lock is held. silent: it did not count while we looked. dead: its claim is void."""
    sure: bool
    """False for `silent`: longer watching would tell."""


@dataclass(frozen=True)
class Status:
    """A run at one moment."""

    run: str
    trained: int
    """Iterations with a finished policy."""
    parts: list[Part] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    rewards: list[StageReward] = field(default_factory=list)
    """By the rewards of run.toml: of the newest iteration and evaluation that have one, or of the one asked for."""

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON, with the number of workers in each state."""
        alive = len({(one.host, one.pid) for one in self.workers if one.state == "alive"})
        return {**asdict(self), "workers_alive": alive}


def status(run: Run, iteration: int | None = None, quick: bool = False) -> Status:
    """What is done, claimed and left of the stages that are in work, or of one iteration.

    The claims are watched until each of them has counted or its time between two counts is over, a few seconds when the
    owner runs elsewhere; with `quick` they are looked at once. No clock but that of the file system is asked when
    something was written. Of a run at a URL the store's clock tells that, and what other machines have not finished
    does not show. Reads only. Raises UserError for a damaged plan.
    """
    run.files.refresh(run.path)
    stages = [run.iteration(iteration)] if iteration is not None else _in_work(run)
    states = _watch(stages, 0.0 if quick else 1.5, run.config.workers.claim_seconds or owners.SECONDS)
    workers = [
        Worker(stage.name, found.what, found.shard, owner.host, owner.pid, owner.worker, state, state != "silent")
        for stage, found, state in states
        if (owner := found.owner)
    ]
    held = {(stage.name, found.what, found.shard) for stage, found, state in states if state in ("alive", "silent")}
    parts = [part for stage in stages for part in _parts(run, stage, held)]
    trained = sum(run.iteration(k).trained() for k in run.iterations())
    return Status(run.files.shown(str(run.path)), trained, parts, workers, _rewards(run, iteration))


def _rewards(run: Run, iteration: int | None) -> list[StageReward]:
    """The newest reward of each kind of stage, or that of one iteration and of the evaluation of the same number."""
    kinds = ((run.iteration, run.iterations()), (run.evaluation, run.evaluations()))
    found = []
    for of, numbers in kinds:
        wanted = reversed(numbers) if iteration is None else [number for number in numbers if number == iteration]
        rewards = (stage_reward(run, of(number), run.config.score.rewards) for number in wanted)
        found += [one for one in [next((one for one in rewards if one), None)] if one]
    return found


def render(found: Status, width: int = WIDTH) -> str:
    """The table for people, in lines of at most `width` characters where the path of the run allows it."""
    if not found.parts:
        return f"{found.run}: nothing is planned yet; `rushes rollout` makes the plan of an iteration"
    trained = f"{found.trained} iteration{'s are' if found.trained != 1 else ' is'} trained"
    lines = [f"{found.run}: {trained}", *_table(found.parts, width)]
    lines += [f"{one.stage} {one}" for one in found.rewards]
    counts = {state: sum(one.state == state for one in found.workers) for state in ("alive", "silent", "dead")}
    claims = [f"{counts['alive']} of theirs"] if counts["alive"] else []
    claims += [f"{counts['silent']} silent (perhaps alive)"] if counts["silent"] else []
    claims += [f"{counts['dead']} dead (void)"] if counts["dead"] else []
    lines.append(f"workers: {found.as_dict()['workers_alive']} alive; claims: {', '.join(claims) or 'none'}")
    for one in found.workers:
        piece = EXPERT_NAMES[one.shard] if one.what == "train" else one.shard
        text = f"{one.host} process {one.pid}, worker {one.worker}: {one.stage} {one.what} {piece}, {one.state}"
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)


def _table(parts: list[Part], width: int) -> list[str]:
    """Columns as wide as what they hold; a long name of a reward is cut where the line would be longer than `width`."""
    rows = [("stage", "part", "done", "claimed", "left", "videos", "/hour", "ends in")]
    for part in parts:
        videos = f"{part.samples}/{part.samples_total}" if part.samples_total else ""
        rate = f"{part.per_hour:.{0 if part.per_hour >= 10 else 1}f}" if part.per_hour is not None else ""
        numbers = f"{part.done}/{part.total}", str(part.claimed), str(part.left), videos, rate
        rows.append((part.stage, f"{part.what} {part.name}".strip(), *numbers, _duration(part.seconds_left)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    over = sum(widths) + len(widths) - 1 - width
    widths[1] = max(min(widths[1], SHORTEST_NAME), widths[1] - max(0, over))
    return [
        " ".join(
            _cut(text, size).ljust(size) if column < 2 else text.rjust(size)
            for column, (text, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _cut(text: str, size: int) -> str:
    """A text in `size` characters: what is left out of its middle is one dot, because names of rewards end in digits
    that tell them apart."""
    if len(text) <= size:
        return text
    tail = min(9, size // 2)
    return f"{text[: size - tail - 1]}…{text[-tail:]}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours < 100 else f"{hours // 24} days"


def _in_work(run: Run) -> list[Stage]:
    """The iterations and evaluations that are not finished, or the last iteration when all are."""
    stages = [stage for stage in map(run.iteration, run.iterations()) if stage.plan_path.exists()]
    evaluations = [stage for stage in map(run.evaluation, run.evaluations()) if not _evaluated(stage)]
    return ([stage for stage in stages if not stage.trained()] or stages[-1:]) + evaluations


def _evaluated(stage: Stage) -> bool:
    return any(stage.summary_path(name).exists() for name in specifications(stage))


def _watch(stages: list[Stage], beats: float, seconds: float) -> list[tuple[Stage, owners.Found, owners.Life]]:
    """The claims of stages and what became known of their owners while we looked, for `beats` of their counts."""
    deadline: float | None = None
    while True:
        found = [(stage, one, owners.life(one, seconds)) for stage in stages for one in owners.claims_of(stage)]
        silent = [one.owner.every for _, one, state in found if state == "silent" and one.owner]
        if deadline is None:
            deadline = time.monotonic() + beats * max(silent, default=0.0)
        if not silent or time.monotonic() >= deadline:
            return [(stage, one, state) for stage, one, state in found if state != "gone"]
        time.sleep(min(LOOK, max(0.0, deadline - time.monotonic())))


def _parts(run: Run, stage: Stage, held: set[tuple[str, str, int]]) -> list[Part]:
    plan = stage.plan()
    if plan is None:
        return []
    sizes = plan.shard_sizes
    counter = _Counter(stage, sizes, {(what, shard) for name, what, shard in held if name == stage.name})
    committed = {shard: stage.manifest_path(shard) for shard in stage.shards() if shard in sizes}
    waiting = [spool_files(stage, shard) for shard in sizes if shard not in committed]
    begun = {path: len(keys) for files in waiting for path, keys in files.items()}
    parts = [counter.part("rollout", "", committed, begun)]
    for scorer in scorers(stage) or [""]:
        paths = {shard: stage.score_path(scorer, shard) for shard in sizes} if scorer else {}
        parts.append(counter.part("score", scorer, {s: path for s, path in paths.items() if path.exists()}))
    for name in specifications(stage) or [""]:
        paths = {shard: stage.advantage_path(name, shard) for shard in sizes} if name else {}
        parts.append(counter.part("advantage", name, {s: path for s, path in paths.items() if path.exists()}))
    return [*parts, *_training(run, stage, plan, counter)] if stage.kind == "rollout" else parts


def _training(run: Run, stage: Stage, plan: RolloutPlan, counter: _Counter) -> list[Part]:
    """Updates of each expert, as the logs of metrics tell them."""
    numbers = sorted(set(plan.schedule.experts))
    updates = {(row["expert"], row["update"]) for row in read_metrics(stage)}
    parts, before = [], 0
    for number in numbers:
        expert = EXPERT_NAMES[number]
        done = sum(name == expert for name, _ in updates)
        total = done if stage.trained() else max(done, run.config.train.updates_per_rollout)
        own = stage.expert_metrics_path(expert)
        alone = own.exists() and not stage.trained()
        rate = _update_rate(stage, own, done) if alone else _update_rate(stage, stage.metrics_path, len(updates))
        claimed, left = int(("train", number) in counter.held and done < total), total - done
        waiting = left if alone else before + left  # one process trains one expert after the other
        before = waiting
        seconds = waiting * 3600 / rate if rate and claimed else None
        name = expert if len(numbers) > 1 else ""
        parts.append(Part(stage.name, "train", name, "updates", total, done, claimed, left, 0, 0, rate, seconds))
    return parts


def _update_rate(stage: Stage, log: Path, done: int) -> float | None:
    """Updates in an hour, of those that a log has; None where that cannot be said."""
    began, last = (_written(path) for path in (stage.train_plan_path, log))
    one_clock = stage.files.one_clock  # else one may be the store's time and the other one ours
    return 3600 * done / (last - began) if one_clock and done and began and last and last > began else None


@dataclass(frozen=True)
class _Counter:
    """Counts the shards of one stage."""

    stage: Stage
    sizes: dict[int, int]
    held: set[tuple[str, int]]

    def part(self, what: str, name: str, finished: dict[int, Path], begun: dict[Path, int] | None = None) -> Part:
        """Shards that have their file, and samples; those of unfinished shards are in the files `begun`, by number."""
        claimed = sum((what, shard) in self.held for shard in self.sizes if shard not in finished)
        events = [(_written(path), self.sizes[shard]) for shard, path in finished.items()]
        # the spool of a run at a URL is this machine's alone, and its times are those of another clock
        one_clock = self.stage.files.one_clock
        events += [(_written(path) if one_clock else None, count) for path, count in (begun or {}).items()]
        samples, total = sum(count for _, count in events), sum(self.sizes.values())
        rate = self._rate(what, [(moment, count) for moment, count in events if moment], samples == total)
        seconds = (total - samples) * 3600 / rate if rate and claimed else None
        left = len(self.sizes) - len(finished) - claimed
        counts = len(self.sizes), len(finished), claimed, left, samples, total
        return Part(self.stage.name, what, name, "shards", *counts, None if what == "advantage" else rate, seconds)

    def _rate(self, what: str, events: list[tuple[float, int]], over: bool) -> float | None:
        """Samples in an hour, over the last hour in which anybody wrote, by the clock of the file system alone.

        A rollout begins with its plan; scoring with its first shard, which does not count then.
        """
        one_clock = self.stage.files.one_clock  # else the claims have times of another clock
        found = owners.claims_of(self.stage) if one_clock and not over else []
        beats = [_written(one.path) for one in found if one.what == what]
        now = max([moment for moment, _ in events] + [moment for moment in beats if moment], default=0.0)
        start = _written(self.stage.plan_path) if what == "rollout" else None
        began = max(start or min((moment for moment, _ in events), default=0.0), now - WINDOW)
        recent = sum(count for moment, count in events if moment > began)
        # files that were copied without their times are all of one moment, which is not a time to take a rate from
        return 3600 * recent / (now - began) if recent and now > began + 1.0 else None


def _written(path: Path) -> float | None:
    """When a file was last written, on the clock of its file system; None when it is gone."""
    with suppress(OSError):
        return os.stat(path).st_mtime
    return None
