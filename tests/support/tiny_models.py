"""Tiny random Wan models of all four layouts, built from the real classes and saved as plain pipeline folders."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

LAYOUTS = ("t2v", "t2v2", "i2v2", "ti2v")
TEXT_LENGTH = 24
TEXT_DIM = 16


def tiny_transformer(seed: int, inputs: int = 16, outputs: int = 16) -> WanTransformer3DModel:
    """Two blocks of two heads; about 20,000 parameters."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=inputs,
        out_channels=outputs,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model.eval()


def tiny_text() -> UMT5EncoderModel:
    """A byte-level encoder of one layer."""
    torch.manual_seed(3)
    config = UMT5Config(vocab_size=384, d_model=TEXT_DIM, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0)
    return UMT5EncoderModel(config).eval()


def tiny_vae(wan22: bool) -> AutoencoderKLWan:
    """Wan2.1's VAE (16 channels, 4x8x8) or Wan2.2's (48 channels, 4x16x16, residual), with the thinnest layers."""
    torch.manual_seed(4)
    common = {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    if not wan22:
        return AutoencoderKLWan(z_dim=16, **common).eval()
    extra = {"in_channels": 12, "out_channels": 12, "is_residual": True, "patch_size": 2, "scale_factor_spatial": 16}
    return AutoencoderKLWan(z_dim=48, latents_mean=[0.1] * 48, latents_std=[0.7] * 48, **common, **extra).eval()


def build(layout: str) -> WanPipeline | WanImageToVideoPipeline:
    """A pipeline of one of LAYOUTS, with Wan's own boundaries."""
    parts = {
        "tokenizer": ByT5Tokenizer(),
        "text_encoder": tiny_text(),
        "vae": tiny_vae(layout == "ti2v"),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    }
    if layout == "t2v":
        return WanPipeline(**parts, transformer=tiny_transformer(1))
    if layout == "t2v2":
        experts = {"transformer": tiny_transformer(1), "transformer_2": tiny_transformer(2)}
        return WanPipeline(**parts, **experts, boundary_ratio=0.875)
    if layout == "i2v2":
        experts = {"transformer": tiny_transformer(1, 36), "transformer_2": tiny_transformer(2, 36)}
        return WanImageToVideoPipeline(**parts, **experts, boundary_ratio=0.9)
    return WanPipeline(**parts, transformer=tiny_transformer(1, 48, 48), expand_timesteps=True)


def save(layout: str, folder: Path) -> Path:
    """Build a layout and save it to FOLDER."""
    build(layout).save_pretrained(folder)
    return folder
