"""`rushes rollout --dry-run`: the plan of an iteration as a table, and its size, from configuration files alone."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from rollout.plan import check_prompts, stage_plan
from rollout.policy.folder import DTYPES, Layout, find_folder, read_layout
from rollout.policy.kernels.arithmetic import check_arithmetic
from rollout.ranks.device import find_device
from rollout.schedule import describe, step_scale
from shards.plan import RolloutPlan
from shards.records.schedule import Schedule
from shards.run import EXPERT_NAMES, Run, Stage

COLUMNS = ("step", "sigma", "t", "expert", "guidance", "law", "std", "trained", "gradient share")


def preview(run: Run, stage: Stage) -> str:
    """The plan of a stage for its first group, and how much the stage will write. Loads no weights, writes nothing.

    Raises UserError for everything that `rollout` would refuse before it samples, but for weights and LoRAs, which it
    does not look for.
    """
    layout = read_layout(find_folder(run.config.model.path, weights=False), weights=False)
    plan, model = stage_plan(run, stage, layout), run.config.model
    if plan.arithmetic.attention != "auto" or plan.arithmetic.compile:  # the device of other runs may be elsewhere
        check_arithmetic(plan.arithmetic, layout, model.dtype, find_device(model.device, model.dtype))
    notes = check_prompts(run, stage, layout) if stage.plan() is None else []
    group = plan.groups[0]
    lines = [*_table(plan.schedule, group.window), ""]
    window = ", ".join(map(str, group.window)) or "none"
    lines.append(f"window of the example, prompt {group.prompt_id}: steps {window}")
    lines += _too_noisy(plan)
    shares = ", ".join(f"{name} {share:.3f}" for name, share in gradient_shares(plan).items())
    lines.append(f"share of the gradient over all windows: {shares or 'none is trained'}")
    lines += [f"{name}: {value}" for name, value in _amounts(plan, layout).items()]
    lines += [f"note: {sentence}" for sentence in notes]
    return "\n".join(lines)


def gradient_shares(plan: RolloutPlan) -> dict[str, float]:
    """The share of the gradient that each expert gets over all groups of a stage, by the scales of the trained steps.

    Every expert has its own optimizer, and AdamW divides the scale out again; this tells how loud each one speaks.
    """
    schedule = plan.schedule
    scales = dict.fromkeys((EXPERT_NAMES[expert] for expert in sorted(set(schedule.experts))), 0.0)
    for group in plan.groups:
        for step in group.window:
            scales[EXPERT_NAMES[schedule.experts[step]]] += step_scale(schedule, step)
    total = sum(scales.values())
    return {name: scale / total for name, scale in scales.items()} if total else {}


def _too_noisy(plan: RolloutPlan) -> list[str]:
    """A word on the step of all windows that adds the most noise, where that is more than the next state may hold."""
    schedule = plan.schedule
    rows = describe(schedule, sorted({step for group in plan.groups for step in group.window}))
    worst = max(rows, key=lambda row: row["noise_share"])
    if worst["noise_share"] <= 1:
        return []
    return [
        f"note: step {worst['step']} adds noise of {worst['std']:.3f}, but the next state holds no more than "
        f"{schedule.sigmas[worst['step'] + 1]:.3f}; lower rollout.eta or rollout.last_step, or set rollout.form=exact"
    ]


def latent_bytes(plan: RolloutPlan, layout: Layout) -> int:
    """Bytes of the latents that a stage stores: states before and after each window step, and the last."""
    schedule = plan.schedule
    size = prod(layout.latent_shape(*plan.video.size))
    total = 0
    for group in plan.groups:
        states = {schedule.steps}.union(*({step, step + 1} for step in group.window))
        total += len(states) * size * DTYPES[plan.storage_dtype].itemsize
        if schedule.law == "dpm-sde-2m":
            total += len(group.window) * size * 4  # the clean estimate of the step before, fp32
    return total * plan.group_size


def _table(schedule: Schedule, window: Sequence[int]) -> list[str]:
    rows = [COLUMNS]
    for row in describe(schedule, window):
        trained = bool(row["trained"])
        rows.append(
            (
                str(row["step"]),
                f"{row['sigma']:.4f}",
                f"{row['timestep']:.1f}",
                row["expert"],
                f"{row['guidance']:g}",
                row["law"],
                f"{row['std']:.4f}",
                "yes" if trained else "no",
                f"{row['gradient_share']:.3f}" if trained else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _amounts(plan: RolloutPlan, layout: Layout) -> dict[str, str]:
    """What the stage will hold. The size of an mp4 depends on the picture, so only its raw size is given."""
    groups, size, shards = len(plan.groups), plan.group_size, len(plan.shards)
    videos, tokens = plan.samples, layout.tokens(*plan.video.size)
    raw = 3 * prod(plan.video.size) * videos
    latents = latent_bytes(plan, layout)
    return {
        "videos": f"{videos} ({groups} prompts, {size} each)",
        "batch": f"{min(plan.batch_size, size)} (videos in one forward pass, {tokens} tokens each)",
        "shards": str(shards),
        "bytes of latents": f"{latents} ({latents / 2**20:.1f} MiB; {latents / shards / 2**20:.1f} MiB a shard)",
        "bytes of videos before compression": f"{raw} ({raw / 2**20:.1f} MiB)",
    }
