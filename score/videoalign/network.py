"""VideoAlign's network on current transformers: Qwen2-VL without its language head, and a reward head on three tokens.

Departures from Qwen2-VL, all the reference's own: positions in the text model are plain 0..L-1 instead of
three-dimensional; its bfloat16 cast also rounds the rotary frequencies, in training too, which the modes reproduce.
Source: `trainer.py`, `train_reward.py` (KwaiVGI/VideoAlign, git 219ab9d).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from score.videoalign.checkpoint import Checkpoint
from score.videoalign.text import REWARD_TOKENS, VIDEO_TOKEN
from score.videoalign.video import Clip
from score.videoalign.weights import read_weights
from shards.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2VLConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLTextModel


@dataclass(frozen=True)
class Mode:
    """How the numbers are computed."""

    math: torch.dtype
    stored: torch.dtype
    """Dtype the weights are rounded to first; that of the official construction is bfloat16."""
    rounded_frequencies: bool
    """Rotary frequencies of both towers rounded to bfloat16."""
    rounded_vision_angles: bool
    """Angles, cosines and sines of the vision tower in bfloat16 as well."""


MODES = {
    "float32": Mode(torch.float32, torch.float32, False, False),
    "bfloat16_weights_float32_math": Mode(torch.float32, torch.bfloat16, True, False),
    "official_rope_float32_math": Mode(torch.float32, torch.bfloat16, True, True),
    "bfloat16": Mode(torch.bfloat16, torch.bfloat16, True, True),
}


def mode_named(name: str) -> Mode:
    """The mode called `name`; UserError otherwise."""
    if name not in MODES:
        near = nearest(name, MODES)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"videoalign has no mode {name!r}", f"{hint}there are {', '.join(MODES)}")
    return MODES[name]


class BfloatVisionRotary(nn.Module):
    """The vision tower's rotary embedding after a bfloat16 cast: position * frequency, cos and sin in bfloat16."""

    def __init__(self, inv_freq: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inv_freq.bfloat16().float(), persistent=False)  # a later cast cannot hurt it

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [N,2], height and width of N patches, to cosines and sines [N, head size] float32."""
        inv_freq = self.get_buffer("inv_freq")
        angles = (position_ids.to(inv_freq.device).bfloat16()[..., None] * inv_freq.bfloat16()).flatten(1)
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().float(), both.sin().float()


class PatchProjection(nn.Module):
    """The patch embedding as one matrix product (kernel equals stride): on GPUs only convolutions use TF32."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches [N,1176] to [N, vision width]."""
        weight = self.proj.get_parameter("weight").flatten(1)
        return F.linear(patches.to(weight.dtype), weight)


class Network(nn.Module):
    """Vision tower, text model and reward head, with random weights on the current default device."""

    def __init__(self, config: Qwen2VLConfig, output_dim: int) -> None:
        from transformers import Qwen2VLModel

        super().__init__()
        model = Qwen2VLModel(config)
        self.visual: Qwen2VisionTransformerPretrainedModel = model.visual
        self.language_model: Qwen2VLTextModel = model.language_model
        self.rm_head = nn.Linear(config.text_config.hidden_size, output_dim, bias=False)
        self.visual.patch_embed = PatchProjection(self.visual.patch_embed.proj)

    def set_rotary(self, mode: Mode) -> None:
        """Build both rotary embeddings anew, since they are in no checkpoint, and round them as the mode says."""
        vision, text = self.visual.rotary_pos_emb, self.language_model.rotary_emb
        with torch.device("cpu"):
            vision, text = type(vision)(vision.config), type(text)(text.config)
        if mode.rounded_frequencies:
            for rotary in (vision, text):
                rotary.inv_freq = rotary.inv_freq.bfloat16().float()
        self.visual.rotary_pos_emb = BfloatVisionRotary(vision.inv_freq) if mode.rounded_vision_angles else vision
        self.language_model.rotary_emb = text

    def see(self, clip: Clip) -> torch.Tensor:
        """Embeddings [tokens, hidden] of a video."""
        weight = self.rm_head.weight
        grid = torch.tensor([clip.grid], device=weight.device)
        patches = clip.patches.to(weight.device, weight.dtype)
        embeds: torch.Tensor = self.visual(patches, grid_thw=grid).pooler_output  # merged; last_hidden_state is not
        return embeds

    def read(self, input_ids: torch.Tensor, mask: torch.Tensor, videos: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Raw scores [B,3] float32, VQ MQ TA, of right-padded texts [B,L] whose video tokens take `videos` in turn."""
        embeds = self.language_model.embed_tokens(input_ids)
        places = (input_ids == tokens.video)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(places, videos.to(embeds.dtype))
        # No position_ids: the text model then counts 0..L-1, as in the reference, not Qwen2-VL's three axes.
        hidden = self.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None]
        columns = torch.stack([(input_ids == token).int().argmax(1) for token in tokens.rewards], dim=1)
        scores = self.rm_head(hidden[rows, columns]).float()  # [B,3,output_dim]
        return scores.diagonal(dim1=1, dim2=2) if scores.shape[-1] == len(tokens.rewards) else scores[..., 0]


@dataclass(frozen=True)
class Tokens:
    """Ids that carry meaning here."""

    rewards: tuple[int, ...]
    video: int
    pad: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Tokens:
        """Ids in `tokenizer`, which has been checked to hold them."""
        rewards = tuple(tokenizer.convert_tokens_to_ids(token) for token in REWARD_TOKENS)
        return cls(rewards, tokenizer.convert_tokens_to_ids(VIDEO_TOKEN), tokenizer.pad_token_id)


def read_base_config(base_model: Path, vocab_size: int) -> Qwen2VLConfig:
    """The configuration of the base model for a vocabulary of the tokenizer's size. Raises UserError."""
    from transformers import Qwen2VLConfig

    file, hint = base_model / "config.json", "give `base_model` the folder of Qwen2-VL-2B-Instruct"
    try:
        content = json.loads(file.read_text())
        if content.get("model_type") != "qwen2_vl":
            raise UserError(f"{file} is of a {content.get('model_type')} model, not qwen2_vl", hint)
        config = Qwen2VLConfig.from_dict(content)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}", hint) from None
    config.text_config.vocab_size = vocab_size
    return config


def load_network(
    checkpoint: Checkpoint, base_model: Path, vocab_size: int, mode: Mode, device: torch.device
) -> Network:
    """The network of a checkpoint, ready to score. No weight is left at random: it is loaded or it is an error."""
    config = read_base_config(base_model, vocab_size)
    with torch.device("meta"):
        network = Network(config, checkpoint.output_dim)

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(mode.stored).float()

    weights = read_weights(checkpoint, base_model, network, rounded)
    state = {name: weight.to(mode.math) for name, weight in weights}
    network.load_state_dict(state, strict=True, assign=True)
    network.set_rotary(mode)
    return network.requires_grad_(False).eval().to(device)


def pad(texts: Sequence[list[int]], tokens: Tokens, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists to ids [B,L] padded on the right, and their mask [B,L]."""
    length = max(map(len, texts))
    ids = torch.tensor([text + [tokens.pad] * (length - len(text)) for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts], device=device)
    return ids, mask
