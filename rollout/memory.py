"""`rushes plan-memory`: what each stage of a run will need, from the configurations of the model alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from rollout.planning import batch_size
from rollout.policy_folder import DTYPES, EXPERT_FOLDERS, Layout, find_folder, read_layout
from rollout.policy_sizes import (
    ExpertSize,
    Pass,
    decode_bytes,
    expert_size,
    text_parameters,
    vae_parameters,
    working_bytes,
)
from shards.config import RunConfig
from shards.errors import UserError
from shards.run import Run

GIB = 2**30


@dataclass(frozen=True)
class Need:
    """What one stage needs, in bytes: `device` at its peak, `host` beside the memory of the program itself."""

    stage: str
    device: int
    host: int
    parts: dict[str, int]
    """What the device holds at the peak, by name."""


@dataclass(frozen=True)
class Model:
    """A model folder in numbers, for the shape and the settings of one run. Bytes, where nothing else is said."""

    config: RunConfig
    layout: Layout
    transformer: dict[str, Any]
    vae_config: dict[str, Any]
    size: ExpertSize
    weights: int
    """Of one expert."""
    text: int
    """Weights of the text encoder."""
    vae: int
    """Weights of the VAE, fp32."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Latents (C, F, H, W)."""
        video = self.config.rollout
        return self.layout.latent_shape(video.height, video.width, video.frames)

    @property
    def guided(self) -> bool:
        """Whether a velocity takes two forwards, on the expert where it takes more."""
        scales = [self.config.rollout.guidance_scale]
        if len(self.layout.expert_ids) > 1:
            scales.append(self.config.rollout.guidance_scale_2 or 0.0)
        return max(scales) > 1

    def forward(self) -> Pass:
        """A forward of the rollout."""
        model, per_token = self.config.model, self.layout.expand_timesteps
        return Pass(
            self.shape,
            _batch(self.config, self.layout),
            model.text_length,
            model.dtype,
            self.guided,
            per_token=per_token,
        )


def tokens(shape: tuple[int, int, int, int], patch: tuple[int, int, int]) -> int:
    """Tokens of latents (C, F, H, W) cut into patches (frames, height, width)."""
    return prod(size // unit for size, unit in zip(shape[1:], patch, strict=True))


def weight_bytes(parameters: int, dtype: str, kept: int = 0) -> int:
    """Bytes of weights in `dtype`, `kept` of them in fp32."""
    return (parameters - kept) * DTYPES[dtype].itemsize + 4 * kept


def block_input_bytes(token_count: int, size: ExpertSize, dtype: str, batch: int = 1) -> int:
    """Bytes that gradient checkpointing keeps of one forward: the input of every block."""
    return token_count * size.width * size.layers * batch * DTYPES[dtype].itemsize


def state_bytes(shape: tuple[int, int, int, int], dtype: str) -> int:
    """Bytes of one stored state of one sample."""
    return prod(shape) * DTYPES[dtype].itemsize


def lora_state(parameters: int, *, average: bool) -> dict[str, int]:
    """What training keeps of an adapter on the device, all fp32: it is small enough to stay there whole."""
    return {
        "LoRA": 4 * parameters,
        "gradients": 4 * parameters,
        "AdamW": 8 * parameters,
        "average": 4 * parameters if average else 0,
        "weights of the rollout": 4 * parameters,
    }


def full_state(parameters: int, kept: int, dtype: str, *, average: bool) -> dict[str, int]:
    """What training keeps of all weights on the device: fp32 masters where the weights are not fp32 themselves.

    The weights the model computes with come on top.
    """
    return {
        "fp32 masters": 0 if dtype == "float32" else 4 * (parameters - kept),
        "gradients": 4 * parameters,
        "AdamW": 8 * parameters,
        "average": 4 * parameters if average else 0,
    }


def plan_memory(run: Run) -> list[Need]:
    """The needs of text encoder, rollout, decoding and training, for the model and the shape of run.toml.

    Raises UserError for a folder that holds no Wan model and for a shape it cannot make.
    """
    model = read_model(run.config)
    needs = [_encode(model), _rollout(model), _decode(model)]
    return needs + [_train(model, full, saving) for full in (False, True) for saving in (True, False)]


def read_model(config: RunConfig) -> Model:
    """Read the configurations of the model of a run; its weights need not be there."""
    layout = read_layout(find_folder(config.model.path, weights=False), weights=False)
    layout.check_shape(config.rollout.height, config.rollout.width, config.rollout.frames)
    transformer, text, vae = (_config(layout.folder / part) for part in (EXPERT_FOLDERS[0], "text_encoder", "vae"))
    size = expert_size(transformer, config.train.lora_rank)
    return Model(
        config=config,
        layout=layout,
        transformer=transformer,
        vae_config=vae,
        size=size,
        weights=weight_bytes(size.parameters, config.model.dtype, size.kept),
        text=text_parameters(text) * DTYPES[config.model.dtype].itemsize,
        vae=vae_parameters(vae) * 4,
    )


def render(run: Run, needs: list[Need]) -> str:
    """The table for the command line; the setting that run.toml has is marked."""
    train = run.config.train
    chosen = _train_name(train.full, train.gradient_checkpointing)
    lines = [f"  {'stage':<36}{'device GiB':>11}{'host GiB':>10}  on the device"]
    for need in needs:
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in need.parts.items() if value)
        mark = "*" if need.stage == chosen else " "
        lines.append(f"{mark} {need.stage:<36}{need.device / GIB:>11.2f}{need.host / GIB:>10.2f}  {parts}")
    video = run.config.rollout
    batch = _batch(run.config, read_layout(find_folder(run.config.model.path, weights=False), weights=False))
    shape = f"{video.height}x{video.width}, {video.frames} frames, batch {batch}, {run.config.model.dtype}"
    lines.append(f"* as run.toml has it; {shape}")
    lines.append("Counted on the meta device, one expert on the device. Not in it: CUDA itself (about 0.5 to 1 GiB),")
    lines.append("scratch space inside kernels, fragmentation.")
    return "\n".join(lines)


