"""The report of a run: one HTML file with everything in it, made from the files of the run alone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from shards import diagnosis
from shards.diagnosis import Move, number
from shards.errors import UserError
from shards.report import clips as report_clips
from shards.report import facts as report_facts
from shards.report.facts import Cost, Facts
from shards.report.points import Point
from shards.report.svg import Series, histogram, legend, lines
from shards.run import Run

if TYPE_CHECKING:
    import pandas

MEGABYTES = 48  # of clips in a page: what a browser opens at once and a mail server lets pass
BINS = 24
COST_COLUMNS = ("stage", "work", "videos", "time", "per video", "shards", "peak memory")
EXPERT_LABELS = {"high_noise": "high-noise expert", "low_noise": "low-noise expert"}
EXPERT_STYLES = {"high_noise": "high", "low_noise": "low"}

CHARTS = {  # by objective: title, metric, what is taken off it, explanation
    "grpo": [
        ("ratio − 1", "ratio_mean", 1.0, "The band reaches from the smallest to the largest; 0 at the first update."),
        ("clip fraction", "clip_fraction", 0.0, "Share of samples whose ratio was clipped; 0 at the first update."),
    ],
    "nft": [("loss", "loss", 0.0, "Error of predicted clean latents; DiffusionNFT has no ratio and clips nothing.")],
    "dpo": [
        ("pairs right", "pairs_right", 0.0, "Share of pairs in which the policy moved more to the winner."),
        ("loss", "loss", 0.0, "Of a pair, halved; ln 2 / 2 = 0.347 before the first update of an iteration."),
    ],
    "sft": [("loss", "loss", 0.0, "Flow-matching error of the best videos of each group.")],
    "every": [
        ("KL", "kl", 0.0, "Distance to the reference policy; 0 throughout when train.kl_beta is 0."),
        ("gradient norm", "gradient_norm", 0.0, "Before clipping to train.max_grad_norm."),
        ("movement", "movement", 0.0, "Share of the way to the targets that the model has gone since the rollout."),
        ("signal", "signal", 0.0, "Cosine of the gradients of the two halves of an update; noise alone gives 0."),
    ],
}


OPTIONAL = ("movement", "signal")  # metrics that not every objective has


def write_report(run: Run, megabytes: float = MEGABYTES) -> Path:
    """Write RUN/report/index.html and return its path; the same files give the same page.

    `megabytes` is the most that clips may take as they stand in the page; the page says how many were left out. Raises
    UserError when the run holds no shard, Damaged when a file of it is broken.
    """
    if not megabytes >= 0:
        raise UserError(f"a limit of {megabytes} MB for clips", "give a number from 0")
    path = run.report_path
    run.files.publish_replace(path, page(report_facts.gather(run), megabytes).encode())
    return path


def page(facts: Facts, megabytes: float) -> str:
    """The whole page."""
    shelf = report_clips.Shelf(facts, int(megabytes * 1e6))
    try:
        evaluations, groups = report_clips.evaluations(facts, shelf), report_clips.groups(facts, shelf)
    finally:
        shelf.close()
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        name=escape(facts.run.path.resolve().name),
        about=_about(facts),
        tiles=_tiles(facts),
        alarms=_alarms(facts),
        reward=_reward(facts),
        components=_components(facts),
        training=_training(facts),
        advantages=_advantages(facts.of("rollout")),
        evaluations=evaluations,
        groups=groups,
        clips_note=_clips_note(shelf, megabytes),
        guards=_guards(facts),
        costs=_costs(facts.costs),
    )


def panel(title: str, chart: str, series: Sequence[Series] = (), note: str = "") -> str:
    """A chart with its title, a legend when it has several lines, and a line of explanation."""
    names = legend(series) if sum(bool(one.points) for one in series) > 1 else ""
    words = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<div class="panel"><h3>{escape(title)}</h3>{names}{chart}{words}</div>'


def _about(facts: Facts) -> str:
    config = facts.run.config
    rewards = ", ".join(f"{name} × {weight:g}" for name, weight in config.score.rewards.items())
    video = config.rollout
    beneath = [one for one in (config.model.base_lora, config.model.base_lora_2) if one]
    parts = [
        f"model {config.model.path}",
        *([f"base LoRA {', '.join(beneath)} × {config.model.base_lora_scale:g}"] if beneath else []),
        f"reward {rewards}",
        f"{video.width} × {video.height}, {video.frames} frames",
        f"{video.prompts_per_iteration} prompts × {video.group_size} videos an iteration",
        f"{video.law}, {video.steps} steps",
        config.train.objective.upper(),
    ]
    return " · ".join(escape(part) for part in parts)


def _tiles(facts: Facts) -> str:
    tiles = []
    for kind, title in (("eval", "Held-out reward"), ("rollout", "Training reward")):
        points = report_facts.error_points(facts.of(kind), "reward")
        if points:
            tiles.append(_reward_tile(title, points))
    rollouts = facts.of("rollout")
    seconds = sum(cost.seconds or 0.0 for cost in facts.costs)
    tiles.append(_tile("Iterations", str(rollouts["iteration"].nunique()), f"{len(rollouts)} videos sampled"))
    tiles.append(_tile("Time recorded", duration(seconds), "sampling, scoring and training, all workers added"))
    return "".join(tiles)


def _reward_tile(title: str, points: Sequence[Point]) -> str:
    first, last = points[0], points[-1]
    error = (last.high or last.y) - last.y
    change = f"{last.y - first.y:+.3f}".replace("-", "\N{MINUS SIGN}")
    since = (
        f"{change} since {number(first.y)} at iteration {first.x:.0f}" if len(points) > 1 else f"iteration {last.x:.0f}"
    )
    return _tile(title, f"{number(last.y)} <small>± {number(error, 2)}</small>", since)


def _tile(title: str, value: str, note: str) -> str:
    words = f'<p class="value">{value}</p><p class="muted">{escape(note)}</p>'
    return f'<div class="tile"><h2>{escape(title)}</h2>{words}</div>'


def _alarms(facts: Facts) -> str:
    found = report_facts.alarms(facts)
    if not found:
        return '<div class="alarms quiet"><b>No alarm.</b> Guards, groups and updates are within their limits.</div>'
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in found)
    return f'<div class="alarms loud" role="alert"><b>{len(found)} to look at</b><ul>{items}</ul></div>'


def _reward(facts: Facts) -> str:
    series = [
        Series(
            "training, mean and middle 80 % of the samples",
            "train",
            report_facts.middle_points(facts.of("rollout"), "reward"),
        ),
        Series(
            "held out, mean ± 1 standard error",
            "eval",
            report_facts.error_points(facts.of("eval"), "reward"),
            bars=True,
        ),
    ]
    return legend(series) + lines(series, label="Reward by iteration", width=1080, height=300)


def _components(facts: Facts) -> str:
    rollouts, evaluations = facts.of("rollout"), facts.of("eval")
    panels = []
    for name in report_facts.components(facts.samples):
        series = [
            Series("training", "train", report_facts.middle_points(rollouts, name)),
            Series("held out", "eval", report_facts.error_points(evaluations, name), bars=True),
        ]
        panels.append(panel(name, lines(series, label=f"{name} by iteration"), series))
    spread = [Series("spread", "train", report_facts.spread_points(rollouts))]
    note = "Standard deviation of the reward in a group, averaged: what there is to learn from."
    panels.append(
        panel("spread in a group", lines(spread, label="Spread in a group by iteration", include=[0.0]), note=note)
    )
    used = [Series("used", "train", report_facts.used_points(rollouts))]
    note = "Share of the groups that gave an advantage; groups without spread are dropped."
    panels.append(panel("groups used", lines(used, label="Groups used", include=[0.0, 1.0]), note=note))
    return "".join(panels)


def _training(facts: Facts) -> str:
    objective = facts.run.config.train.objective
    charts = [*CHARTS.get(objective, []), *CHARTS["every"]]
    panels = []
    for title, name, base, note in charts:
        series = [
            Series(
                EXPERT_LABELS.get(expert, expert),
                EXPERT_STYLES.get(expert, "train"),
                report_facts.update_points(facts.updates, expert, name, base),
            )
            for expert in report_facts.experts(facts.updates)
        ]
        if name in OPTIONAL and not any(one.points for one in series):
            continue
        chart = lines(series, label=f"{title} by update", include=[0.0], width=520)
        panels.append(panel(title, chart, series, note))
    return "".join(panels)


def _advantages(rollouts: pandas.DataFrame) -> str:
    """Histograms of the first and the last iteration that have advantages, on one axis."""
    import numpy

    used = rollouts[rollouts["weight"] > 0]
    if used.empty:
        return '<p class="empty">no advantages yet</p>'
    reach = max(1.0, float(used["advantage"].abs().max()))
    edges = [float(edge) for edge in numpy.linspace(-reach, reach, BINS + 1)]
    panels = []
    for iteration in sorted({int(used["iteration"].min()), int(used["iteration"].max())}):
        values = used[used["iteration"] == iteration]["advantage"]
        counts = [int(count) for count in numpy.histogram(values, edges)[0]]
        dropped = int((rollouts[rollouts["iteration"] == iteration]["weight"] == 0).sum())
        note = f"{len(values)} samples trained on, {dropped} left out."
        chart = histogram(counts, edges, style="train", label=f"Advantages of iteration {iteration}", width=520)
        panels.append(panel(f"iteration {iteration}", chart, note=note))
    return "".join(panels)


def _guards(facts: Facts) -> str:
    panels = []
    worst = {}
    for move in reversed(facts.moves):
        worst[move.guard] = move
    for column in report_facts.guards(facts.samples):
        name = column.removeprefix(f"{report_facts.GUARDS}.")
        series = [
            Series("training", "train", report_facts.error_points(facts.of("rollout"), column)),
            Series("held out", "eval", report_facts.error_points(facts.of("eval"), column), bars=True),
        ]
        start = next((one.points[0].y for one in series if one.points), 0.0)
        limit = diagnosis.GUARD_LIMIT * abs(start)
        chart = lines(series, label=f"{name} by iteration", zone=(start - limit, start + limit))
        panels.append(_guard_panel(name, chart, series, worst.get(name)))
    return "".join(panels) or '<p class="empty">no guard metrics yet: <code>rushes score</code> writes them</p>'


def _guard_panel(name: str, chart: str, series: Sequence[Series], move: Move | None) -> str:
    state, words = "calm", "within 20 %"
    if move is not None:
        state, words = ("alarm", str(move)) if move.alarm else ("unsure", f"{move}, but within noise")
    badge = f'<p class="badge {state}">{escape(words)}</p>'
    return f'<div class="panel"><h3>{escape(name)}</h3>{legend(series)}{chart}{badge}</div>'


def _costs(costs: Sequence[Cost]) -> str:
    rows = [_cost_row(cost) for cost in costs]
    for work in dict.fromkeys(cost.work for cost in costs):
        mine = [cost for cost in costs if cost.work == work]
        seconds = [cost.seconds for cost in mine if cost.seconds is not None]
        total = Cost(
            "all",
            work,
            sum(cost.videos or 0 for cost in mine) or None,
            sum(seconds) if len(seconds) == len(mine) else None,
            sum(cost.bytes or 0 for cost in mine) or None,
            max((cost.peak_bytes for cost in mine if cost.peak_bytes), default=None),
        )
        rows.append(_cost_row(total, "total"))
    head = "".join(f"<th>{name}</th>" for name in COST_COLUMNS)
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="costs">{body}</table></div>'


def _cost_row(cost: Cost, style: str = "") -> str:
    each = None if cost.seconds is None or not cost.videos else f"{number(cost.seconds / cost.videos)} s"
    cells = [
        cost.stage,
        cost.work,
        cost.videos,
        duration(cost.seconds),
        each,
        None if cost.bytes is None else f"{number(cost.bytes / 1e6)} MB",
        None if cost.peak_bytes is None else f"{number(cost.peak_bytes / 2**30)} GiB",
    ]
    text = "".join(f"<td>{'–' if cell is None else escape(str(cell))}</td>" for cell in cells)
    return f'<tr class="{style}">{text}</tr>'


def _clips_note(shelf: report_clips.Shelf, megabytes: float) -> str:
    shown = f"{shelf.shown} clips, {number(shelf.used / 1e6)} MB."
    if not shelf.left_out:
        return shown
    reason = f"the limit is {megabytes:g} MB and {report_clips.MOST_CLIPS} clips"
    return f'{shown} <span class="warn">{shelf.left_out} clips were left out: {reason}; --megabytes sets it.</span>'


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 4.2 s, 3 min 20 s, 5 h 12 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
