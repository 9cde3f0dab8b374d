"""The clips of a report: which videos are shown, how much of them fits, and their HTML."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shards.diagnosis import number
from shards.process.progress import counted
from shards.reader import Shard, open_shard
from shards.report.facts import Facts
from shards.report.shell import escape

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]
ROLES = ("best", "median", "worst")
COLUMNS = 6  # evaluations side by side
MOST_CLIPS = 600  # browsers stop making players at about a thousand


@dataclass
class Shelf:
    """Videos that are put into the page until `limit` bytes are used; those left out are counted."""

    facts: Facts
    limit: int
    used: int = 0
    shown: int = 0
    left_out: int = 0
    _open: dict[tuple[str, int], Shard] = field(default_factory=dict)

    def take(self, rows: Sequence[Row]) -> list[str] | None:
        """The clips of some samples as HTML, or None when not all of them fit: half a comparison says nothing."""
        videos = [self._video(row) for row in rows]
        size = sum(4 * ((len(video) + 2) // 3) for video in videos)
        if self.used + size > self.limit or self.shown + len(rows) > MOST_CLIPS:
            self.left_out += len(rows)
            return None
        self.used += size
        self.shown += len(rows)
        return [clip(row, video) for row, video in zip(rows, videos, strict=True)]

    def close(self) -> None:
        """Close the shards."""
        for shard in self._open.values():
            shard.close()

    def _video(self, row: Row) -> bytes:
        stage = self.facts.stage(row["kind"], row["iteration"])
        place = (stage.name, int(row["shard"]))
        if place not in self._open:
            self._open[place] = open_shard(stage, place[1])
        return self._open[place].video(row["key"])


def clip(row: Row, video: bytes) -> str:
    """One playing video with its reward and the text read in it."""
    source = base64.b64encode(video).decode()
    label = escape(f"{row.get('role', '')} {row['key']}".strip())
    attributes = f'muted loop playsinline controls preload="none" aria-label="{label}"'
    tag = f'<video {attributes} src="data:video/mp4;base64,{source}"></video>'
    head = f'<b class="role {row["role"]}">{row["role"]}</b> ' if "role" in row else ""
    facts = [f'<span class="reward">{number(row["reward"])}</span>']
    if row["kind"] == "rollout" and row["advantage"] == row["advantage"]:
        advantage = round(row["advantage"], 6) + 0.0  # the median of a group may be 1e-16 below its mean
        facts.append(f'<span class="muted">A {number(advantage, 2)}</span>')
    text = "".join(
        f'<span class="read" title="text read, frame by frame">{escape(line)}</span>' for line in readings(row)
    )
    caption = f"{head}{' '.join(facts)}{text}"
    return f'<figure class="clip" title="{escape(row["key"])}">{tag}<figcaption>{caption}</figcaption></figure>'


def readings(row: Row) -> list[str]:
    """What each reward that reads has read in the frames it looked at, on one line a reward."""
    lines = []
    for name, value in row.items():
        if name.endswith(".text") and isinstance(value, str):
            items = json.loads(value)
            texts = [str(item.get("text", "")) if isinstance(item, dict) else str(item) for item in items]
            lines.append(" · ".join(text or "∅" for text in texts))
    return lines


def extremes(group: pandas.DataFrame) -> list[Row]:
    """The best, the median and the worst sample of a group by reward; fewer when it has fewer with a reward.

    The median is the lower middle one. Equal rewards keep the order of the samples.
    """
    order = group.dropna(subset=["reward"]).sort_values(["reward", "sample"], ascending=[False, True])
    places = {"best": 0, "median": len(order) // 2, "worst": len(order) - 1}
    chosen: dict[int, Row] = {}
    for role in ROLES if len(order) else ():
        chosen.setdefault(places[role], {**_row(order, places[role]), "role": role})
    if len(order) == 2:
        chosen = {0: chosen[0], 1: {**chosen[1], "role": "worst"}}
    return [chosen[place] for place in sorted(chosen)]


def evaluations(facts: Facts, shelf: Shelf) -> str:
    """A table: one row a prompt and seed, one column an evaluated policy."""
    rows = facts.of("eval")
    iterations = _spread_out(sorted({int(k) for k in rows["iteration"]}))
    if not iterations:
        return '<p class="empty">No evaluation yet: <code>rushes eval RUN</code> compares first and last.</p>'
    names = ["base policy" if k == 0 else f"after {counted(k, 'iteration')}" for k in iterations]
    head = "".join(f"<th>{name}</th>" for name in names)
    body = []
    for place, mine in rows.groupby(["prompt_id", "sample"]):
        by = {int(one["iteration"]): _row(mine, at) for at, one in enumerate(mine.to_dict("records"))}
        found = [by[k] for k in iterations if k in by]
        if not found or (cells := shelf.take(found)) is None:
            continue
        shown = dict(zip([one["iteration"] for one in found], cells, strict=True))
        same = len({one["noise_seed"] for one in found}) == 1
        note = "" if same else '<span class="warn">the seeds differ</span>'
        name = f'{escape(found[0]["prompt"])}<span class="muted">seed {place[1]}</span>{note}'
        columns = "".join(f"<td>{shown.get(k, '<span class=muted>not sampled</span>')}</td>" for k in iterations)
        body.append(f'<tr><th scope="row">{name}</th>{columns}</tr>')
    table = f'<table class="clips"><thead><tr><th>prompt</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="scroll">{table}</div>' if body else '<p class="empty">No clip fits the limit.</p>'


def groups(facts: Facts, shelf: Shelf) -> str:
    """Best, median and worst of each group, iteration by iteration: the newest open, the others folded."""
    rollouts = facts.of("rollout")
    iterations = sorted({int(k) for k in rollouts["iteration"]}, reverse=True)
    order = [*iterations[:1], *iterations[-1:], *iterations[1:-1]] if len(iterations) > 1 else iterations
    blocks: dict[int, str] = {}
    for iteration in order:  # the newest and the first are what is compared: they get their room first
        cards, left_out = [], 0
        for _, group in rollouts[rollouts["iteration"] == iteration].groupby("group", sort=False):
            chosen = extremes(group)
            clips = shelf.take(chosen) if chosen else []
            if clips:
                cards.append(_card(group, clips))
            left_out += clips is None
        note = f'<p class="muted">{left_out} groups left out for size.</p>' if left_out else ""
        if cards:
            opened = " open" if iteration == iterations[0] else ""
            summary = f"<summary>Iteration {iteration} <span class=muted>{len(cards)} groups</span></summary>"
            blocks[iteration] = f'<details{opened}>{summary}<div class="groups">{"".join(cards)}</div>{note}</details>'
    return "".join(blocks[k] for k in iterations if k in blocks) or '<p class="empty">No scored group to show.</p>'


def _card(group: pandas.DataFrame, clips: list[str]) -> str:
    rewards = group["reward"].dropna()
    spread = f"{len(group)} samples, mean {number(rewards.mean())}, std {number(rewards.std(ddof=0), 2)}"
    window = ", ".join(str(step) for step in group["window"].iloc[0])
    reason = group["reason"].iloc[0] if isinstance(group["reason"].iloc[0], str) else ""
    dropped = f'<span class="warn">dropped: {escape(reason)}</span>' if reason == "no spread" else ""
    head = f"<h4>{escape(str(group['prompt'].iloc[0]))}</h4>"
    facts = f'<p class="muted">{spread}; noise at steps {window} {dropped}</p>'
    return f'<article class="group">{head}{facts}<div class="trio">{"".join(clips)}</div></article>'


def _row(frame: pandas.DataFrame, place: int) -> Row:
    row: Row = {str(name): value for name, value in frame.iloc[place].to_dict().items()}
    row["iteration"] = int(row["iteration"])
    return row


def _spread_out(values: list[int]) -> list[int]:
    """At most COLUMNS of them, evenly spread, the first and the last among them."""
    if len(values) <= COLUMNS:
        return values
    return [values[round(at * (len(values) - 1) / (COLUMNS - 1))] for at in range(COLUMNS)]