def _encode(model: Model) -> Need:
    return _need(
        "encode prompts", {"text encoder": model.text}, len(model.layout.expert_ids) * model.weights + model.text
    )


def _rollout(model: Model) -> Need:
    working = working_bytes(model.transformer, model.forward())
    return _need("rollout", _resting(model) | {"working": working}, _rollout_host(model))


def _decode(model: Model) -> Need:
    """The last expert stays on the device; videos are decoded one by one and then put together, in fp32."""
    video = model.config.rollout
    one = 4 * 3 * video.height * video.width * video.frames
    batch = model.forward().batch
    working = max(decode_bytes(model.vae_config, model.shape) + (batch - 1) * one, 2 * batch * one)
    return _need("decode", _resting(model) | {"VAE": model.vae, "working": working}, _rollout_host(model))


def _train(model: Model, full: bool, checkpointing: bool) -> Need:
    """One expert at work. What an optimizer step needs for a moment is as large as the weights it steps, in fp32."""
    settings, size, dtype = model.config.train, model.size, model.config.model.dtype
    trained = size.parameters if full else size.lora
    average = settings.ema > 0
    state = full_state(trained, size.kept, dtype, average=average) if full else lora_state(trained, average=average)
    # in full training the reference speaks before, with the base model's weights in the place of the trained ones
    reference = settings.kl_beta > 0 and not full
    run = replace(model.forward(), train=True, checkpointing=checkpointing, reference=reference)
    working = working_bytes(model.transformer, replace(run, rank=0 if full else settings.lora_rank))
    parts = {"weights": model.weights, **state}
    if checkpointing:
        forwards = 2 if run.guided else 1
        count = tokens(model.shape, model.layout.patch)
        kept = min(working, forwards * block_input_bytes(count, size, dtype, run.batch))
        parts, working = {**parts, "block inputs": kept}, working - kept
    short = 4 * trained - parts.get("block inputs", 0)
    host = _full_host(model) if full else _lora_host(model)
    return _need(_train_name(full, checkpointing), {**parts, "working": max(working, short)}, host)


def _resting(model: Model) -> dict[str, int]:
    """What lies on the device while videos are made."""
    return {"weights": model.weights, "LoRA": 4 * model.size.lora}


def _rollout_host(model: Model) -> int:
    """All experts, text encoder and VAE, and the samples of a shard between the two experts."""
    rollout = model.config.rollout
    stored = 2 * (rollout.high_steps + rollout.low_steps) + 1
    sample = state_bytes(model.shape, "float32") + stored * state_bytes(model.shape, rollout.storage_dtype)
    waiting = rollout.groups_per_shard * rollout.group_size * sample
    return len(model.layout.expert_ids) * (model.weights + 4 * model.size.lora) + model.text + model.vae + waiting


def _lora_host(model: Model) -> int:
    """All experts with their adapters, and the averages of those that are done."""
    average = 4 if model.config.train.ema > 0 else 0
    return len(model.layout.expert_ids) * (model.weights + (4 + average) * model.size.lora)


def _full_host(model: Model) -> int:
    """Base model, the experts that are not on the device, the rollout's weights, averages, the reference's answers.

    The weights in training make room for those of the rollout, for a moment, on the host.
    """
    settings, rollout, experts = model.config.train, model.config.rollout, len(model.layout.expert_ids)
    weights = (experts + (experts - 1) + 2) * model.weights
    averages = 4 * experts * model.size.parameters if settings.ema > 0 else 0
    steps = max(rollout.high_steps, rollout.low_steps if experts > 1 else 0)
    answers = 2 * steps * rollout.prompts_per_iteration * rollout.group_size * state_bytes(model.shape, "float32")
    return weights + averages + (answers if settings.kl_beta > 0 else 0)


def _batch(config: RunConfig, layout: Layout) -> int:
    """Videos in the largest forward pass of a run."""
    return min(batch_size(config.rollout, layout), config.rollout.group_size)


def _train_name(full: bool, checkpointing: bool) -> str:
    return f"train {'all weights' if full else 'LoRA'}, {'' if checkpointing else 'no '}checkpointing"


def _need(stage: str, parts: dict[str, int], host: int) -> Need:
    return Need(stage, sum(parts.values()), host, parts)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable: {error}", "copy or fetch the whole model folder") from None
    return values
