"""A tiny run on disk for tests: plan, samples, committed shards, scores. NumPy only unless a torch dtype is asked."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shards.files import Files
from shards.plan import RolloutPlan, group_key, sample_key
from shards.run import Run, Stage
from shards.spool import Sample, write_group, write_samples
from shards.writer import seal

STEPS = 4
SIGMAS = [1.0, 0.875, 0.625, 0.25, 0.0]
WINDOW = [1, 2]
STATES = [1, 2, 3, 4]  # i and i + 1 of the window, and the last
SHAPE = (2, 2, 3, 4)  # C, F, H, W of a latent
TEXT = 6  # width of a text embedding


def make_plan(
    iteration: int = 0,
    *,
    groups: int = 2,
    group_size: int = 3,
    groups_per_shard: int = 1,
    prompt: str = "a cat",
    **extra: Any,
) -> dict[str, Any]:
    """What plan.json of a stage holds; `extra` replaces top-level values."""
    keys = [group_key(iteration, prompt_id) for prompt_id in range(groups)]
    sampler = {"law": "flow-sde", "form": "exact", "eta": 0.7, "solver": "euler", "sigmas": SIGMAS}
    sampler |= {
        "timesteps": [1000 * sigma for sigma in SIGMAS[:-1]],
        "experts": [0, 0, 1, 1],
        "guidance": [4.0] * STEPS,
    }
    return {
        "schema": 1,
        "kind": "rollout",
        "iteration": iteration,
        "seed": 0,
        "policy": {"fingerprint": "f" * 64, "base": "b" * 64, "adapters": {}, "lag_of": iteration},
        "sampler": sampler,
        "video": {"height": 32, "width": 64, "frames": 5, "fps": 16, "crf": 12},
        "storage_dtype": "float32",
        "group_size": group_size,
        "batch_size": group_size,
        "negative_prompt": "",
        "groups": [
            {"key": key, "prompt_id": n, "prompt": f"{prompt} {n}", "target": "FILM", "image": None, "window": WINDOW}
            for n, key in enumerate(keys)
        ],
        "shards": [keys[start : start + groups_per_shard] for start in range(0, groups, groups_per_shard)],
        "same_initial_noise": False,
    } | extra


def plan_of(content: dict[str, Any]) -> RolloutPlan:
    """The record of what plan.json holds."""
    return RolloutPlan.from_json(json.dumps(content).encode(), "plan.json")


def make_sample(stage: Stage, group: str, sample: int, *, dtype: Any = "float32", video: bytes | None = None) -> Sample:
    """A finished sample whose numbers follow from its key. `dtype`: NumPy's name, or torch's own."""
    plan = stage.plan()
    assert plan is not None
    entry = plan.by_key[group]
    key = sample_key(group, sample)
    seed = plan.iteration * 10_000 + entry.prompt_id * 100 + sample
    log_prob = [-1.0 - sample / 8, -1.5 - sample / 8]
    meta = {
        "schema": 1,
        "key": key,
        "iteration": plan.iteration,
        "prompt_id": entry.prompt_id,
        "group": group,
        "sample": sample,
        "prompt": entry.prompt,
        "target": entry.target,
        "negative_prompt": plan.negative_prompt,
        "chunk": [0, plan.group_size],
        "seed": plan.seed,
        "noise_seeds": {"initial": 7_000_000 + seed, "1": 2**62 + seed, "2": 2**61 + seed},
        "policy": plan.policy.fingerprint,
        "plan_sha256": stage.plan_sha256(),
        **asdict(plan.schedule),
        **{name: getattr(plan.video, name) for name in ("height", "width", "frames", "fps")},
        "window": WINDOW,
        "log_prob": log_prob,
        "states": STATES,
        "text": group,
        "status": "ok",
        "seconds": 0.5,
        "host": "test",
    }
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {
        "latents": _cast(rng.standard_normal((len(STATES), *SHAPE)).astype(np.float32), dtype),
        "states": np.array(STATES, np.int32),
        "step_index": np.array(WINDOW, np.int32),
        "log_prob": np.array(log_prob, np.float32),
        "sigmas": np.array(SIGMAS, np.float32),
        "timesteps": np.array(plan.schedule.timesteps, np.float32),
        "experts": np.array(plan.schedule.experts, np.uint8),
        "guidance": np.array(plan.schedule.guidance, np.float32),
    }
    return Sample(key, meta, make_video(seed) if video is None else video, tensors)


def make_group(group: str, *, dtype: Any = "float32") -> dict[str, Any]:
    """Text embeddings of a group: prompt [4, D] and negative [2, D]."""
    rng = np.random.default_rng(int(group[-6:]))
    sizes = {"prompt": 4, "negative": 2}
    return {name: _cast(rng.standard_normal((size, TEXT)).astype(np.float32), dtype) for name, size in sizes.items()}


@lru_cache(maxsize=64)
def make_video(seed: int, frames: int = 5) -> bytes:
    """An mp4 of a coloured gradient that moves, 32x64, 16 frames per second."""
    from shards.video import encode_mp4

    rows, columns = np.mgrid[0:32, 0:64]
    moving = [
        np.stack([rows * 7 + 9 * t, columns * 3 + seed, rows + columns + t], axis=-1) % 256 for t in range(frames)
    ]
    return encode_mp4(np.stack(moving).astype(np.uint8), fps=16, crf=12)


def fill(stage: Stage, shard: int, **options: Any) -> None:
    """Spool all samples and group tensors of one shard; `options` go to make_sample."""
    plan = stage.plan()
    assert plan is not None
    for group in stage.groups(shard):
        write_group(stage, shard, group, make_group(group))
        for sample in range(plan.group_size):
            write_samples(stage, shard, make_sample(stage, group, sample, **options))


def planned_stage(
    run_path: str | Path, iteration: int = 0, *, evaluation: bool = False, files: Files | None = None, **plan: Any
) -> Stage:
    """A stage with a plan and nothing else; `plan` goes to make_plan."""
    run = Run(run_path, files=files)
    stage = run.evaluation(iteration) if evaluation else run.iteration(iteration)
    stage.publish_plan(plan_of(make_plan(iteration, **plan) | {"kind": stage.kind}))
    return stage


def committed_stage(run_path: str | Path, iteration: int = 0, *, dtype: Any = "float32", **options: Any) -> Stage:
    """A stage with all its shards committed (2 shards of 3 samples unless the plan says otherwise).

    `options` go to planned_stage.
    """
    stage = planned_stage(run_path, iteration, **options)
    for shard in range(stage.expected()):
        fill(stage, shard, dtype=dtype)
        assert seal(stage, shard, {"host": "test"})
    return stage


def write_train_plan(stage: Stage, advantage: str = "aaaaaaaa", train: dict[str, Any] | None = None) -> None:
    """What training froze: these advantages and settings, and no shards."""
    plan = {"schema": 1, "iteration": stage.iteration, "plan_sha256": "0" * 64, "policy": "f" * 64, "shards": {}}
    plan |= {"advantage": advantage, "order_seed": 0, "train": train or {}}
    stage.train_dir.mkdir(parents=True, exist_ok=True)
    stage.train_plan_path.write_text(json.dumps(plan), encoding="utf-8")


def score_frame(stage: Stage, shard: int) -> Any:
    """A frame for write_scores: reward and one component `accuracy` that rise with the sample number."""
    import pandas as pd

    keys = stage.keys(shard)
    samples = [int(key.rpartition("s")[2]) for key in keys]
    frame = pd.DataFrame({"key": keys, "prompt_id": [int(key[9:15]) for key in keys], "sample": samples})
    rewards = [sample / 10 for sample in samples]
    return frame.assign(reward=rewards, status="ok", accuracy=rewards, text='["FILM"]')


def advantage_frame(stage: Stage, shard: int) -> Any:
    """A frame for write_advantages: symmetric advantages, weight 1."""
    frame = score_frame(stage, shard)[["key", "prompt_id", "sample", "reward"]]
    middle = frame["sample"].mean()
    return frame.assign(advantage=frame["sample"] - middle, weight=1.0, reason="")


def _cast(values: Any, dtype: Any) -> Any:
    if isinstance(dtype, str):
        return values.astype(dtype)
    import torch

    return torch.from_numpy(values).to(dtype)
