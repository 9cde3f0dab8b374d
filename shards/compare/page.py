"""A comparison as a page like that of a report: curves of all runs in one chart, settings, the same clips of each."""

from __future__ import annotations

from pathlib import Path

from shards.compare.runs import Comparison, Side
from shards.compare.terminal import sentence
from shards.files import publish_replace
from shards.process.progress import counted
from shards.report import facts as report_facts
from shards.report.clips import Row, Shelf
from shards.report.facts import Facts
from shards.report.panels import AXES, OUT_OF_ORDER, at_places, panel, wide
from shards.report.shell import escape, shell
from shards.report.svg import Series, lines
from shards.report.tables import table
from shards.settings.history import written

WORDS = {
    "reward": "Held out: the same prompts and noise throughout, mean ± 1 standard error, after so many iterations.",
    "training": "Of the rollouts, whose prompts change from iteration to iteration.",
    "settings": "Those that differ, as the newest iterations of each run have them.",
    "clips": "The same held-out prompt and number through the last evaluation of each run.",
}


def write_comparison(found: Comparison, path: Path, megabytes: float) -> Path:
    """Write the page to `path`; clips may take `megabytes` in all. Raises UserError when a run has no shard."""
    publish_replace(path, page_of(found, megabytes).encode())
    return path


def page_of(found: Comparison, megabytes: float) -> str:
    """The whole page."""
    facts = [report_facts.gather(side.run) for side in found.sides]
    parts = {
        "reward": ("Held-out reward", _rewards(found, facts, "eval") + _pairs(found)),
        "training": ("Training reward", _rewards(found, facts, "rollout")),
        "settings": ("Settings", _settings(found)),
        "clips": ("Side by side", _clips(found, facts, int(megabytes * 1e6))),
    }
    titled = {name: (label, f"<h2>{label}</h2><p>{WORDS[name]}</p>{text}") for name, (label, text) in parts.items()}
    about = "<br>".join(
        f'<span class="key {_style(side)}">{side.letter} {escape(side.path)}: '
        f"{counted(side.trained, 'iteration')} trained</span>"
        for side in found.sides
    )
    return shell(" · ".join(side.run.path.resolve().name for side in found.sides), about, titled)


def _style(side: Side) -> str:
    return f"run{ord(side.letter) - ord('A')}"


def _rewards(found: Comparison, facts: list[Facts], kind: str) -> str:
    """The curves of all runs: by iteration, and against what was spent."""
    name = "held-out reward" if kind == "eval" else "training reward"
    curves = {
        side.letter: report_facts.error_points(one.of(kind), "reward")
        for side, one in zip(found.sides, facts, strict=True)
    }
    series = [Series(side.letter, _style(side), curves[side.letter], bars=True) for side in found.sides]
    panels = []
    for axis, label in AXES.items():
        moved = [
            Series(side.letter, _style(side), at_places(curves[side.letter], one.places[axis]), bars=True)
            for side, one in zip(found.sides, facts, strict=True)
        ]
        if not all(one.places[axis] for one in facts):
            panels.append(panel(f"against {axis}", "", note=OUT_OF_ORDER))
        elif len({p.x for one in moved for p in one.points}) > 1:
            chart = lines(moved, label=f"{name} by {label}", x_label=label, whole_x=axis != "hours")
            panels.append(panel(f"against {axis}", chart, moved))
    return wide(series, f"{name} by iteration") + (f'<div class="panels">{"".join(panels)}</div>' if panels else "")


def _pairs(found: Comparison) -> str:
    sentences = [sentence(pair, found.sides[0]) for pair in found.pairs]
    return "".join(f'<p class="note">{escape(one)}</p>' for one in sentences)


def _settings(found: Comparison) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(written(side.settings.get(name)))}</td>" for side in found.sides)
        + "</tr>"
        for name in found.differing
    )
    notes = "".join(
        f'<p class="note">Not the same in all iterations of {side.letter}: {escape(", ".join(side.changed))}</p>'
        for side in found.sides if side.changed
    )  # fmt: skip
    none = '<p class="empty">No setting differs.</p>'
    return (table("settings", ("setting", *(side.letter for side in found.sides)), rows) if rows else none) + notes


def _clips(found: Comparison, facts: list[Facts], limit: int) -> str:
    """A row a prompt that all runs evaluated, a column a run; the limit is shared."""
    last = [_last(one) for one in facts]
    shared = set.intersection(*(set(rows) for rows in last))
    shelves = [Shelf(one, limit // len(facts)) for one in facts]
    body = []
    try:
        for place in sorted(shared):
            rows = [one[place] for one in last]
            cells = [shelf.take([row]) for shelf, row in zip(shelves, rows, strict=True)]
            if all(cells) and len({row["prompt"] for row in rows}) == 1:
                same = len({row["noise_seed"] for row in rows}) == 1
                note = "" if same else '<span class="warn">the seeds differ</span>'
                name = f'{escape(rows[0]["prompt"])}<span class="muted">seed {place[1]}</span>{note}'
                columns = "".join(f"<td>{cell[0]}</td>" for cell in cells if cell)
                body.append(f'<tr><th scope="row">{name}</th>{columns}</tr>')
    finally:
        for shelf in shelves:
            shelf.close()
    if not body:
        return '<p class="empty">No evaluated prompt is shared by all runs, or no clip fits the limit.</p>'
    heads = [
        f"{side.letter}, after {counted(max(int(k) for k in one.of('eval')['iteration']), 'iteration')}"
        for side, one in zip(found.sides, facts, strict=True)
    ]
    return table("clips", ("prompt", *heads), "".join(body))


def _last(facts: Facts) -> dict[tuple[int, int], Row]:
    """Videos of the last evaluation of a run by prompt and number."""
    rows = facts.of("eval")
    newest = rows[rows["iteration"] == rows["iteration"].max()]
    found = [{str(name): value for name, value in row.items()} for row in newest.to_dict("records")]
    return {(int(row["prompt_id"]), int(row["sample"])): {**row, "iteration": int(row["iteration"])} for row in found}
