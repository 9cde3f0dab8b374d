"""The model card of an export: what the policy is, what it was rewarded for, how its reward went, how to load it."""

from __future__ import annotations

from collections.abc import Iterator

from rollout.export.model_card_code import Base, ExportRecord, code, comfyui
from shards.config import RunConfig
from shards.measures import Measure, measured
from shards.process.progress import counted
from shards.report.points import Point
from shards.report.svg import Series
from shards.report.svg import lines as line_chart
from shards.run import Run

_STYLE = (
    "text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}.hit{fill:none}.line{fill:none;stroke-width:2}"
    ".rollouts{stroke:#8a8f98}circle.rollouts{fill:#8a8f98}.evaluation{stroke:#0b6e4f}circle.evaluation{fill:#0b6e4f}"
)


METHODS = {
    "grpo": "GRPO",
    "nft": "DiffusionNFT",
    "dpo": "Diffusion-DPO on pairs of its own videos",
    "sft": "supervised fine-tuning on its own best videos",
}


def model_card(run: Run, record: ExportRecord, base: Base) -> str:
    """README.md of an export; `record` is its export.json."""
    config, iterations = run.config, record["iterations"]
    kind = "whole weights of both experts" if len(record["experts"]) == 2 else "whole weights"
    if not record["fused"]:
        kind = "a LoRA for each of two experts" if len(record["experts"]) == 2 else "a LoRA"
    weights = "averaged over the updates (EMA)" if record["average"] else "those of the last update"
    method = METHODS[config.train.objective]
    keys = "with the keys of ComfyUI" if record["format"] == "comfyui" else "in the format of plain diffusers"
    rewards = ", ".join(f"`{name}` × {weight:g}" for name, weight in config.score.rewards.items())
    name = run.path.resolve().name
    curve = ["![mean reward by iterations trained](reward.svg)", ""] if reward_curve(run, iterations) else []
    lines = [
        *_front_matter(base, record["fused"]),
        f"# {name}, iteration {iterations}",
        "",
        f"{kind[0].upper()}{kind[1:]}, trained with {method} by rushes, {keys}.",
        "",
        f"- Base model: `{base.name}`, fingerprint `{record['model'][:16]}`",
        *_beneath(record),
        f"- Run: `{name}`, policy after {counted(iterations, 'iteration')}, fingerprint `{record['policy'][:16]}`; "
        f"weights: {weights}",
        f"- Rewards: {rewards}",
        f"- Sampled in training with: {_sampling(config)}",
        f"- Checked: {record['checked']}",
        "",
        *(comfyui(record, base, config) if record["format"] == "comfyui" else []),
        "## Load it" if record["format"] == "diffusers" else "## The same in diffusers",
        "",
        *code(record, base, config),
        "",
        "## Reward",
        "",
        *curve,
        *reward_table(run, iterations),
        "",
    ]
    return "\n".join(lines)


def _beneath(record: ExportRecord) -> list[str]:
    """A line on the LoRA that was beneath the policy: needed with a LoRA, contained in whole weights."""
    base_lora = record.get("base_lora")
    if base_lora is None:
        return []
    files = ", ".join(
        f"`{name}` ({side}, sha256 `{base_lora['files'][side]['weights'][:16]}`)"
        for side, name in base_lora["names"].items()
    )
    use = "merged in" if record["fused"] else "**needed beneath it**"
    return [f"- Base LoRA, {use}: {files}, strength {base_lora['scale']:g}"]


def reward_table(run: Run, iterations: int) -> list[str]:
    """Lines of a Markdown table: mean reward and its standard error, in rollouts and in evaluations, policy by policy.

    Row k is the policy after k iterations; 0 is the one the run began with. What was not measured is left open.
    """
    rows = [
        f"| {k} | {_text(rollout)} | {_text(evaluation)} |"
        for k, rollout, evaluation in _measures(run, iterations)
        if rollout or evaluation
    ]
    if not rows:
        return ["No reward was stored with this run."]
    head = ["| iterations trained | mean reward of the rollouts | mean reward of the evaluation |", "|-|-|-|"]
    return [*head, *rows, "", "The rollouts are noisy and of changing prompts; the evaluation is not, and counts."]


def reward_curve(run: Run, iterations: int) -> str:
    """The same as a chart, a whole SVG file with standard errors; empty when nothing was measured."""
    measures = list(_measures(run, iterations))
    rollouts = [_point(k, one) for k, one, _ in measures if one is not None]
    evaluation = [_point(k, one) for k, _, one in measures if one is not None]
    series = [Series("rollouts", "rollouts", rollouts, bars=True)]
    series.append(Series("evaluation", "evaluation", evaluation, bars=True))
    if not any(one.points for one in series):
        return ""
    chart = line_chart(series, label="mean reward by iterations trained", x_label="iterations trained", width=480)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="480" height="210"><style>{_STYLE}</style>'
    return head + chart + "</svg>\n"


def _text(one: Measure | None) -> str:
    return "-" if one is None else f"{one.mean:.4f} ± {one.error:.4f} ({one.samples} videos)"


def _point(k: int, one: Measure) -> Point:
    return Point(k, one.mean, one.mean - one.error, one.mean + one.error)


def _measures(run: Run, iterations: int) -> Iterator[tuple[int, Measure | None, Measure | None]]:
    """(iterations trained, measure of the rollouts, measure of the evaluation) up to the exported policy."""
    weights = run.config.score.rewards
    for k in range(iterations + 1):
        yield k, measured(run.iteration(k), weights), measured(run.evaluation(k), weights)


def _front_matter(base: Base, fused: bool) -> list[str]:
    """What model hubs read: the library, the kind of model, and the base where it is a hub's own name."""
    known = [f"base_model: {base.name}"] if "/" in base.name else []
    kind = "image-to-video" if base.takes_image else "text-to-video"
    tags = [] if fused else ["tags: [lora]"]
    return ["---", "library_name: diffusers", f"pipeline_tag: {kind}", *known, *tags, "---", ""]


def _sampling(config: RunConfig) -> str:
    rollout = config.rollout
    guidance = f"{rollout.guidance_scale:g}"
    if rollout.guidance_scale_2 is not None:
        guidance += f" (high noise) and {rollout.guidance_scale_2:g} (low noise)"
    size = f"{rollout.height}x{rollout.width}, {rollout.frames} frames at {rollout.fps} a second"
    return f"{size}, {rollout.steps} steps, flow shift {rollout.shift:g}, guidance {guidance}, law {rollout.law}"
