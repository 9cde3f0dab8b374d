"""Tiny runs for the tests of training: two experts, a real rollout, advantages written beside the shards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from rollout.policy import Policy
from rollout.run import rollout
from shards.config import EvalConfig, ModelConfig, RolloutConfig, RunConfig, ScoreConfig, TrainConfig
from shards.reader import open_shard
from shards.run import Run, Stage
from shards.sidecar import write_advantages
from tests.support.tiny_models import TEXT_LENGTH

SPECIFICATION = "0a1b2c3d"
GROUP = 3  # in batches of 2: the last chunk of a group is smaller
ROLLOUT: dict[str, Any] = {
    "prompts_per_iteration": 2,
    "group_size": GROUP,
    "batch_size": 2,
    "height": 16,
    "width": 16,
    "frames": 5,
    "steps": 6,
    "high_steps": 1,
    "low_steps": 2,
    "guidance_scale": 2.0,
    "guidance_scale_2": 1.5,
}
TRAIN: dict[str, Any] = {"lora_rank": 2, "lora_alpha": 4.0, "learning_rate": 1e-3}
EVAL: dict[str, Any] = {"limit": 2, "steps": 4}


def make_run(
    path: Path,
    folder: Path,
    train: dict[str, Any] | None = None,
    *,
    model: dict[str, Any] | None = None,
    score: dict[str, Any] | None = None,
    image: bool = False,
    **rollout_settings: Any,
) -> Run:
    """A run folder for a tiny model.

    Keyword arguments replace settings of [rollout], `train`, `model` and `score` those of theirs; with `image` the
    prompts begin with one.
    """
    settings = ROLLOUT | rollout_settings
    prompts = path.parent / f"{path.name}-prompts.jsonl"
    rows: list[dict[str, str]] = [{"prompt": f'a sign "{word}"'} for word in ("FILM", "CAT", "DOG")]
    if image:
        write_image(path.parent / "first.png", settings["width"], settings["height"])
        rows = [{**row, "image": "first.png"} for row in rows]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = {"path": str(folder), "device": "cpu", "text_length": TEXT_LENGTH}
    config = RunConfig(
        model=ModelConfig(**(own | (model or {}))),
        rollout=RolloutConfig(prompts=str(prompts), **settings),
        score=ScoreConfig(**(score or {})),
        train=TrainConfig(**(TRAIN | (train or {}))),
        eval=EvalConfig(prompts=str(prompts), **EVAL),
    )
    return Run.create(path, config)


def write_image(path: Path, width: int, height: int) -> Path:
    """A picture of that size with many colours."""
    pixels = (np.arange(width * height * 3) % 251).reshape(height, width, 3).astype("uint8")
    Image.fromarray(pixels).save(path)
    return path


def roll(run: Run, iteration: int, policy: Policy) -> Stage:
    """Sample an iteration with the real rollout."""
    stage = run.iteration(iteration)
    rollout(run, stage, policy)
    return stage


def advantage_of(key: str) -> tuple[float, float]:
    """Some advantage for a key, the same everywhere, and weight 1."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**31 - 1.0, 1.0


def advise(stage: Stage, rule: Callable[[str], tuple[float, float]] = advantage_of, name: str = SPECIFICATION) -> None:
    """Write the advantages of a stage: (advantage, weight) of each key by `rule`."""
    for number in stage.shards():
        frame = open_shard(stage, number).index[["key", "prompt_id", "sample"]].copy()
        pairs = [rule(key) for key in frame["key"]]
        frame = frame.assign(advantage=[one for one, _ in pairs], weight=[two for _, two in pairs])
        write_advantages(stage, number, name, frame.assign(reward=0.5, reason=""), {})


def weights(run: Run, iteration: int, folder: str = "") -> dict[str, torch.Tensor]:
    """The published adapter weights of an iteration, `high_noise/…` and `low_noise/…`."""
    from safetensors.torch import load_file

    found = {}
    for expert in ("high_noise", "low_noise"):
        path = run.iteration(iteration).policy_dir / folder / expert / "pytorch_lora_weights.safetensors"
        found |= {f"{expert}/{name}": value for name, value in load_file(path).items()}
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def frame_of(stage: Stage) -> pd.DataFrame:
    """The index of all shards of a stage."""
    return pd.concat([open_shard(stage, number).index for number in stage.shards()], ignore_index=True)


def fork(run: Run, path: Path, **train: Any) -> Run:
    """A copy of a run with other settings of [train]."""
    shutil.copytree(run.path, path, ignore=shutil.ignore_patterns("run.toml"))
    config = run.config.model_copy(update={"train": TrainConfig(**(run.config.train.model_dump() | train))})
    return Run.create(path, config)


def killed(action: Callable[[], object]) -> None:
    """Run `action` in a forked process that must die of SIGKILL."""
    process = os.fork()
    if process == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def kill_self(*_: object, **__: object) -> None:
    """Die as of kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)
