"""Unit costs of Wan2.2-A14B, counted and not assumed: FLOP with torch's own counter on the meta device, bytes of files.

No weight is needed and nothing is computed. Blocks are equal, so one and two of them tell the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.models import MODELS
from bench.scale_simulation import Units
from rollout.lora.adapter import add_adapter
from rollout.memory.model import state_bytes, weight_bytes
from rollout.policy import sizes
from rollout.policy.folder import tokens
from rollout.policy.sizes import Pass, Shape, expert_size, extrapolate, fused_attention, working_bytes

A14B = MODELS["a14b"]
UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
VAE: dict[str, Any] = {}  # diffusers' defaults are the VAE of Wan2.1 and A14B
TEXT_LENGTH = 512
LATENT_CHANNELS = 16


def latent_shape(height: int, width: int, frames: int) -> Shape:
    """Latents (C, F, H, W) of a video: a quarter of the frames, an eighth of the sides (the VAE of Wan2.1)."""
    return LATENT_CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8


def count(height: int, width: int, frames: int, rank: int, dtype: str = "bfloat16", storage: str = "float16") -> Units:
    """The unit costs of A14B with a LoRA of `rank`, gradient checkpointing, guidance and a KL term."""
    shape = latent_shape(height, width, frames)
    size = expert_size(A14B, rank)
    once = Pass(shape, 1, TEXT_LENGTH, dtype, guided=False, rank=rank)
    step = Pass(shape, 1, TEXT_LENGTH, dtype, guided=True, rank=rank, train=True, checkpointing=True, reference=True)
    return Units(
        forward=pass_flop(A14B, once),
        trained=pass_flop(A14B, step),
        decode=decode_flop(VAE, shape),
        tokens=tokens(shape, A14B["patch_size"]),
        width=size.width,
        layers=size.layers,
        weights=weight_bytes(size.parameters, dtype, size.kept),
        lora=size.lora,
        text=2 * sizes.text_parameters(UMT5_XXL),
        vae=4 * sizes.vae_parameters(VAE),
        state=state_bytes(shape, storage),
        working=working_bytes(A14B, step),
    )


def pass_flop(config: dict[str, Any], run: Pass) -> float:
    """FLOP of a forward, or a forward and backward, of an expert; a multiplication and an addition are two."""
    counts = []
    for layers in (1, 2):
        module = sizes._cast(sizes.meta_expert(config, layers), run.dtype)
        module.requires_grad_(run.train and run.rank == 0)
        if run.rank:
            add_adapter(module, run.rank, run.rank, 0)
        if run.checkpointing:
            module.enable_gradient_checkpointing()
        with fused_attention():
            counts.append(flop(partial(sizes._pass, module, config, run)))
    return float(extrapolate(counts[0], counts[1], int(config["num_layers"])))


def decode_flop(config: dict[str, Any], shape: Shape) -> float:
    """FLOP of the VAE for one video. It works frame by frame; three latent frames are counted and the rest added."""
    counts = []
    for frames in (2, 3):
        with torch.device("meta"):
            vae = AutoencoderKLWan.from_config(config)
            latents = torch.zeros(1, shape[0], frames, *shape[2:])
        with torch.no_grad():
            counts.append(flop(partial(vae.decode, latents, return_dict=False)))
    return float(extrapolate(counts[0], counts[1], shape[1] - 1))


def flop(function: Callable[[], Any]) -> int:
    """FLOP of a call."""
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return int(counter.get_total_flops())
