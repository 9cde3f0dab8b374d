"""Tiny random CLIP models of the real classes on disk, aesthetic heads for them, and small videos."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from score.reward import Video

SIZE = 8  # of an embedding
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIPModel with its processor, one token a letter, images of 16 pixels."""
    torch.manual_seed(seed)
    vocabulary = {letter: number for number, letter in enumerate([*LETTERS, *(f"{c}</w>" for c in LETTERS)])}
    start, end = len(vocabulary), len(vocabulary) + 1
    vocabulary |= {"<|startoftext|>": start, "<|endoftext|>": end}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": end + 1, "max_position_embeddings": 12, "bos_token_id": start, "eos_token_id": end}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=SIZE, logit_scale_init_value=3.0)
    CLIPModel(config).save_pretrained(folder)
    save_processor(folder, vocabulary)
    return folder


def save_processor(folder: Path, vocabulary: dict[str, int]) -> None:
    """Image processor and tokenizer alone."""
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, CLIPTokenizerFast(vocab=vocabulary, merges=[])).save_pretrained(folder)


def save_head(path: Path, sizes: tuple[int, ...] = (SIZE, 4, 1), seed: int = 0) -> dict[str, torch.Tensor]:
    """Linear layers of these sizes under LAION's names (every second number of a Sequential); returns the tensors."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, (inner, outer) in enumerate(pairwise(sizes)):
        tensors[f"layers.{2 * number}.weight"] = torch.randn(outer, inner, generator=draw)
        tensors[f"layers.{2 * number}.bias"] = torch.randn(outer, generator=draw)
    save_file(tensors, path)
    return tensors


def noise_video(key: str = "v", frames: int = 9, seed: int = 0, prompt: str = "cat on mat") -> Video:
    """Random pixels, 20 x 24."""
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 20, 24, 3), dtype=np.uint8)
    return Video(key, pixels, prompt, None, 16.0)


def moving_video(steps: list[int], key: str = "v", shape: tuple[int, int] = (48, 64)) -> Video:
    """A smooth texture shifted sideways by `steps[t]` pixels in frame t, at 16 frames per second."""
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    frames = []
    for step in steps:
        x = columns - step
        grey = 128 + 40 * np.sin(x / 5 + rows / 9) + 40 * np.sin(x / 11 - rows / 4)
        frames.append(np.repeat(grey[..., None], 3, axis=2).round().astype(np.uint8))
    return Video(key, np.stack(frames), "", None, 16.0)
