"""Memory and time on a GPU against what was predicted, against bare forwards, and against WanPipeline.

    python bench/gpu.py --page docs/benchmarks.md        Wan2.1-1.3B at full size, random weights, bfloat16
    python bench/gpu.py --model a14b --frames 13         one expert of Wan2.2-A14B
    python bench/gpu.py --model i2v-a14b --frames 13     the same, image to video
    python bench/gpu.py --small                          the same path with a tiny model, on a CPU, in under a minute

We have not taken these figures on a GPU: the authors had none at hand. Only `--small` has been run by us, and its times
are those of Python, not of a model. What is compared, on the same prompts in the same process, after one whole warm-up
of each side:

- peak memory of rollout and training with what `rushes plan-memory` says;
- a rollout with the same number of bare forwards of the transformer and decodings of the VAE (goal: at most 1.03);
- the updates of LoRA training with bare forward and backward passes, checkpointing on (goal: at most 1.05);
- a rollout with WanPipeline.__call__;
- the largest |log-ratio| when training replays the rollout.

On a CPU peak memory is counted operator by operator, with what a GPU would leave on the host.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.gpu_models import MODELS, build, make_run
from bench.learn import replace_section
from rollout.memory.needs import plan_memory
from rollout.policy import Policy
from rollout.policy.folder import DTYPES
from rollout.policy.sizes import peak_bytes
from rollout.run import rollout
from shards.plan import spans
from shards.reader import open_shard
from shards.run import Run, Stage
from shards.sidecar import write_advantages
from train.run import train

MIB = 2**20
SMALL = {"height": 32, "width": 32, "frames": 5, "steps": 4, "videos": 2, "text_length": 24}


@dataclass(frozen=True)
class Iteration:
    """One rollout and one training: seconds, bytes, and the proof."""

    rollout: float
    rollout_peak: int
    updates: float
    train: float
    train_peak: int
    replay: float
    """Largest |log-ratio|."""


def iterate(run: Run, policy: Policy, count: bool) -> Iteration:
    """One iteration of a run by the real stages; `count` measures memory on a CPU too, which takes its time."""
    stage = run.iteration(0)
    _, sampling, sampling_peak = measured(policy, lambda: rollout(run, stage, policy), count)
    advise(stage)
    report, training, training_peak = measured(policy, lambda: train(run, 0, policy), count)
    records = [json.loads(line) for line in stage.metrics_path.read_text().splitlines()]
    updates = sum(record["seconds"] for record in records)
    assert report.replay is not None, "the gate runs on every first training"
    return Iteration(sampling, sampling_peak, updates, training, training_peak, report.replay)


def advise(stage: Stage) -> None:
    """Advantages of alternating sign: what they are does not matter to memory and time."""
    for number in stage.shards():
        frame = open_shard(stage, number).index[["key", "prompt_id", "sample"]].copy()
        signs = [1.0 if sample % 2 else -1.0 for sample in frame["sample"]]
        write_advantages(
            stage, number, "0a1b2c3d", frame.assign(advantage=signs, weight=1.0, reward=0.5, reason=""), {}
        )


def measured(policy: Policy, function: Callable[[], Any], count: bool) -> tuple[Any, float, int]:
    """(result, seconds, peak bytes on the device) of a call; without `count` a CPU has no peak."""
    results: list[Any] = []
    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(policy.device)
    sync(policy)
    began = time.monotonic()
    if count and not on_gpu:
        weights = sum(parameter.nbytes for parameter in policy.experts.module(0).parameters())
        peak = weights + peak_bytes(lambda: results.append(function()), policy.experts.module(0))
    else:
        results.append(function())
        sync(policy)
        peak = torch.cuda.max_memory_allocated(policy.device) if on_gpu else 0
    return results[0], time.monotonic() - began, peak


def sync(policy: Policy) -> None:
    """Wait until the device has done what it was told."""
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)


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
    vae.decode(latents, return_dict=False)
    sync(policy)
    began = time.monotonic()
    for _ in range(2 * settings.steps):
        for one in inputs:
            module(*one, return_dict=False)
    for _ in range(settings.group_size * settings.prompts_per_iteration):
        vae.decode(latents, return_dict=False)
    sync(policy)
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
    sync(policy)
    began = time.monotonic()
    for _ in range(run.config.rollout.high_steps):
        for one in inputs:
            backward(one)
    sync(policy)
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.monotonic()
    for row in rows:
        for _, videos in spans(settings.group_size, settings.batch_size):
            call(row["prompt"], videos, settings.steps)
    return time.monotonic() - began  # its result is on the host: nothing is left to wait for


def measure(arguments: argparse.Namespace, out: Path) -> str:
    """Everything, as the section of the page."""
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.small else "cpu")
    folder = build(out / "model", arguments.model, arguments.dtype, device, arguments.small)
    options = {"dtype": arguments.dtype, "device": str(device), "text_length": arguments.text_length}
    policy = Policy.load(folder, **options)
    warm = iterate(make_run(out / "warm", folder, arguments), policy, count=True)
    run = make_run(out / "timed", folder, arguments)
    done = iterate(run, policy, count=False)
    updates = bare_updates(policy, run)
    policy.experts.become(None)
    sampling = bare_rollout(policy, run)
    policy.release()
    needs = {need.stage: need.device for need in plan_memory(run)}
    sampled = max(needs[stage] for stage in ("encode prompts", "rollout", "decode"))
    trained = needs["train LoRA, checkpointing"]
    rows = [
        ("peak memory of the rollout, MiB", warm.rollout_peak / MIB, "plan-memory", sampled / MIB, ""),
        ("peak memory of training, MiB", warm.train_peak / MIB, "plan-memory", trained / MIB, ""),
        ("rollout, s", done.rollout, "bare forwards and decoding", sampling, "at most 1.03"),
        ("updates, s", done.updates, "bare forwards and backwards", updates, "at most 1.05"),
        ("rollout, s", done.rollout, "WanPipeline.__call__", pipeline_seconds(folder, run, device), ""),
    ]  # fmt: skip
    return render(arguments, device, rows, done)


def render(
    arguments: argparse.Namespace, device: torch.device, rows: list[tuple[str, float, str, float, str]], done: Iteration
) -> str:
    """The table, and above it what was run where."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    videos = f"{arguments.prompts} prompts, {arguments.videos} videos each, batch {arguments.batch}"
    shape = f"{arguments.height}x{arguments.width}, {arguments.frames} frames, {arguments.steps} steps"
    lines = [
        f"`python bench/gpu.py {' '.join(arguments.command)}` on {name}, torch {torch.__version__}: model "
        f"{'small ' if arguments.small else ''}{arguments.model} with random weights, {arguments.dtype}; {videos}; "
        f"{shape}; LoRA of rank {arguments.rank}.",
        "",
    ]
    if device.type == "cpu":
        lines += [
            "Not taken on a GPU: this only shows that the benchmark runs; its ratios say nothing about a GPU.",
            "",
        ]
    lines += ["| rushes | | against | | ratio | goal |", "|-|-|-|-|-|-|"]
    for what, ours, other, theirs, goal in rows:
        lines.append(f"| {what} | {ours:.3f} | {other} | {theirs:.3f} | {ours / theirs:.3f} | {goal} |")
    lines += ["", f"Largest |log-ratio| of the replay: {done.replay:.3g}. The whole training stage, with the replay of "
              f"every transition and the writing of the policy: {done.train:.1f} s."]  # fmt: skip
    return "\n".join(lines) + "\n"


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; --small replaces model and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny layers and videos, on the CPU")
    parser.add_argument("--model", choices=sorted(MODELS), default="1.3b")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    numbers = {"height": 480, "width": 832, "frames": 33, "steps": 10, "prompts": 2, "videos": 2, "batch": 1}
    for name, value in (numbers | {"rank": 32, "text-length": 512}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="keep model and runs in this folder, which must not exist")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    arguments = parser.parse_args(words)
    arguments.command = words
    if arguments.small:
        vars(arguments).update(SMALL)
    return arguments


def main(words: list[str] | None = None) -> None:
    """Measure, print the table, and write it into the page if one is named."""
    arguments = parse(sys.argv[1:] if words is None else words)
    diffusers_logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out = arguments.out or Path(tempfile.mkdtemp(prefix="rushes-gpu-"))
    out.mkdir(parents=True, exist_ok=arguments.out is None)
    try:
        text = measure(arguments, out)
    finally:
        if arguments.out is None:
            shutil.rmtree(out)
    print(text)
    if arguments.page is not None:
        replace_section(arguments.page, "gpu", text)


if __name__ == "__main__":
    main()
