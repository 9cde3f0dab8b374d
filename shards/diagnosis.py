"""What the numbers of a run mean: thresholds, and sentences for people, as pure functions of records.

`rushes train` ends with the notes of one iteration, `rushes report` shows the alarms of a whole run. Both judge an
iteration by the settings it was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from shards.config import TrainConfig

Record = Mapping[str, Any]
"""The numbers of one update, as `policy/metrics.jsonl` has them."""
Clips = Literal["both", "high", "none"]

GUARD_LIMIT = 0.2  # share by which a guard may move from iteration 0
NOISE = 2.0  # standard errors: what moves less may be the draw of prompts
SILENT_GROUPS = 0.5  # share of groups without an advantage that is worth a word
RATIO_SHARE = 0.1  # of train.clip_range: how far from 1 the ratio of the first update of an iteration may be
CLIP_HIGH = 0.4  # clip fraction above which updates are wasted
CLIP_LOW = 0.05  # clip fraction below which the policy hardly moves
CLIP_RUN = 5  # updates in a row before the clip fraction is worth a word
FALL = 0.2  # share of its first value that a measurement may lose before it is reported
WATCHED = ("saturation", "edges", "entropy", "motion", "diversity")
"""Measurements of the reward `guards` that go down when a reward is hacked; `luma` and shares may move either way."""


@dataclass(frozen=True)
class Limits:
    """What the updates of one iteration are judged by."""

    ratio: float
    """How far from 1 the ratios of the first update may be; infinite where they need not be 1."""
    epsilon: float
    """train.epsilon"""
    clips: Clips
    """What is said of clipping: `both` where the clip alone limits a step, `high` where it stands outside a hold and
    rarely acts, `none` for an objective without a ratio."""

    @classmethod
    def of(cls, settings: TrainConfig, lag: int) -> Limits:
        """Of an iteration trained with these settings; `lag` policies lie between the one that sampled and it."""
        published = settings.is_published
        ratio = RATIO_SHARE * settings.clip_range if lag == 0 and published else math.inf
        return cls(ratio, settings.epsilon, "both" if published else "high" if settings.objective == "grpo" else "none")


@dataclass(frozen=True)
class Move:
    """How far a guard is from where it began."""

    guard: str
    kind: str
    iteration: int
    before: float
    now: float
    alarm: bool

    @classmethod
    def beyond(cls, guard: str, kind: str, iteration: int, before: float, now: float, error: float) -> Move | None:
        """The move of a mean whose difference has that standard error; None within GUARD_LIMIT.

        It is an alarm when it is also larger than NOISE standard errors.
        """
        difference = abs(now - before)
        if difference <= GUARD_LIMIT * abs(before) or difference < 1e-9:
            return None
        return cls(guard, kind, iteration, before, now, difference > NOISE * error)

    @property
    def share(self) -> float:
        """Relative change; infinite when it began at 0."""
        return (self.now - self.before) / abs(self.before) if self.before else math.inf

    def __str__(self) -> str:
        change = f"{self.share:+.0%}".replace("-", "\N{MINUS SIGN}") if math.isfinite(self.share) else "from nothing"
        where = "evaluation" if self.kind == "eval" else "iteration"
        return f"{self.guard} moved {change} ({number(self.before)} → {number(self.now)}) by {where} {self.iteration}"


# --- Notes on one iteration ------------------------------------------------------------------------------------------


def note_updates(records: Sequence[Record], limits: Limits) -> list[str]:
    """What a careful reader of the metrics of one iteration would say; empty when all is well."""
    sentences = []
    for expert in sorted({record["expert"] for record in records}):
        mine = [record for record in records if record["expert"] == expert]
        sentences += [f"{expert}: {text}" for text in _note_expert(mine, limits)]
        if limits.clips != "none":
            sentences += [f"{expert}: {text}" for text in _note_clipping(mine, low=limits.clips == "both")]
    return sentences


def note_groups(dropped: int, total: int) -> list[str]:
    """A word on groups that taught nothing because all their videos earned the same."""
    if total == 0 or dropped / total <= SILENT_GROUPS:
        return []
    return [
        f"{dropped} of {total} groups have no advantage at all: the reward is saturated, or the prompts are too hard; "
        "a larger rollout.group_size or other prompts help"
    ]


def note_unmoved(records: Sequence[Record], unmoved: Sequence[str]) -> list[str]:
    """A word on layers that no gradient reached although others of the expert (`records`: its own) learned."""
    if not unmoved or not any(record.get("gradient_norm", 0.0) > 0 for record in records):
        return []
    others = f" and {len(unmoved) - 1} more" if len(unmoved) > 1 else ""
    return [f"{unmoved[0]}{others} did not move at all: no gradient reached what should be trained there"]


def note_drift(kl_before: float, kl_now: float, first: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
    """A word when the distance to the reference rose since the iteration before while guards fell since the first.

    Takes the mean KL of two iterations, and the mean guard measurements of the first and the last.
    """
    fallen = [
        f"{name} {first[name]:.3g} -> {now[name]:.3g}"
        for name in WATCHED
        if first.get(name, 0.0) > 0 and now.get(name, first[name]) < (1.0 - FALL) * first[name]
    ]
    if not fallen or not 0 < kl_before < kl_now:
        return []
    return [
        f"the distance to the reference rises while the videos get poorer ({', '.join(fallen)} since iteration 0); "
        "the reward is being hacked: raise train.kl_beta, and look at the videos"
    ]


def note_ratio_norm(settings: TrainConfig) -> list[str]:
    """A word on a clip range that is too wide for the small ratios of RatioNorm."""
    if not settings.ratio_norm or settings.clip_range <= 1e-5:
        return []
    small = "clips nothing of the small ratios of ratio_norm; GRPO-Guard has 2e-6 to 4e-6"
    return [f"clip_range {settings.clip_range:g} {small}"]


def note_replay(largest: float | None) -> list[str]:
    """A word on a gate that let a difference through: |log-ratio| `largest`, None where it did not run."""
    if not largest:
        return []
    seen = f"the replay differed by up to {largest:.2g}, within train.replay_limit; a changed weight may move as little"
    return [f"{seen}: `rushes verify --replay` shows each step, and docs/trust.md tells rounding from a change"]


def _note_expert(records: Sequence[Record], limits: Limits) -> list[str]:
    first, sentences = records[0], []
    off = off_policy(first, limits)
    if off is not None:
        sentences.append(f"the first update saw ratios up to {off:.2g} away from 1; is the rollout of another policy?")
    weak, epsilon = min(record.get("gradient_rms", 1.0) for record in records), limits.epsilon
    if 0 < weak < 10 * epsilon:
        sentences.append(f"the gradient ({weak:.1g} per weight) drowns in train.epsilon = {epsilon:g}; lower that")
    if all(record.get("gradient_norm") == 0 for record in records):
        sentences.append("every gradient was 0, so nothing was learned; look at the advantages")
    return sentences + _note_kl(records)


def _note_clipping(records: Sequence[Record], low: bool) -> list[str]:
    fractions = _clip_fractions(records)
    if len(fractions) < CLIP_RUN:
        return []
    if min(fractions) > CLIP_HIGH:
        return [
            f"more than {CLIP_HIGH:.0%} of the samples are clipped; lower the learning rate or raise train.clip_range"
        ]
    if low and max(fractions) < CLIP_LOW:
        return [f"less than {CLIP_LOW:.0%} of the samples are clipped; train.learning_rate may be higher"]
    return []


def _note_kl(records: Sequence[Record]) -> list[str]:
    values = [record["kl"] for record in records if "kl" in record]
    if len(values) >= CLIP_RUN and values[0] > 0 and values[-1] > 10 * values[0]:
        return ["the distance to the reference grew tenfold in one iteration; raise train.kl_beta or lower the rate"]
    return []


# --- Alarms of a run -------------------------------------------------------------------------------------------------


def alarm_moves(moves: Sequence[Move]) -> list[str]:
    """Guards that moved further than noise explains."""
    return [f"Guard: {move}. Look at the clips: is the reward being hacked?" for move in moves if move.alarm]


def alarm_groups(used: Sequence[tuple[float, float]]) -> list[str]:
    """Iterations that taught little, from (iteration, share of its groups that gave an advantage)."""
    return [
        f"Iteration {iteration:.0f}: {1 - share:.0%} of the groups have no advantage; the reward is saturated, "
        "or the prompts are too hard."
        for iteration, share in used
        if 1 - share > SILENT_GROUPS
    ]


def alarm_missing(iteration: object, missing: int, reason: str) -> str:
    """Samples of an iteration that have no reward, and the commonest reason."""
    return f"Iteration {iteration}: {missing} samples have no reward, most often because: {reason}."


def alarm_updates(updates: Sequence[Record], limits: Mapping[int, Limits]) -> list[str]:
    """What is wrong with the updates of a run; `limits` are those of each iteration."""
    found = []
    for record in updates:
        off = off_policy(record, limits[record["iteration"]])
        if off is not None:
            found.append(
                f"Iteration {record['iteration']}, {record['expert']}: the first update saw a ratio {number(off)} "
                "away from 1; are these rollouts of another policy?"
            )
    for expert in dict.fromkeys(record["expert"] for record in updates):
        fractions = _clip_fractions([record for record in updates if record["expert"] == expert])
        if len(fractions) == CLIP_RUN and min(fractions) > CLIP_HIGH:
            found.append(f"{expert}: over {CLIP_HIGH:.0%} of the samples are clipped; lower train.learning_rate.")
    return found


# --- Both ------------------------------------------------------------------------------------------------------------


def off_policy(record: Record, limits: Limits) -> float | None:
    """How far from 1 the ratios of a first update are; None for a later one, and within the limit."""
    off = max(abs(record.get("ratio_max", 1.0) - 1.0), abs(record.get("ratio_min", 1.0) - 1.0))
    return off if record["update"] == 1 and off > limits.ratio else None


def _clip_fractions(records: Sequence[Record]) -> list[float]:
    """Of the last CLIP_RUN updates; the first one of an iteration is on-policy and never clips."""
    later = (record for record in records if record["update"] > 1)
    return [record["clip_fraction"] for record in later if "clip_fraction" in record][-CLIP_RUN:]


def number(value: float | None, digits: int = 3) -> str:
    """A number for eyes: a minus sign that is one, exponents only where needed, an en dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"
        return text.replace("-", "\N{MINUS SIGN}")
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}".replace("-", "\N{MINUS SIGN}")
