"""LoRA in Wan's official names, as ComfyUI reads it: one file an expert, its whole strength in the weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save

from rollout.lora.adapter import adapter_state, ordered
from shards.errors import UserError
from shards.files import publish_replace

if TYPE_CHECKING:
    from torch import nn

PREFIX = "diffusion_model."
NAMES = (
    (r"(blocks\.\d+)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
    (r"(blocks\.\d+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
    (r"(blocks\.\d+)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
    (r"(blocks\.\d+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
    (r"(blocks\.\d+)\.attn2\.add_([kv])_proj", r"\1.cross_attn.\2_img"),
    (r"(blocks\.\d+)\.ffn\.net\.0\.proj", r"\1.ffn.0"),
    (r"(blocks\.\d+)\.ffn\.net\.2", r"\1.ffn.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    (r"condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    (r"proj_out", "head.head"),
)
"""Layers as diffusers calls them, and as the official code does; the inverse of diffusers' own conversion."""


def native_name(name: str) -> str:
    """`blocks.0.attn1.to_q.lora_A.weight` as `diffusion_model.blocks.0.self_attn.q.lora_A.weight`.

    A bias of B becomes `diff_b`. Raises UserError for a layer that the official model does not have as such.
    """
    layer, _, end = name.rpartition(".lora_")
    for ours, theirs in NAMES:
        if re.fullmatch(ours, layer):
            tail = "diff_b" if end == "B.bias" else f"lora_{end}"
            return f"{PREFIX}{re.sub(ours, theirs, layer)}.{tail}"
    raise UserError(f"{name}: no layer that ComfyUI's keys can name", "export it with --format diffusers")


def save_native(module: nn.Module, path: Path) -> None:
    """Write the adapter of a module to `path`. There is no alpha in it: its strength must be 1 (`fold_strength`)."""
    state = {native_name(name): value.detach().cpu().contiguous() for name, value in adapter_state(module).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_replace(path, ordered(save(state, {"format": "pt"})))
