"""The tables of a report, each as HTML: evaluations prompt by prompt, settings, costs."""

from __future__ import annotations

from collections.abc import Sequence

from shards.diagnosis import number
from shards.process.progress import counted
from shards.report import paired
from shards.report.facts import Cost, Facts
from shards.report.paired import Evaluated
from shards.report.shell import escape
from shards.settings.frozen import flat
from shards.settings.history import Change, of_preset, setting_changes, written

COST_COLUMNS = ("stage", "work", "videos", "time", "per video", "shards", "peak memory")


def policy_table(facts: Facts) -> str:
    """Every evaluated policy against the first one, prompt by prompt; empty with fewer than one evaluation."""
    rows = paired.of_run(facts.run)
    if not rows:
        return ""
    head = ("after iterations", "videos", "reward", "± s.e.", "change", "± s.e.", "wins", "losses", "ties")
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in _policy(row))}</tr>" for row in rows)
    notes = [
        f"Iteration {row.iteration} was planned with another {', '.join(row.unlike[:4])}." for row in rows if row.unlike
    ]
    pairs = [row.paired for row in rows if row.paired]
    if pairs:
        first = f"Change: against the policy after {pairs[0].against}, on the same prompts and noise: the mean over"
        counts = "its standard error, and how many got better, worse, neither."
        notes.insert(0, f"{first} {counted(pairs[0].prompts, 'prompt')}, {counts}")
    words = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return f"{table('figures', head, body)}{words}"


def _policy(row: Evaluated) -> list[str]:
    cells = [str(row.iteration), str(row.videos), number(row.mean_reward, 4), number(row.standard_error, 2)]
    if row.paired is None:
        return [*cells, "not paired" if row.unlike else "–", *(["–"] * 4)]
    pair = row.paired
    change = "–" if pair.difference is None else f"{pair.difference:+.4f}".replace("-", "\N{MINUS SIGN}")
    return [*cells, change, number(pair.standard_error, 2), str(pair.wins), str(pair.losses), str(pair.ties)]


def settings_table(facts: Facts) -> str:
    """What changed over the iterations, and all of run.toml beside the preset it began from."""
    changes = setting_changes(facts.run)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{"; ".join(_change(one) for one in values)}</td></tr>'
        for name, values in changes.items()
    )
    moved = table("settings", ("setting", "values"), rows) if rows else ""
    none = '<p class="empty">No setting that an iteration keeps was changed since the first one.</p>'
    ours, preset = flat(facts.run.config), of_preset(facts.run)
    body = "".join(
        f'<tr{_other(name in preset and preset[name] != value)}><th scope="row">{escape(name)}</th>'
        f"<td>{escape(written(value))}</td><td>{escape(written(preset.get(name)))}</td></tr>"
        for name, value in ours.items()
    )
    whole = table("settings", ("setting", "run.toml", f"preset {facts.run.config.preset}"), body)
    count = sum(name in preset and preset[name] != value for name, value in ours.items())
    summary = f"<summary>All of run.toml <span class=muted>{count} other than the preset, marked</span></summary>"
    return f"{moved or none}<details>{summary}{whole}</details>"


def _other(marked: bool) -> str:
    return ' class="other"' if marked else ""


def _change(one: Change) -> str:
    where = "run.toml now" if one.iteration is None else f"from iteration {one.iteration}"
    return f'{escape(written(one.value))} <span class="muted">{where}</span>'


def table(style: str, head: Sequence[str], body: str) -> str:
    """A table that scrolls sideways where it is wider than the screen; `body` is HTML, `head` is text."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    inner = f"<thead><tr>{names}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="{style}">{inner}</table></div>'


def cost_table(found: Sequence[Cost]) -> str:
    """Time, size and memory of every stage, and of each kind of work together."""
    rows = [_cost_row(cost) for cost in found]
    for work in dict.fromkeys(cost.work for cost in found):
        mine = [cost for cost in found if cost.work == work]
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
    return table("costs", COST_COLUMNS, "".join(rows))


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


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 4.2 s, 3 min 20 s, 5 h 12 min."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
