"""What is compared of runs: their settings, their rewards, and the evaluations that they share. Reads, never writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shards.errors import UserError
from shards.measures import Measure, measured
from shards.report.paired import Paired, meant, paired, unlike
from shards.run import Run
from shards.settings.frozen import Settings
from shards.settings.history import differing, in_effect, setting_changes
from shards.store.urls import shown

LETTERS = "ABCDEF"


@dataclass(frozen=True)
class Side:
    """One of the runs."""

    letter: str
    """By which tables call it."""
    run: Run
    trained: int
    """Iterations."""
    settings: Settings
    """As the newest iterations have them."""
    changed: list[str]
    """Settings that were not the same in all of its iterations."""
    training: dict[int, Measure]
    """Reward of the rollouts by iteration."""
    held_out: dict[int, Measure]
    """Reward of the evaluations, by iterations trained before."""

    @property
    def path(self) -> str:
        """The run as the user named it."""
        return shown(str(self.run.path))


@dataclass(frozen=True)
class Pair:
    """A run against the first one, on the last evaluation that both have."""

    letter: str
    iteration: int
    """Iterations trained before, in both."""
    found: Paired | None
    unlike: list[str]
    """Why there is none: what the two evaluations do not share."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    sides: list[Side]
    differing: list[str]
    """Names of the settings that are not the same in all of them."""
    pairs: list[Pair]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "runs": [
                {
                    "letter": side.letter,
                    "run": side.path,
                    "trained": side.trained,
                    "settings": {name: side.settings.get(name) for name in self.differing},
                    "changed": side.changed,
                    "training": _plain(side.training),
                    "held_out": _plain(side.held_out),
                }
                for side in self.sides
            ],
            "pairs": [asdict(pair) for pair in self.pairs],
        }


def _plain(measures: Mapping[int, Measure]) -> dict[str, object]:
    return {str(k): asdict(one) for k, one in measures.items()}


def compare_runs(paths: Sequence[str | Path]) -> Comparison:
    """Read some runs. Raises UserError for fewer than two, more than six, or one twice, and for damaged files."""
    if not 2 <= len(paths) <= len(LETTERS):
        hint = f"name 2 to {len(LETTERS)} run directories"
        raise UserError(f"{len(paths)} run{'s' * (len(paths) != 1)} cannot be compared", hint)
    runs = [Run.open(path) for path in paths]
    places = [run.path.resolve() for run in runs]
    if len(set(places)) < len(places):
        raise UserError(f"{next(one for one in places if places.count(one) > 1)} is named twice", "name it once")
    sides = [_side(letter, run) for letter, run in zip(LETTERS, runs, strict=False)]
    pairs = [pair for side in sides[1:] if (pair := _pair(sides[0], side))]
    return Comparison(sides, differing([side.settings for side in sides]), pairs)


def _side(letter: str, run: Run) -> Side:
    weights = run.config.score.rewards
    training = {k: found for k in run.iterations() if (found := measured(run.iteration(k), weights))}
    held_out = {k: found for k in run.evaluations() if (found := measured(run.evaluation(k), weights))}
    trained = sum(run.iteration(k).trained() for k in run.iterations())
    changed = [
        name for name, values in setting_changes(run).items() if sum(one.iteration is not None for one in values) > 1
    ]
    return Side(letter, run, trained, in_effect(run), changed, training, held_out)


def _pair(first: Side, other: Side) -> Pair | None:
    """The last evaluations of the same number; None where there is none."""
    (name, before), (names, now) = meant(first.run), meant(other.run)
    stages = {stage.iteration: stage for stage in before}
    last = max((stage.iteration for stage in now if stage.iteration in stages), default=None)
    if last is None:
        return None
    one, two = stages[last], next(stage for stage in now if stage.iteration == last)
    reasons = [*(["rewards"] if name != names else []), *unlike(one, two)]
    return Pair(other.letter, last, None if reasons else paired(one, two, name), reasons)
