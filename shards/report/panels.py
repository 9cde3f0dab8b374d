"""The charts of a report, each as HTML: rewards, what they are made of, updates, advantages, guards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from shards import diagnosis
from shards.config import TrainConfig
from shards.diagnosis import Move, number
from shards.report import facts as report_facts
from shards.report.facts import Facts
from shards.report.points import Point
from shards.report.shell import escape
from shards.report.svg import Series, histogram, legend, lines

if TYPE_CHECKING:
    import pandas

    from shards.records.updates import Update

BINS = 24
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
        ("KL", "kl", 0.0, "Distance to the reference policy; 0 throughout where train.kl_beta is 0."),
        ("gradient norm", "gradient_norm", 0.0, "Before clipping."),
        ("movement", "movement", 0.0, "Share of the way to the targets that the model has gone since the rollout."),
        ("signal", "signal", 0.0, "Cosine of the gradients of the two halves of an update; noise alone gives 0."),
    ],
}
SETTINGS = {  # by metric: the setting that it is read with
    "ratio_mean": "clip_range", "clip_fraction": "clip_range", "kl": "kl_beta", "gradient_norm": "max_grad_norm",
}  # fmt: skip
OPTIONAL = ("movement", "signal")  # metrics that not every objective has
AXES = {"videos": "videos sampled before", "updates": "updates before", "hours": "hours since the beginning"}


def panel(title: str, chart: str, series: Sequence[Series] = (), note: str = "") -> str:
    """A chart with its title, a legend when it has several lines, and a line of explanation."""
    names = legend(series) if sum(bool(one.points) for one in series) > 1 else ""
    words = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<div class="panel"><h3>{escape(title)}</h3>{names}{chart}{words}</div>'


def wide(series: Sequence[Series], label: str) -> str:
    """A chart over the whole width, and the same for a narrow screen, of which the style sheet shows one."""
    large = lines(series, label=label, width=1080, height=300, style="wide")
    small = lines(series, label=label, width=360, height=260, style="narrow")
    return f'<div class="card">{legend(series)}{large}{small if "<svg" in small else ""}</div>'


def reward_panels(facts: Facts) -> str:
    """The reward by iteration, and against what it cost."""
    rollouts, evaluations = facts.of("rollout"), facts.of("eval")
    training = report_facts.middle_points(rollouts, "reward")
    held_out = report_facts.error_points(evaluations, "reward")
    series = [
        Series("training, mean and middle 80 % of the samples", "train", training),
        Series("held out, mean ± 1 standard error", "eval", held_out, bars=True),
    ]
    panels = []
    for name, places in facts.places.items():
        moved = [
            Series("training", "train", at_places(report_facts.error_points(rollouts, "reward"), places)),
            Series("held out", "eval", at_places(held_out, places), bars=True),
        ]
        if not places:
            panels.append(panel(f"against {name}", "", note=OUT_OF_ORDER))
        elif len({p.x for one in moved for p in one.points}) > 1:
            chart = lines(moved, label=f"Reward by {AXES[name]}", x_label=AXES[name], whole_x=name != "hours")
            panels.append(panel(f"against {name}", chart, moved, AXIS_NOTES[name]))
    return wide(series, "Reward by iteration") + (f'<div class="panels">{"".join(panels)}</div>' if panels else "")


AXIS_NOTES = {
    "videos": "Of all iterations before; those of evaluations do not count.",
    "updates": "Optimizer steps of all experts.",
    "hours": "By the times of the files, pauses included; a copy of a run may have other times.",
}
OUT_OF_ORDER = (
    "The times of the files are not in the order of the iterations, as in a copy of a run. `cp -a` and `rsync -a` keep "
    "the times."
)


def at_places(points: Sequence[Point], places: Mapping[int, float]) -> list[Point]:
    """Points by iteration at other places of the x-axis; those without a place are left out."""
    return [
        Point(places[int(p.x)], p.y, p.low, p.high, f"iteration {p.x:.0f}, {number(places[int(p.x)])}")
        for p in points if int(p.x) in places
    ]  # fmt: skip


def component_panels(facts: Facts) -> str:
    """Every component of every reward, the spread in a group, and the share of the groups that were used."""
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
    return f'<div class="panels">{"".join(panels)}</div>'


def training_panels(facts: Facts) -> str:
    """One chart a metric, of the updates of those iterations that were trained with an objective that has it."""
    settings = {record["iteration"]: facts.settings[record["iteration"]] for record in facts.updates}
    objectives = list(dict.fromkeys(settings[k].objective for k in sorted(settings)))
    panels = []
    for objective in [*objectives, "every"]:
        mine = {k: one for k, one in settings.items() if objective in ("every", one.objective)}
        updates = [record for record in facts.updates if record["iteration"] in mine]
        for title, name, base, note in CHARTS[objective]:
            head = f"{title}, {objective}" if objective != "every" and len(objectives) > 1 else title
            panels.append(_metric(updates, head, name, base, f"{note} {_setting(mine, name)}".strip()))
    return f'<div class="panels">{"".join(panels)}</div>' if facts.updates else '<p class="empty">no updates yet</p>'


def _metric(updates: Sequence[Update], title: str, name: str, base: float, note: str) -> str:
    series = [
        Series(
            EXPERT_LABELS.get(expert, expert),
            EXPERT_STYLES.get(expert, "train"),
            report_facts.update_points(updates, expert, name, base),
        )
        for expert in report_facts.experts(updates)
    ]
    if name in OPTIONAL and not any(one.points for one in series):
        return ""
    return panel(title, lines(series, label=f"{title} by update", include=[0.0]), series, note)


def _setting(settings: Mapping[int, TrainConfig], metric: str) -> str:
    """The setting that a metric is read with, as each iteration was trained with it: the first iteration of each."""
    name = SETTINGS.get(metric)
    if name is None or not settings:
        return ""
    values = {k: getattr(settings[k], name) for k in sorted(settings)}
    firsts = [k for place, k in enumerate(values) if place == 0 or values[k] != list(values.values())[place - 1]]
    texts = [f"{values[k]:g}" + (f" from iteration {k}" if len(firsts) > 1 else "") for k in firsts]
    return f"train.{name}: {', '.join(texts)}."


def advantage_panels(rollouts: pandas.DataFrame) -> str:
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
        chart = histogram(counts, edges, style="train", label=f"Advantages of iteration {iteration}")
        panels.append(panel(f"iteration {iteration}", chart, note=note))
    return f'<div class="panels">{"".join(panels)}</div>'


def guard_panels(facts: Facts) -> str:
    """One chart a guard metric, with what is to be thought of its largest move."""
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
    none = '<p class="empty">no guard metrics yet: <code>rushes score</code> writes them</p>'
    return f'<div class="panels">{"".join(panels)}</div>' if panels else none


def _guard_panel(name: str, chart: str, series: Sequence[Series], move: Move | None) -> str:
    state, words = "calm", "within 20 %"
    if move is not None:
        state, words = ("alarm", str(move)) if move.alarm else ("unsure", f"{move}, but within noise")
    badge = f'<p class="badge {state}">{escape(words)}</p>'
    return f'<div class="panel"><h3>{escape(name)}</h3>{legend(series)}{chart}{badge}</div>'
