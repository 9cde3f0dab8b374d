"""The model card of an export: what the policy is, what it was rewarded for, how its reward went, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.config import RunConfig
from shards.files import read_json
from shards.run import Run, Stage
from shards.sidecar import specifications


def model_card(run: Run, record: dict[str, Any], base: str, pipeline: str, takes_image: bool) -> str:
    """README.md of an export. `record`: its export.json; `base`: what `from_pretrained` takes; `pipeline`: a class."""
    config, iteration = run.config, record["iteration"]
    kind = "whole weights of both experts" if len(record["experts"]) == 2 else "whole weights"
    if not record["fused"]:
        kind = "a LoRA for each of two experts" if len(record["experts"]) == 2 else "a LoRA"
    weights = "averaged over the updates (EMA)" if record["average"] else "those of the last update"
    rewards = ", ".join(f"`{name}` × {weight:g}" for name, weight in config.score.rewards.items())
    name = run.path.resolve().name
    lines = [
        f"# {name}, iteration {iteration}",
        "",
        f"{kind[0].upper()}{kind[1:]}, trained with GRPO by rushes, in the format of plain diffusers.",
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
        *_code(record, base, pipeline, config, takes_image),
        "```",
        "",
        "## Reward",
        "",
        *reward_table(run, iteration),
        "",
    ]
    return "\n".join(lines)


def reward_table(run: Run, iteration: int) -> list[str]:
    """Lines of a Markdown table: mean reward and its standard error, in rollouts and in evaluations, policy by policy.

    Row k is the policy after k iterations; 0 is the one the run began with. What was not measured is left open.
    """
    rows = []
    for k in range(iteration + 2):
        cells = [_cell(run.config, stage) for stage in (run.iteration(k), run.evaluation(k))]
        if any(cells):
            rows.append(f"| {k} | {cells[0] or '-'} | {cells[1] or '-'} |")
    if not rows:
        return ["No reward was stored with this run."]
    head = ["| iterations trained | mean reward of the rollouts | mean reward of the evaluation |", "|-|-|-|"]
    return [*head, *rows, "", "The rollouts are noisy and of changing prompts; the evaluation is not, and counts."]


def _cell(config: RunConfig, stage: Stage) -> str:
    """Mean reward ± standard error (videos) of a stage, by the weights of run.toml; empty when there is none."""
    for name in specifications(stage):
        path = stage.advantage_dir(name) / "summary.json"
        summary = read_json(path) if path.is_file() else {}
        known = summary.get("specification", {}).get("weights") == dict(config.score.rewards)
        if known and summary.get("mean_reward") is not None:
            count = summary["samples"] - summary.get("missing", 0)
            error = (summary.get("std_reward") or 0.0) / max(1, count) ** 0.5
            return f"{summary['mean_reward']:.4f} ± {error:.4f} ({count} videos)"
    return ""


def _sampling(config: RunConfig) -> str:
    rollout = config.rollout
    guidance = f"{rollout.guidance_scale:g}"
    if rollout.guidance_scale_2 is not None:
        guidance += f" (high noise) and {rollout.guidance_scale_2:g} (low noise)"
    size = f"{rollout.height}x{rollout.width}, {rollout.frames} frames at {rollout.fps} a second"
    return f"{size}, {rollout.steps} steps, flow shift {rollout.shift:g}, guidance {guidance}, law {rollout.law}"


def _code(record: dict[str, Any], base: str, pipeline: str, config: RunConfig, takes_image: bool) -> Sequence[str]:
    """Five lines of diffusers or fewer; they run as they stand where the base model and this folder are."""
    folder, model, rollout = "." if record["fused"] else base, config.model, config.rollout
    lines = [
        f"import torch; from diffusers import {pipeline}",
        f'pipe = {pipeline}.from_pretrained("{folder}", torch_dtype=torch.{model.dtype})',
    ]
    for name in () if record["fused"] else record["experts"]:
        second = ", load_into_transformer_2=True" if name == "low_noise" else ""
        lines.append(f'pipe.load_lora_weights("{name}", adapter_name="{name}"{second})')
    options = [f"height={rollout.height}", f"width={rollout.width}", f"num_frames={rollout.frames}"]
    options += [f"num_inference_steps={config.eval.steps}", f"guidance_scale={rollout.guidance_scale:g}"]
    if len(record["experts"]) == 2 and rollout.guidance_scale_2 is not None:
        options.append(f"guidance_scale_2={rollout.guidance_scale_2:g}")
    if model.text_length != 512:
        options.append(f"max_sequence_length={model.text_length}")
    given = "image, " if takes_image else ""
    lines.append(f'video = pipe({given}prompt="…", {", ".join(options)}).frames[0]')
    return lines


def base_name(run: Run, folder: Path) -> str:
    """What a reader gives to `from_pretrained`: model.path as it stands, or the folder of the embedded model."""
    path = run.config.model.path
    return str(folder) if path == "words" else str(Path(path).expanduser()) if Path(path).is_dir() else path
