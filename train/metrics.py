"""Metrics of training: one JSON line an update, the same for TensorBoard, and warnings in plain words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shards.files import publish_replace, read_json_lines
from shards.report.facts import CLIP_HIGH, CLIP_RUN, SILENT_GROUPS
from shards.store import mirror

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = dict[str, Any]
Clips = Literal["both", "high", "none"]
CLIP_LOW = 0.05  # clip fraction below which the policy hardly moves


class MetricsLog:
    """`policy/metrics.jsonl` and `policy/tensorboard` of one iteration.

    The JSON lines are the truth; the TensorBoard folder is made from them again whenever training begins or resumes.
    """

    def __init__(self, policy_dir: Path, kept: Mapping[str, int]) -> None:
        """Keep the records of updates that a checkpoint covers (`kept`: expert name -> updates) and drop later ones."""
        self.path = policy_dir / "metrics.jsonl"
        mirror.look(self.path)
        self.records = [
            record for record in read_json_lines(self.path) if record["update"] <= kept.get(record["expert"], 0)
        ]
        publish_replace(self.path, "".join(_line(record) for record in self.records).encode())
        self._board = _board(policy_dir / "tensorboard")
        for record in self.records:
            self._show(record)

    def add(self, record: Record) -> None:
        """Append the record of one update. It needs `expert`, `update` and `total_updates` besides the numbers."""
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))
        mirror.put(self.path, self.path)
        self._show(record)

    def close(self) -> None:
        """Write what TensorBoard still holds back."""
        self._board.close()

    def _show(self, record: Record) -> None:
        for name, value in record.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{record['expert']}/{name}", value, record["total_updates"])


def guard(
    records: Sequence[Record],
    *,
    epsilon: float,
    on_policy_limit: float,
    clips: Clips = "both",
) -> list[str]:
    """What a careful reader of the metrics would say: sentences, empty when all is well.

    `records` are those of one iteration. `clips` says what is said of clipping: `both` where the clip alone limits a
    step, `high` where it stands outside a hold and rarely acts, `none` for an objective without a ratio.
    """
    sentences = []
    for expert in sorted({record["expert"] for record in records}):
        mine = [record for record in records if record["expert"] == expert]
        sentences += [f"{expert}: {text}" for text in _guard_expert(mine, epsilon, on_policy_limit)]
        if clips != "none":
            sentences += [f"{expert}: {text}" for text in _guard_clipping(mine, low=clips == "both")]
    return sentences


def guard_groups(dropped: int, total: int) -> list[str]:
    """A word on groups that taught nothing because all their videos earned the same."""
    if total == 0 or dropped / total <= SILENT_GROUPS:
        return []
    return [
        f"{dropped} of {total} groups have no advantage at all: the reward is saturated, or the prompts are too hard; "
        "a larger rollout.group_size or other prompts help"
    ]


def guard_unmoved(records: Sequence[Record], unmoved: Sequence[str]) -> list[str]:
    """A word on layers that no gradient reached although others of the expert (`records`: its own) learned."""
    if not unmoved or not any(record["gradient_norm"] > 0 for record in records):
        return []
    others = f" and {len(unmoved) - 1} more" if len(unmoved) > 1 else ""
    return [f"{unmoved[0]}{others} did not move at all: no gradient reached what should be trained there"]


def _guard_expert(records: list[Record], epsilon: float, on_policy_limit: float) -> list[str]:
    first, sentences = records[0], []
    off = max(abs(first["ratio_max"] - 1.0), abs(first["ratio_min"] - 1.0))
    if first["update"] == 1 and off > on_policy_limit:
        sentences.append(f"the first update saw ratios up to {off:.2g} away from 1; is the rollout of another policy?")
    weak = min(record["gradient_rms"] for record in records)
    if 0 < weak < 10 * epsilon:
        sentences.append(f"the gradient ({weak:.1g} per weight) drowns in train.epsilon = {epsilon:g}; lower that")
    if all(record["gradient_norm"] == 0 for record in records):
        sentences.append("every gradient was 0, so nothing was learned; look at the advantages")
    return sentences + _guard_kl(records)


def _guard_clipping(records: list[Record], low: bool) -> list[str]:
    # the first update of an iteration is on-policy and never clips
    fractions = [record["clip_fraction"] for record in records if record["update"] > 1][-CLIP_RUN:]
    if len(fractions) < CLIP_RUN:
        return []
    if min(fractions) > CLIP_HIGH:
        return [
            f"more than {CLIP_HIGH:.0%} of the samples are clipped; lower the learning rate or raise train.clip_range"
        ]
    if low and max(fractions) < CLIP_LOW:
        return [f"less than {CLIP_LOW:.0%} of the samples are clipped; train.learning_rate may be higher"]
    return []


def _guard_kl(records: list[Record]) -> list[str]:
    values = [record["kl"] for record in records]
    if len(values) >= CLIP_RUN and values[0] > 0 and values[-1] > 10 * values[0]:
        return ["the distance to the reference grew tenfold in one iteration; raise train.kl_beta or lower the rate"]
    return []


def _line(record: Record) -> str:
    return json.dumps(record, sort_keys=True) + "\n"


def _board(folder: Path) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder))
