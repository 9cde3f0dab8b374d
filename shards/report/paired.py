"""Two evaluations compared prompt by prompt: the difference that is left when prompts and noise are the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shards.measures import measure_of
from shards.records.kinds import read_summary
from shards.report.facts import standard_error
from shards.run import Run, Stage, differences
from shards.sidecar import read_advantages, specifications

TIE = 1e-9  # a smaller difference of two mean rewards is rounding
OWN = ("iteration", "policy", "groups", "shards")  # of a plan: what two evaluations of a run never share as a whole
GROUPS = ("prompt_id", "prompt", "target", "image", "negative_prompt")  # of a group: what they share


@dataclass(frozen=True)
class Paired:
    """A policy against the first one, over the prompts that have a reward from both."""

    against: int
    """Iterations after which the first policy was."""
    prompts: int
    difference: float | None
    """Mean over prompts of a prompt's mean reward less that of the first policy; None without such prompts."""
    standard_error: float | None
    """Of that mean, taken over prompts; None for fewer than two."""
    wins: int
    losses: int
    ties: int

    def __str__(self) -> str:
        difference = "-" if self.difference is None else f"{self.difference:+.4f}"
        error = "-" if self.standard_error is None else f"{self.standard_error:.4f}"
        return f"{difference:>10}  {error:>7}  {self.wins:>4}  {self.losses:>6}  {self.ties:>4}"


@dataclass(frozen=True)
class Evaluated:
    """One policy of an evaluation."""

    iteration: int
    """Iterations it was trained for; 0 is the base."""
    videos: int
    """Videos that have a reward."""
    mean_reward: float | None
    standard_error: float | None
    paired: Paired | None
    """Against the first policy; None for that one, and where the two cannot be paired."""
    unlike: list[str]
    """Why they cannot: what their plans do not share."""


def of_run(run: Run) -> list[Evaluated]:
    """The evaluations of a run that are scored by one specification of advantages, `meant`; raises as `evaluated`."""
    name, stages = meant(run)
    return evaluated(stages, name) if stages else []


def meant(run: Run) -> tuple[str, list[Stage]]:
    """The specification of advantages by which the evaluations of a run are to be read, and those that have it.

    That of its [score], else the one that most of them have. Raises UserError for a damaged summary.
    """
    stages = [run.evaluation(k) for k in run.evaluations()]
    named = {stage: [one for one in specifications(stage) if stage.summary_path(one).exists()] for stage in stages}
    counts = Counter(name for names in named.values() for name in names)
    if not counts:
        return "", []
    wanted = run.config.score.specification() if run.config_path.exists() else None
    ours = [
        name for stage, names in named.items() for name in names
        if read_summary(stage.summary_path(name)).specification == wanted
    ]  # fmt: skip
    name = ours[0] if ours else counts.most_common(1)[0][0]
    return name, [stage for stage, names in named.items() if name in names]


def evaluated(stages: Sequence[Stage], specification: str) -> list[Evaluated]:
    """Policies that were evaluated and scored by one specification of advantages, each against the first of them.

    Raises UserError and Damaged for a summary or a table that is missing or damaged.
    """
    found = []
    for stage in stages:
        now = measure_of(read_summary(stage.summary_path(specification)).to_dict())
        names = unlike(stages[0], stage)
        pair = None if stage is stages[0] or names else paired(stages[0], stage, specification)
        mean, error = (now.mean, now.error) if now else (None, None)
        found.append(Evaluated(stage.iteration, now.samples if now else 0, mean, error, pair, names))
    return found


def evaluation_table(rows: Sequence[Evaluated]) -> str:
    """One line a policy, with what each change is taken from below the table; at most 80 columns."""
    change = f"{'change':>10}  {'± s.e.':>7}  {'wins':>4}  {'losses':>6}  {'ties':>4}"
    lines = [f"{'iteration':>9}  {'videos':>6}  {'reward':>7}  {'± s.e.':>7}{change if len(rows) > 1 else ''}"]
    for row in rows:
        mean, error = ("-" if value is None else f"{value:.4f}" for value in (row.mean_reward, row.standard_error))
        line = f"{row.iteration:>9}  {row.videos:>6}  {mean:>7}  {error:>7}{row.paired or ''}"
        lines.append(f"{line}   not paired" if row.unlike else line)
    pairs = [row.paired for row in rows if row.paired]
    if pairs:
        lines.append(f"change: against iteration {pairs[0].against}, same prompts and noise; the mean over")
        prompts = f"{pairs[0].prompts} prompt{'s' * (pairs[0].prompts != 1)}"
        lines.append(f"{prompts}, its standard error, and how many got better, worse, neither")
    lines += [
        f"iteration {row.iteration} was planned with another {', '.join(row.unlike[:4])}" for row in rows if row.unlike
    ]
    return "\n".join(lines)


def unlike(first: Stage, other: Stage) -> list[str]:
    """Dotted names of what the plans of two evaluations do not share: their videos cannot be paired then."""
    plans = [plan.to_dict() if (plan := stage.plan()) else {} for stage in (first, other)]
    shared = [{name: value for name, value in plan.items() if name not in OWN} for plan in plans]
    names = sorted(differences(shared[0], shared[1]), key=lambda name: name.count("."))  # the broad ones first
    groups = [[[group.get(name) for name in GROUPS] for group in plan.get("groups", [])] for plan in plans]
    return names if groups[0] == groups[1] else [*names, "prompts"]


def paired(first: Stage, other: Stage, specification: str) -> Paired:
    """Compare the rewards of two evaluations of the same prompts and noise by one specification of advantages.

    A video that lacks a reward in either is left out of both. Raises UserError and Damaged as the tables do.
    """
    before, now = _rewards(first, specification), _rewards(other, specification)
    by_prompt: dict[int, list[tuple[float, float]]] = {}
    for name in before.keys() & now.keys():
        by_prompt.setdefault(name[0], []).append((before[name], now[name]))
    changes = [sum(b - a for a, b in pairs) / len(pairs) for _, pairs in sorted(by_prompt.items())]
    return _summary(first.iteration, changes)


def _summary(against: int, changes: list[float]) -> Paired:
    import pandas

    wins, losses = sum(change > TIE for change in changes), sum(change < -TIE for change in changes)
    mean = math.fsum(changes) / len(changes) if changes else None
    error = standard_error(pandas.Series(changes)) if len(changes) > 1 else None
    return Paired(against, len(changes), mean, error, wins, losses, len(changes) - wins - losses)


def _rewards(stage: Stage, specification: str) -> dict[tuple[int, int], float]:
    """Rewards by prompt and number of the video, those that are missing left out."""
    table = read_advantages(stage, specification)
    rows = {name: table[name].tolist() for name in ("prompt_id", "sample", "reward")}
    found = zip(rows["prompt_id"], rows["sample"], rows["reward"], strict=True)
    return {(prompt, sample): reward for prompt, sample, reward in found if math.isfinite(reward)}
