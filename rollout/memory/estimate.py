"""A model in numbers for `rushes plan-memory`: weights, states and tokens, from its configurations alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from rollout.lora.start import start_sizes
from rollout.plan import batch_size
from rollout.policy.folder import DTYPES, EXPERT_FOLDERS, Layout, find_folder, read_config, read_layout, read_part
from rollout.policy.sizes import (
    ExpertSize,
    Pass,
    TransformerConfig,
    VaeConfig,
    expert_size,
    text_parameters,
    vae_parameters,
)
from shards.config import RunConfig


@dataclass(frozen=True)
class Model:
    """A model folder in numbers, for the shape and the settings of one run. Bytes, where nothing else is said."""

    config: RunConfig
    layout: Layout
    transformer: TransformerConfig
    vae_config: VaeConfig
    size: ExpertSize
    rank: int
    """Of the largest adapter: `train.lora_rank`, or that of `model.lora`, whose size then counts too."""
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
        """A forward of the rollout, with the adapter that training has put on; the first iteration may have none."""
        model, per_token = self.config.model, self.layout.expand_timesteps
        return Pass(
            self.shape,
            batch_of(self.config, self.layout),
            model.text_length,
            model.dtype,
            self.guided,
            rank=0 if self.config.train.full else self.rank,
            per_token=per_token,
            batch_guidance=self.config.rollout.batch_guidance,
            merge_lora=model.merge_lora and not self.config.train.full,
        )


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
        "half a gradient": 4 * parameters,  # of the first batches of an update, which the others are compared with
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


def read_model(config: RunConfig) -> Model:
    """Read the configurations of the model of a run; its weights need not be there."""
    layout = read_layout(find_folder(config.model.path, weights=False), weights=False)
    layout.check_shape(config.rollout.height, config.rollout.width, config.rollout.frames)
    hint = "copy or fetch the whole model folder"
    transformer = read_part(TransformerConfig, layout.folder / EXPERT_FOLDERS[0], hint)
    text = read_config(layout.folder / "text_encoder" / "config.json", hint)
    vae = read_part(VaeConfig, layout.folder / "vae", hint)
    size, rank = expert_size(transformer, config.train.lora_rank), config.train.lora_rank
    if started := start_sizes(config.model.lora, config.model.lora_2, layout):
        # an expert without a LoRA to start from gets a new one
        sizes = started if len(started) == len(layout.expert_ids) else [*started, (size.lora, rank)]
        size, rank = replace(size, lora=max(numbers for numbers, _ in sizes)), max(one for _, one in sizes)
    return Model(
        config=config,
        layout=layout,
        transformer=transformer,
        vae_config=vae,
        size=size,
        rank=rank,
        weights=weight_bytes(size.parameters, config.model.dtype, size.kept),
        text=text_parameters(text) * DTYPES[config.model.dtype].itemsize,
        vae=vae_parameters(vae) * 4,
    )


def batch_of(config: RunConfig, layout: Layout | None = None) -> int:
    """Videos in the largest forward pass of a run."""
    layout = layout or read_layout(find_folder(config.model.path, weights=False), weights=False)
    return min(batch_size(config.rollout, layout), config.rollout.group_size)
