"""What the benchmarks for GPUs run on: Wan folders with random weights at full size, and runs on them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from rollout.policy.folder import DTYPES
from shards.config import ModelConfig, RolloutConfig, RunConfig, TrainConfig
from shards.files import publish_replace
from shards.plan import Dtype
from shards.run import Run

WORDS = ("FILM", "OPEN", "GATE", "SALE", "MOON", "BIRD", "LAMP", "RAIN")
COMMON = {"patch_size": (1, 2, 2), "in_channels": 16, "out_channels": 16, "cross_attn_norm": True}
FULL = {**COMMON, "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}
MODELS: dict[str, dict[str, Any]] = {  # configurations as diffusers' convert_wan_to_diffusers.py writes them
    "1.3b": {**FULL, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "a14b": {**FULL, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    "i2v-a14b": {**FULL, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40, "in_channels": 36},
    "5b": {**FULL, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48,
           "out_channels": 48},
}  # fmt: skip
SMALL_LAYERS = {"attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "num_attention_heads": 2, "ffn_dim": 64,
                "num_layers": 2, "rope_max_seq_len": 32}  # fmt: skip
SMALL_VAE = {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


@dataclass(frozen=True)
class Case:
    """A model, a shape and an amount of work."""

    model: str
    """One of MODELS."""
    height: int
    width: int
    frames: int
    layers: int = 0
    """Blocks of the transformer; 0 stands for all."""
    steps: int = 4
    prompts: int = 1
    videos: int = 2
    batch: int = 1
    rank: int = 64
    text_length: int = 512
    dtype: Dtype = "bfloat16"
    small: bool = False
    """Tiny layers, for a CPU."""

    def __str__(self) -> str:
        blocks = f", {self.layers} blocks" if self.layers else ""
        return f"{'small ' if self.small else ''}{self.model} {self.height}x{self.width}x{self.frames}{blocks}"


def build(folder: Path, case: Case, device: torch.device) -> Path:
    """Save a pipeline with the transformer of a case and random weights; its text encoder has one layer."""
    torch.manual_seed(0)
    config = MODELS[case.model] | (SMALL_LAYERS if case.small else {})
    config |= {"num_layers": case.layers} if case.layers else {}
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**config).to(DTYPES[case.dtype])
    transformer.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            parameter.fill_(1.0) if "norm" in name and name.endswith("weight") else parameter.normal_(0.0, 0.02)
    text = UMT5Config(vocab_size=384, d_model=config["text_dim"], d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    parts = {} if case.model != "i2v-a14b" else {"image_encoder": None, "image_processor": None}
    (WanImageToVideoPipeline if parts else WanPipeline)(
        **parts,
        tokenizer=ByT5Tokenizer(),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(**(SMALL_VAE if case.small else {})),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def make_run(path: Path, folder: Path, case: Case, device: torch.device) -> Run:
    """A run that samples and trains the prompts of a case; the replay gate proves all, and only measures."""
    prompts, image = path.parent / f"{path.name}-prompts.jsonl", {}
    if case.model == "i2v-a14b":
        first_frame(path.parent / "first.png", case.width, case.height)
        image = {"image": "first.png"}
    texts = [f'a sign that says "{WORDS[index % len(WORDS)]}", number {index}' for index in range(case.prompts)]
    publish_replace(prompts, "".join(json.dumps({"prompt": text, **image}) + "\n" for text in texts).encode())
    return Run.create(
        path,
        RunConfig(
            model=ModelConfig(path=str(folder), dtype=case.dtype, text_length=case.text_length, device=str(device)),
            rollout=RolloutConfig(
                prompts=str(prompts), prompts_per_iteration=case.prompts, groups_per_shard=case.prompts,
                group_size=case.videos, batch_size=case.batch, high_steps=2, low_steps=0, guidance_scale=4.0,
                height=case.height, width=case.width, frames=case.frames, steps=case.steps,
            ),
            train=TrainConfig(
                lora_rank=case.rank, lora_alpha=2.0 * case.rank, gradient_checkpointing=True, kl_beta=0.0,
                updates_per_rollout=1, replay_samples=10**6, replay_limit=1e6, save_every=10**6,
            ),
        ),
    )  # fmt: skip


def first_frame(path: Path, width: int, height: int) -> Path:
    """A grey picture for image-to-video."""
    Image.new("RGB", (width, height), (120, 120, 120)).save(path)
    return path
