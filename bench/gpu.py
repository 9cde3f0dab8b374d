"""Memory and time on a GPU against what was predicted, against bare forwards, and against WanPipeline.

    python bench/gpu.py --page docs/benchmarks.md        Wan2.1-1.3B at full size, random weights, bfloat16
    python bench/gpu.py --model a14b --frames 13         one expert of Wan2.2-A14B
    python bench/gpu.py --small                          the same path with a tiny model, on a CPU, in under a minute

We have not taken these figures on a GPU: the authors had none at hand. Only `--small` has been run by us, and its times
are those of Python, not of a model. What is compared, on the same prompts in the same process, after one whole warm-up:

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
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.learn import replace_section
from rollout.generate import rollout
from rollout.memory import plan_memory
from rollout.policy import Policy
from rollout.policy_folder import DTYPES
from rollout.policy_sizes import peak_bytes
from shards.config import ModelConfig, RolloutConfig, RunConfig, TrainConfig
from shards.files import publish_replace
from shards.reader import open_shard
from shards.run import Run, Stage
from shards.sidecar import write_advantages
from train.order import chunks
from train.run import train

MIB = 2**20
WORDS = ("FILM", "OPEN", "GATE", "SALE", "MOON", "BIRD", "LAMP", "RAIN")
COMMON = {"patch_size": (1, 2, 2), "in_channels": 16, "out_channels": 16, "cross_attn_norm": True}
FULL = {**COMMON, "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
MODELS: dict[str, dict[str, Any]] = {  # configurations as diffusers' convert_wan_to_diffusers.py writes them
    "1.3b": {**FULL, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "a14b": {**FULL, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "small": {**COMMON, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "num_attention_heads": 2,
              "ffn_dim": 64, "num_layers": 4, "rope_max_seq_len": 32},
}  # fmt: skip
SMALL_VAE = {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
SMALL = {"model": "small", "height": 32, "width": 32, "frames": 5, "steps": 4, "videos": 2, "text_length": 24}


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


def build(folder: Path, model: str, dtype: str, device: torch.device) -> Path:
    """Save a pipeline with a transformer of MODELS, random, full size; the text encoder has one layer."""
    torch.manual_seed(0)
    config = MODELS[model]
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**config).to(DTYPES[dtype])
    transformer.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            parameter.fill_(1.0) if "norm" in name and name.endswith("weight") else parameter.normal_(0.0, 0.02)
    text = UMT5Config(vocab_size=384, d_model=config["text_dim"], d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    WanPipeline(
        tokenizer=ByT5Tokenizer(),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(**(SMALL_VAE if model == "small" else {})),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def make_run(path: Path, folder: Path, arguments: argparse.Namespace) -> Run:
    """A run that samples and trains `prompts` groups on that model; the replay gate only measures."""
    prompts = path.parent / "prompts.txt"
    lines = [f'a sign that says "{WORDS[index % len(WORDS)]}", number {index}' for index in range(arguments.prompts)]
    publish_replace(prompts, "".join(line + "\n" for line in lines).encode())
    names = ("height", "width", "frames", "steps")
    shape = {name: getattr(arguments, name) for name in names}
    return Run.create(
        path,
        RunConfig(
            model=ModelConfig(path=str(folder), dtype=arguments.dtype, text_length=arguments.text_length),
            rollout=RolloutConfig(
                prompts=str(prompts), prompts_per_iteration=arguments.prompts, groups_per_shard=arguments.prompts,
                group_size=arguments.videos, batch_size=arguments.batch, high_steps=2, low_steps=0,
                guidance_scale=4.0, **shape,
            ),
            train=TrainConfig(
                lora_rank=arguments.rank, lora_alpha=2.0 * arguments.rank, gradient_checkpointing=True, kl_beta=0.0,
                updates_per_rollout=1, replay_samples=10**6, replay_limit=1e6, save_every=10**6,
            ),
        ),
    )  # fmt: skip


def iterate(run: Run, policy: Policy, count: bool) -> Iteration:
    """One iteration of a run by the real stages; `count` measures memory on a CPU too, which takes its time."""
    stage = run.iteration(0)
    _, sampling, sampling_peak = measured(policy, lambda: rollout(run, stage, policy), count)
    advise(stage)
    report, training, training_peak = measured(policy, lambda: train(run, 0, policy), count)
    records = [json.loads(line) for line in (stage.policy_dir / "metrics.jsonl").read_text().splitlines()]
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
        weights = sum(parameter.nbytes for parameter in policy.module(0).parameters())
        peak = weights + peak_bytes(lambda: results.append(function()), policy.module(0))
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
    policy.use(0)
    module: Any = policy.module(0)
    dtype, device = module.patch_embedding.weight.dtype, policy.device
    shape = policy.latent_shape(settings.height, settings.width, settings.frames)
    inputs = []
    for _, size in chunks(settings.group_size, settings.batch_size) * settings.prompts_per_iteration:
        x = torch.randn(size, *shape, device=device).to(dtype)
        text = torch.randn(size, run.config.model.text_length, module.config.text_dim, device=device).to(dtype)
        inputs.append((x, torch.full((size,), 500.0, device=device), text))
    return module, inputs


@torch.no_grad()
def bare_rollout(policy: Policy, run: Run) -> float:
    """Seconds of the forwards of a rollout, guidance included, and of the decoding of its videos, and nothing else."""
    module, inputs = passes(policy, run)
    vae: Any = policy._vae.to(policy.device)
    settings = run.config.rollout
    shape = policy.latent_shape(settings.height, settings.width, settings.frames)
    latents = torch.randn(1, *shape, device=policy.device)
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
    sync(policy)
    began = time.monotonic()
    for _ in range(run.config.rollout.high_steps):
        for one in inputs:
            velocity, other = (module(*one, return_dict=False)[0].float() for _ in range(2))
            (other + 4.0 * (velocity - other)).square().mean().backward()
    sync(policy)
    seconds = time.monotonic() - began
    module.disable_gradient_checkpointing()  # type: ignore[operator]
    module.zero_grad(set_to_none=True)
    return seconds


def pipeline_seconds(folder: Path, run: Run, device: torch.device) -> float:
    """Seconds of WanPipeline.__call__ for the same prompts, number of videos, steps and guidance."""
    settings = run.config.rollout
    dtypes = {"default": DTYPES[run.config.model.dtype], "vae": torch.float32}
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": settings.height, "width": settings.width, "num_frames": settings.frames}
    fixed = {**size, "guidance_scale": 4.0, "max_sequence_length": run.config.model.text_length, "output_type": "np"}

    def call(prompt: str, videos: int, steps: int) -> None:
        pipe(prompt=prompt, num_videos_per_prompt=videos, num_inference_steps=steps, **fixed)

    call("warm-up", settings.batch_size, 2)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.monotonic()
    for prompt in Path(settings.prompts).read_text(encoding="utf-8").splitlines():
        for _, videos in chunks(settings.group_size, settings.batch_size):
            call(prompt, videos, settings.steps)
    return time.monotonic() - began  # its result is on the host: nothing is left to wait for


def measure(arguments: argparse.Namespace, out: Path) -> str:
    """Everything, as the section of the page."""
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.small else "cpu")
    folder = build(out / "model", arguments.model, arguments.dtype, device)
    options = {"dtype": arguments.dtype, "device": str(device), "text_length": arguments.text_length}
    policy = Policy.load(folder, **options)
    warm = iterate(make_run(out / "warm", folder, arguments), policy, count=True)
    run = make_run(out / "timed", folder, arguments)
    done = iterate(run, policy, count=False)
    updates = bare_updates(policy, run)
    policy.become(None)
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
        f"{arguments.model} with random weights, {arguments.dtype}; {videos}; {shape}; LoRA of rank {arguments.rank}.",
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
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--model", choices=["1.3b", "a14b"], default="1.3b")
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
