"""One iteration by the real stages, in seconds and bytes, and the same work as bare calls of model and VAE."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from rollout.policy import Policy
from rollout.policy.folder import DTYPES
from rollout.policy.sizes import peak_bytes
from rollout.run import rollout
from shards.plan import spans
from shards.reader import open_shard
from shards.run import Run, Stage
from shards.sidecar import write_advantages
from train.run import train


@dataclass(frozen=True)
class Measured:
    """A stage that was run."""

    seconds: float
    allocated: int = 0
    """Bytes of tensors alive at the peak; 0 where they were not counted."""
    reserved: int = 0
    """Bytes that PyTorch had taken from the device at its peak; 0 on a CPU."""


@dataclass(frozen=True)
class Iteration:
    """One rollout and one training."""

    rollout: Measured
    train: Measured
    updates: float
    """Seconds of the updates alone."""
    replay: float
    """Largest |log-ratio|."""
    ratios: tuple[float, float]
    """Smallest and largest ratio in the first update."""


def iterate(run: Run, policy: Policy, count: bool) -> Iteration:
    """One iteration of a run; `count` measures memory of the rollout on a CPU too, operator by operator."""
    stage = run.iteration(0)
    _, sampling = measured(policy, lambda: rollout(run, stage, policy), count)
    advise(stage)
    report, training = measured(policy, lambda: train(run, 0, policy), False)
    records = records_of(stage)
    updates = sum(record["seconds"] for record in records)
    assert report.replay is not None, "the gate runs on every first training"
    return Iteration(sampling, training, updates, report.replay, first_ratios(records))


def records_of(stage: Stage) -> list[dict[str, Any]]:
    """The metrics of every update of an iteration."""
    return [json.loads(line) for line in stage.metrics_path.read_text(encoding="utf-8").splitlines()]


def first_ratios(records: list[dict[str, Any]]) -> tuple[float, float]:
    """Smallest and largest ratio in the first updates of all experts: both are 1 unless replay and update differ."""
    first = [record for record in records if record["update"] == 1]
    return min(record["ratio_min"] for record in first), max(record["ratio_max"] for record in first)


def advise(stage: Stage) -> None:
    """Advantages of alternating sign: what they are does not matter to memory and time."""
    for number in stage.shards():
        frame = open_shard(stage, number).index[["key", "prompt_id", "sample"]].copy()
        signs = [1.0 if sample % 2 else -1.0 for sample in frame["sample"]]
        write_advantages(
            stage, number, "0a1b2c3d", frame.assign(advantage=signs, weight=1.0, reward=0.5, reason=""), {}
        )


def measured(policy: Policy, function: Callable[[], Any], count: bool) -> tuple[Any, Measured]:
    """A call and what it took; without `count` a CPU has no peak."""
    results: list[Any] = []
    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(policy.device)
    sync(policy.device)
    began, peak, reserved = time.monotonic(), 0, 0
    if count and not on_gpu:
        weights = sum(parameter.nbytes for parameter in policy.experts.module(0).parameters())
        peak = weights + peak_bytes(lambda: results.append(function()), policy.experts.module(0))
    else:
        results.append(function())
        sync(policy.device)
    seconds = time.monotonic() - began
    if on_gpu:
        peak, reserved = torch.cuda.max_memory_allocated(policy.device), torch.cuda.max_memory_reserved(policy.device)
    return results[0], Measured(seconds, peak, reserved)


def sync(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def passes(policy: Policy, run: Run) -> tuple[nn.Module, list[tuple[Tensor, Tensor, Tensor]]]:
    """The expert on its device, and what one step of every chunk of the run gives it."""
    settings = run.config.rollout
    policy.experts.use(0)
    module: Any = policy.experts.module(0)
    dtype, device = module.patch_embedding.weight.dtype, policy.device
    shape = policy.layout.latent_shape(settings.height, settings.width, settings.frames)
    shape = (int(module.config.in_channels), *shape[1:])  # with the condition of an image, where the model takes one
    inputs = []
    for _, size in spans(settings.group_size, settings.batch_size) * settings.prompts_per_iteration:
        x = torch.randn(size, *shape, device=device).to(dtype)
        text = torch.randn(size, run.config.model.text_length, module.config.text_dim, device=device).to(dtype)
        inputs.append((x, torch.full((size,), 500.0, device=device), text))
    return module, inputs


@torch.no_grad()
def bare_rollout(policy: Policy, run: Run) -> float:
    """Seconds of the forwards of a rollout, guidance included, and of the decoding of its videos, and nothing else."""
    module, inputs = passes(policy, run)
    vae: Any = policy.vae._vae.to(policy.device)
    settings = run.config.rollout
    shape = policy.layout.latent_shape(settings.height, settings.width, settings.frames)
    latents = torch.randn(1, *shape, device=policy.device)
    module(*inputs[0], return_dict=False)  # a warm-up: the rollout had its own
    sync(policy.device)
    began = time.monotonic()
    for _ in range(2 * settings.steps):
        for one in inputs:
            module(*one, return_dict=False)
    for _ in range(settings.group_size * settings.prompts_per_iteration):
        vae.decode(latents, return_dict=False)
    sync(policy.device)
    seconds = time.monotonic() - began
    vae.to("cpu")
    return seconds


def bare_updates(policy: Policy, run: Run) -> float:
    """Seconds of the forwards, two for guidance, and backwards of an iteration's updates; the adapter must be on."""
    module, inputs = passes(policy, run)
    module.enable_gradient_checkpointing()  # type: ignore[operator]

    def backward(one: tuple[Tensor, Tensor, Tensor]) -> None:
        velocity, other = (module(*one, return_dict=False)[0].float() for _ in range(2))
        (other + 4.0 * (velocity - other)).square().mean().backward()

    backward(inputs[0])  # a warm-up: training had its own
    sync(policy.device)
    began = time.monotonic()
    for _ in range(run.config.rollout.high_steps):
        for one in inputs:
            backward(one)
    sync(policy.device)
    seconds = time.monotonic() - began
    module.disable_gradient_checkpointing()  # type: ignore[operator]
    module.zero_grad(set_to_none=True)
    return seconds


def pipeline_seconds(folder: Path, run: Run, device: torch.device) -> float:
    """Seconds of WanPipeline.__call__ for the same prompts, number of videos, steps and guidance."""
    settings = run.config.rollout
    dtypes = {"default": DTYPES[run.config.model.dtype], "vae": torch.float32}
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtypes, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": settings.height, "width": settings.width, "num_frames": settings.frames}
    fixed = {**size, "guidance_scale": 4.0, "max_sequence_length": run.config.model.text_length, "output_type": "np"}
    rows = [json.loads(line) for line in Path(settings.prompts).read_text(encoding="utf-8").splitlines()]
    if "image" in rows[0]:
        fixed["image"] = Image.open(Path(settings.prompts).parent / rows[0]["image"])

    def call(prompt: str, videos: int, steps: int) -> None:
        pipe(prompt=prompt, num_videos_per_prompt=videos, num_inference_steps=steps, **fixed)

    call("warm-up", min(settings.batch_size, settings.group_size), 2)
    sync(device)
    began = time.monotonic()
    for row in rows:
        for _, videos in spans(settings.group_size, settings.batch_size):
            call(row["prompt"], videos, settings.steps)
    return time.monotonic() - began  # its result is on the host: nothing is left to wait for
