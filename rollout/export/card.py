"""The model card of an export: what the policy is, what it was rewarded for, how its reward went, how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.config import RunConfig
from shards.measures import Measure, measured
from shards.report.points import Point
from shards.report.svg import Series
from shards.report.svg import lines as line_chart
from shards.run import Run

_STYLE = (
    "text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}.hit{fill:none}.line{fill:none;stroke-width:2}"
    ".rollouts{stroke:#8a8f98}circle.rollouts{fill:#8a8f98}.evaluation{stroke:#0b6e4f}circle.evaluation{fill:#0b6e4f}"
)


@dataclass(frozen=True)
class Base:
    """What a card must know of the model below the policy."""

    name: str
    """What `from_pretrained` takes."""
    pipeline: str
    """The class that its model_index.json names."""
    shift: float | None
    """Flow shift of its own scheduler."""
    takes_image: bool


METHODS = {
    "grpo": "GRPO",
    "nft": "DiffusionNFT",
    "dpo": "Diffusion-DPO on pairs of its own videos",
    "sft": "supervised fine-tuning on its own best videos",
}


def model_card(run: Run, record: dict[str, Any], base: Base) -> str:
    """README.md of an export; `record` is its export.json."""
    config, iteration = run.config, record["iteration"]
    kind = "whole weights of both experts" if len(record["experts"]) == 2 else "whole weights"
    if not record["fused"]:
        kind = "a LoRA for each of two experts" if len(record["experts"]) == 2 else "a LoRA"
    weights = "averaged over the updates (EMA)" if record["average"] else "those of the last update"
    method = METHODS[config.train.objective]
    rewards = ", ".join(f"`{name}` × {weight:g}" for name, weight in config.score.rewards.items())
    name = run.path.resolve().name
    curve = ["![mean reward by iterations trained](reward.svg)", ""] if reward_curve(run, iteration) else []
    lines = [
        *_front_matter(base, record["fused"]),
        f"# {name}, iteration {iteration}",
        "",
        f"{kind[0].upper()}{kind[1:]}, trained with {method} by rushes, in the format of plain diffusers.",
        "",
        f"- Base model: `{config.model.path}`, fingerprint `{record['base'][:16]}`",
        f"- Run: `{name}`, policy of iteration {iteration}, fingerprint `{record['policy'][:16]}`; weights: {weights}",
        f"- Rewards: {rewards}",
        f"- Sampled in training with: {_sampling(config)}",
        f"- Checked: {record['checked']}",
        "",
        "## Load it",
        "",
        "```python",
        *_code(record, base, config),
        "```",
        "",
        "## Reward",
        "",
        *curve,
        *reward_table(run, iteration),
        "",
    ]
    return "\n".join(lines)


def reward_table(run: Run, iteration: int) -> list[str]:
    """Lines of a Markdown table: mean reward and its standard error, in rollouts and in evaluations, policy by policy.

    Row k is the policy after k iterations; 0 is the one the run began with. What was not measured is left open.
    """
    rows = [
        f"| {k} | {_text(rollout)} | {_text(evaluation)} |"
        for k, rollout, evaluation in _measures(run, iteration)
        if rollout or evaluation
    ]
    if not rows:
        return ["No reward was stored with this run."]
    head = ["| iterations trained | mean reward of the rollouts | mean reward of the evaluation |", "|-|-|-|"]
    return [*head, *rows, "", "The rollouts are noisy and of changing prompts; the evaluation is not, and counts."]


def reward_curve(run: Run, iteration: int) -> str:
    """The same as a chart, a whole SVG file with standard errors; empty when nothing was measured."""
    measures = list(_measures(run, iteration))
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


def _measures(run: Run, iteration: int) -> Iterator[tuple[int, Measure | None, Measure | None]]:
    """(iterations trained, measure of the rollouts, measure of the evaluation) up to the exported policy."""
    weights = run.config.score.rewards
    for k in range(iteration + 2):
        yield k, measured(run.iteration(k), weights), measured(run.evaluation(k), weights)


def _front_matter(base: Base, fused: bool) -> list[str]:
    """What model hubs read: the library, the kind of model, and the base where it is a hub's own name."""
    known = [] if Path(base.name).exists() else [f"base_model: {base.name}"]
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


def _code(record: dict[str, Any], base: Base, config: RunConfig) -> Sequence[str]:
    """A few lines of diffusers that run as they stand where the base model and this folder are."""
    folder, model, rollout = "." if record["fused"] else base.name, config.model, config.rollout
    lines = [
        f"import torch; from diffusers import {base.pipeline}, UniPCMultistepScheduler",
        f'pipe = {base.pipeline}.from_pretrained("{folder}", torch_dtype=torch.{model.dtype})',
    ]
    shift = config.eval.shift or rollout.shift
    if base.shift != shift:
        known = f"pipe.scheduler.config, flow_shift={shift:g}"
        lines.append(f"pipe.scheduler = UniPCMultistepScheduler.from_config({known})")
    else:
        lines[0] = lines[0].removesuffix(", UniPCMultistepScheduler")
    for name in () if record["fused"] else record["experts"]:
        second = ", load_into_transformer_2=True" if name == "low_noise" else ""
        lines.append(f'pipe.load_lora_weights("{name}", adapter_name="{name}"{second})')
    lines.append(f"video = pipe({', '.join(_call(record, base, config))}).frames[0]")
    return lines


def _call(record: dict[str, Any], base: Base, config: RunConfig) -> list[str]:
    """Arguments of the pipeline: those the policy was evaluated with."""
    model, rollout, evaluation = config.model, config.rollout, config.eval
    high = rollout.guidance_scale if evaluation.guidance_scale is None else evaluation.guidance_scale
    low = rollout.guidance_scale_2 if evaluation.guidance_scale_2 is None else evaluation.guidance_scale_2
    options = ["image", 'prompt="…"'] if base.takes_image else ['prompt="…"']
    if rollout.negative_prompt:
        options.append(f"negative_prompt={rollout.negative_prompt!r}")
    options += [f"height={rollout.height}", f"width={rollout.width}", f"num_frames={rollout.frames}"]
    options += [f"num_inference_steps={evaluation.steps}", f"guidance_scale={high:g}"]
    if len(record["experts"]) == 2 and low is not None:
        options.append(f"guidance_scale_2={low:g}")
    if model.text_length != 512:
        options.append(f"max_sequence_length={model.text_length}")
    return options


def base_name(run: Run, folder: Path) -> str:
    """What a reader gives to `from_pretrained`: model.path as it stands, or the folder of the embedded model."""
    path = run.config.model.path
    return str(folder) if path == "words" else str(Path(path).expanduser()) if Path(path).is_dir() else path
