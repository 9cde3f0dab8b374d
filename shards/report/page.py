"""The report of a run: one HTML file with everything in it, made from the files of the run alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shards.diagnosis import number
from shards.errors import UserError
from shards.process.progress import counted
from shards.report import clips as report_clips
from shards.report import facts as report_facts
from shards.report import panels, tables
from shards.report.facts import Facts
from shards.report.points import Point
from shards.report.shell import escape, shell
from shards.run import Run

MEGABYTES = 48  # of clips in a page: what a browser opens at once and a mail server lets pass
WORDS = {
    "reward": "Training prompts change with every iteration and are sampled with noise; held-out prompts and seeds "
    "stay the same, so theirs is the curve that counts. Iteration K is the policy after K iterations.",
    "components": "Every component of every reward, and whether the groups have something to teach.",
    "training": "One point per update of each expert. Hold the pointer over a point to read it.",
    "advantages": "Of the samples that were trained on, in the first and in the newest iteration.",
    "evaluations": "The same held-out prompt and the same initial noise through every evaluated policy: what each "
    "prompt gained, then the videos with their reward and the text read in the frames looked at.",
    "guards": "What a hacked reward changes first. The shaded range is ± 20 % around iteration 0 of training; held-out "
    "clips are compared with their own beginning. An alarm is a move beyond it by more than two standard errors; "
    "whiskers and bands are one.",
    "settings": "What the iterations were planned and trained with, where it did not stay the same.",
    "costs": "From the records of the shards and of the updates, added over workers. – is not recorded.",
}


def write_report(run: Run, megabytes: float = MEGABYTES) -> Path:
    """Write RUN/report/index.html and return its path; the same files give the same page.

    `megabytes` is the most that clips may take as they stand in the page; the page says how many were left out. Raises
    UserError when the run holds no shard, Damaged when a file of it is broken.
    """
    path = run.report_path
    run.files.publish_replace(path, page(run, megabytes).encode())
    return path


def page(run: Run, megabytes: float, version: str = "") -> str:
    """The whole page; with a `version` it follows the server that it comes from. Raises as `write_report` does."""
    if not megabytes >= 0:
        raise UserError(f"a limit of {megabytes} MB for clips", "give a number from 0")
    facts = report_facts.gather(run)
    shelf = report_clips.Shelf(facts, int(megabytes * 1e6))
    try:
        evaluations, groups = report_clips.evaluations(facts, shelf), report_clips.groups(facts, shelf)
    finally:
        shelf.close()
    left_out = _left_out(shelf, megabytes)
    clips = f"Best, median and worst of each group with reward, advantage A and the text read. {left_out}"
    parts = {
        "reward": ("Reward", panels.reward_panels(facts)),
        "components": ("Components", panels.component_panels(facts)),
        "training": ("Training", panels.training_panels(facts)),
        "advantages": ("Advantages", panels.advantage_panels(facts.of("rollout"))),
        "evaluations": ("First against last", tables.policy_table(facts) + evaluations),
        "groups": ("Groups", groups),
        "guards": ("Guards", panels.guard_panels(facts)),
        "settings": ("Settings", tables.settings_table(facts)),
        "costs": ("Costs", tables.cost_table(facts.costs)),
    }
    titled = {
        name: (label, f"<h2>{label}</h2><p>{clips if name == 'groups' else escape(WORDS[name])}</p>{text}")
        for name, (label, text) in parts.items()
    }
    head = f'<div class="tiles">{_tiles(facts)}</div>{_alarms(facts)}'
    return shell(run.path.resolve().name, _about(facts), titled, head, version=version)


def _about(facts: Facts) -> str:
    config = facts.run.config
    rewards = ", ".join(f"{name} × {weight:g}" for name, weight in config.score.rewards.items())
    video = config.rollout
    beneath = [one for one in (config.model.base_lora, config.model.base_lora_2) if one]
    trained = dict.fromkeys(facts.settings[k].objective.upper() for k in sorted(facts.settings))
    parts = [
        f"model {config.model.path}",
        *([f"base LoRA {', '.join(beneath)} × {config.model.base_lora_scale:g}"] if beneath else []),
        f"reward {rewards}",
        f"{video.width} × {video.height}, {video.frames} frames",
        f"{video.prompts_per_iteration} prompts × {video.group_size} videos an iteration",
        f"{video.law}, {video.steps} steps",
        " → ".join(trained) or config.train.objective.upper(),
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
    took = tables.duration(seconds)
    tiles.append(_tile("Time recorded", took, "sampling, scoring and training, all workers added"))
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
    """Loud, unsure or quiet; quiet is only what was measured and stayed within its limits."""
    found = report_facts.alarms(facts)
    if found:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in found)
        return f'<div class="alarms loud" role="alert"><b>{len(found)} to look at</b><ul>{items}</ul></div>'
    if facts.moves:
        items = "".join(f"<li>{escape(str(move))}, but within noise</li>" for move in facts.moves)
        moved = counted(len({move.guard for move in facts.moves}), "guard")
        text = f"<b>No alarm, but {moved} moved.</b> More prompts or iterations would tell."
        return f'<div class="alarms unsure">{text}<ul>{items}</ul></div>'
    if not report_facts.guards(facts.samples):
        text = (
            "<b>No alarm, but no guards either.</b> Groups and updates are within their limits; guards were not scored."
        )
        return f'<div class="alarms unsure">{text}</div>'
    return '<div class="alarms quiet"><b>No alarm.</b> Guards, groups and updates are within their limits.</div>'


def _left_out(shelf: report_clips.Shelf, megabytes: float) -> str:
    shown = f"{shelf.shown} clips, {number(shelf.used / 1e6)} MB."
    if not shelf.left_out:
        return shown
    reason = f"the limit is {megabytes:g} MB and {report_clips.MOST_CLIPS} clips"
    return f'{shown} <span class="warn">{shelf.left_out} clips were left out: {reason}; --megabytes sets it.</span>'
