"""A policy as others see it: plain diffusers pipelines with its adapters on, and its weights merged into the base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from rollout.lora.adapter import ADAPTER, compute_in_input_dtype, merge_at_calls
from rollout.policy.folder import DTYPES, EXPERT_FOLDERS, Layout
from shards.errors import RunFailed
from shards.run import EXPERT_NAMES

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

Pipeline: TypeAlias = DiffusionPipeline
"""Of the class that a model_index.json names."""
PROBE_TIMESTEPS = (950.0, 400.0)
SAMPLE_STEPS = 4


def open_plain(folder: Path, dtype: str, *, whole: bool) -> Pipeline:
    """A fresh pipeline of the class that model_index.json names, on the CPU; text encoder and VAE only if `whole`.

    This is `from_pretrained` and nothing of ours, as a user would call it.
    """
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    absent = {} if whole else {"text_encoder": None, "tokenizer": None, "vae": None}
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=DTYPES[dtype], local_files_only=True, **absent)
    pipe.set_progress_bar_config(disable=True)
    for name in EXPERT_FOLDERS:
        settle(getattr(pipe, name))
    return pipe


def wear(pipe: Pipeline, loras: Mapping[int, Path | dict[str, Tensor]]) -> None:
    """Load a LoRA file, or its tensors alone, into each expert by `load_lora_weights`.

    Raises RunFailed when diffusers loaded nothing into an expert, which it only logs.
    """
    for expert, lora in loras.items():
        name, second = EXPERT_NAMES[expert], expert == 1
        source = lora if isinstance(lora, dict) else str(lora)
        pipe.load_lora_weights(source, adapter_name=name, load_into_transformer_2=second)
        module = getattr(pipe, EXPERT_FOLDERS[expert])
        if name not in getattr(module, "peft_config", {}):
            raise RunFailed(f"{lora}: diffusers loaded no layer of it", "tell us which versions you have")
        settle(module)


def settle(module: nn.Module | None) -> None:
    """Weights to memory of their own: on a CPU the alignment of a mapped file moves the last bits of a product."""
    if module is not None:
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.clone()
        module.eval().requires_grad_(False)


def round_adapter(module: nn.Module, dtype: str) -> None:
    """Round an adapter to the dtype of the base, as `load_lora_weights` does; training keeps it in fp32.

    Products are in that dtype then, also in the few layers that diffusers keeps in fp32, and beside those of the base.
    """
    compute_in_input_dtype(module, False)
    merge_at_calls(module, False)
    for name, parameter in module.named_parameters():
        if f".{ADAPTER}." in name:
            parameter.data = parameter.data.to(DTYPES[dtype])


@torch.no_grad()
def probe(module: WanTransformer3DModel, layout: Layout) -> Tensor:
    """What an expert answers to fixed random latents of a few tokens, at two timesteps: [2,C,F,H,W]."""
    config = module.config
    generator = torch.Generator().manual_seed(20)
    _, rows, columns = layout.patch
    first: nn.Parameter = module.patch_embedding.weight
    x = torch.randn(1, config.in_channels, 2, 2 * rows, 2 * columns, generator=generator).to(first.dtype)
    text = torch.randn(1, 7, config.text_dim, generator=generator).to(first.dtype)
    shape = (1, 2 * 2 * 2) if layout.expand_timesteps else (1,)
    answers = [module(x, torch.full(shape, t), text, return_dict=False)[0].float() for t in PROBE_TIMESTEPS]
    return torch.cat(answers)


@torch.no_grad()
def sample(pipe: Pipeline, layout: Layout, text_length: int) -> Tensor:
    """The final latents of one tiny call of the whole pipeline, guidance on, with noise from a fixed seed."""
    _, rows, columns = layout.patch
    height, width = (2 * layout.spatial_scale * patch for patch in (rows, columns))
    options: dict[str, object] = {}
    if layout.takes_image == "must":
        from PIL import Image

        options["image"] = Image.new("RGB", (width, height), (90, 120, 60))
    if layout.boundary is not None:
        options["guidance_scale_2"] = 2.0
    result = pipe(
        prompt="a sign",
        negative_prompt="",
        height=height,
        width=width,
        num_frames=1 + layout.temporal_scale,
        num_inference_steps=SAMPLE_STEPS,
        guidance_scale=3.0,
        max_sequence_length=text_length,
        generator=torch.Generator().manual_seed(20),
        output_type="latent",
        **options,
    )
    latents: Tensor = result.frames
    return latents


def save_expert(module: WanTransformer3DModel, folder: Path) -> None:
    """Write a whole transformer in diffusers' layout; its configuration does not name the folder it came from."""
    module.register_to_config(_name_or_path="")
    module.save_pretrained(folder, safe_serialization=True)
