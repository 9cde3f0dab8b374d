"""`rushes plan-memory`: what each stage of a run will need, from the configurations of the model alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from rollout.policy_folder import DTYPES, EXPERT_FOLDERS, find_folder, read_layout
from rollout.policy_sizes import (
    ExpertSize,
    Pass,
    decode_bytes,
    expert_size,
    text_parameters,
    vae_parameters,
    working_bytes,
)
from shards.run import Run

GIB = 2**30
LORA_STATE = 24
"""Bytes for a trained LoRA parameter, all fp32: weight, gradient, two moments, average, weights of the rollout."""
FULL_STATE = 16
"""Bytes for a parameter in full training: fp32 weight, gradient, two moments."""


@dataclass(frozen=True)
class Need:
    """What one stage needs, in bytes: `device` at its peak, `host` beside the memory of the program itself."""

    stage: str
    device: int
    host: int
    parts: dict[str, int]
    """What the device holds at the peak, by name."""


def tokens(shape: tuple[int, int, int, int], patch: tuple[int, int, int]) -> int:
    """Tokens of latents (C, F, H, W) cut into patches (frames, height, width)."""
    return prod(size // unit for size, unit in zip(shape[1:], patch, strict=True))


def weight_bytes(parameters: int, dtype: str, kept: int = 0) -> int:
    """Bytes of weights in `dtype`, `kept` of them in fp32."""
    return (parameters - kept) * DTYPES[dtype].itemsize + 4 * kept


def block_input_bytes(token_count: int, size: ExpertSize, dtype: str, batch: int = 1) -> int:
    """Bytes that gradient checkpointing keeps of one forward: the input of every block."""
    return token_count * size.width * size.layers * batch * DTYPES[dtype].itemsize


def trainer_bytes(parameters: int, *, full: bool, average: bool = True) -> int:
    """Bytes of trained weights with gradients and AdamW; for LoRA also the averaged and the rollout's weights."""
    return parameters * (FULL_STATE if full else LORA_STATE - (0 if average else 4))


def state_bytes(shape: tuple[int, int, int, int], dtype: str) -> int:
    """Bytes of one stored state of one sample."""
    return prod(shape) * DTYPES[dtype].itemsize


def plan_memory(run: Run) -> list[Need]:
    """The needs of text encoder, rollout, decoding and training, for the model and the shape of run.toml.

    Raises UserError for a folder that holds no Wan model and for a shape it cannot make.
    """
    config, model, rollout = run.config, run.config.model, run.config.rollout
    layout = read_layout(find_folder(model.path))
    layout.check_shape(rollout.height, rollout.width, rollout.frames)
    expert, text, vae = (_config(layout.folder / part) for part in (EXPERT_FOLDERS[0], "text_encoder", "vae"))
    size = expert_size(expert, config.train.lora_rank)
    shape = layout.latent_shape(rollout.height, rollout.width, rollout.frames)
    count = len(layout.expert_ids)
    weights = weight_bytes(size.parameters, model.dtype, size.kept)
    guided = max(rollout.guidance_scale, rollout.guidance_scale_2 or 0.0) > 1
    base: dict[str, Any] = {"shape": shape, "batch": rollout.batch_size, "text_length": model.text_length}
    base |= {"dtype": model.dtype, "guided": guided}
    samples = rollout.groups_per_shard * rollout.group_size
    waiting = samples * (2 * rollout.high_steps + 2 * rollout.low_steps + 2) * state_bytes(shape, "float32")
    lora = size.lora * 4
    text_bytes = text_parameters(text) * DTYPES[model.dtype].itemsize
    needs = [
        _need("encode prompts", {"text encoder": text_bytes}, text_bytes),
        _need(
            "rollout",
            {"weights": weights, "LoRA": lora, "working": working_bytes(expert, Pass(**base))},
            count * (weights + lora) + waiting,
        ),
        _need(
            "decode",
            {"VAE": vae_parameters(vae) * 4, "working": decode_bytes(vae, shape)},
            samples * 3 * rollout.height * rollout.width * rollout.frames,
        ),
    ]
    for full in (False, True):
        trained = size.parameters if full else size.lora
        rank = 0 if full else config.train.lora_rank
        held = {} if full else {"weights": weights}
        state = trainer_bytes(trained, full=full, average=config.train.ema > 0)
        for checkpointing in (True, False):
            working = working_bytes(expert, Pass(**base, rank=rank, train=True, checkpointing=checkpointing))
            gradients = trained * (DTYPES[model.dtype].itemsize if full else 4)
            parts = {**held, "trainer": state, "working": max(0, working - gradients)}
            needs.append(_need(_train_name(full, checkpointing), parts, count * weights))
    return needs


def render(run: Run, needs: list[Need]) -> str:
    """The table for the command line; the setting that run.toml has is marked."""
    train = run.config.train
    chosen = _train_name(train.full, train.gradient_checkpointing)
    lines = [f"  {'stage':<32}{'device GiB':>11}{'host GiB':>10}  on the device"]
    for need in needs:
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in need.parts.items())
        mark = "*" if need.stage == chosen else " "
        lines.append(f"{mark} {need.stage:<32}{need.device / GIB:>11.2f}{need.host / GIB:>10.2f}  {parts}")
    video, batch = run.config.rollout, run.config.rollout.batch_size
    shape = f"{video.height}x{video.width}, {video.frames} frames, batch {batch}, {run.config.model.dtype}"
    lines.append(f"* as run.toml has it; {shape}")
    lines.append("Counted on the meta device, one expert on the device. Not in it: CUDA itself (about 0.5 to 1 GiB),")
    lines.append("scratch space inside kernels, fragmentation.")
    return "\n".join(lines)


def _train_name(full: bool, checkpointing: bool) -> str:
    return f"train {'all weights' if full else 'LoRA'}, {'' if checkpointing else 'no '}checkpointing"


def _need(stage: str, parts: dict[str, int], host: int) -> Need:
    return Need(stage, sum(parts.values()), host, parts)


def _config(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values
