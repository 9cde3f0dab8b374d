"""Aesthetic score: a small head on CLIP image embeddings, trained on how much people like a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from score.clip import load_embedder, model_identity
from score.digests import digest
from score.frames import FrameReward, positive
from shards.errors import UserError

HINT = "a head is a chain of linear layers: *.weight [out, in] and *.bias [out], in the order of their names"
Layers = list[tuple[Tensor, Tensor]]


class Aesthetic(FrameReward):
    """How much people would like the frames, whatever the prompt says.

    score    mean over frames spread evenly over the video; 1 to 10 with LAION's heads
    lowest   the score of the worst of these frames
    LAION's improved-aesthetic-predictor has five linear layers without activations between them, on the unit
    embeddings of CLIP ViT-L/14 (`activation = "none"`, the default); its first predictor is a single layer.
    A policy that follows this score alone drifts to glossy close-ups: use it with a small weight.
    """

    name = "aesthetic"
    version = "1"
    components = ("score", "lowest")
    neutral = ("device",)

    def __init__(
        self,
        model: str,
        head: str,
        processor: str = "",
        activation: str = "none",
        frames: int = 4,
        device: str = "auto",
    ) -> None:
        """head: safetensors file of the head. activation: `none` or `relu` between its layers. Others as for `clip`."""
        self.check_options({"activation": activation, "frames": frames})
        self.activation = activation
        self.look_at(frames)
        layers = read_head(head)
        self.embedder = load_embedder(model, processor or model, device)
        if layers[0][0].shape[1] != self.embedder.size:
            raise UserError(
                f"{head} takes embeddings of {layers[0][0].shape[1]} numbers, {model} gives {self.embedder.size}",
                "a head fits only the CLIP model it was trained on",
            )
        self.layers = layers

    @staticmethod
    def check_options(options: Mapping[str, Any]) -> None:
        """Raises UserError for values that cannot be."""
        if (activation := options["activation"]) not in ("none", "relu"):
            raise UserError(f"reward 'aesthetic' has no activation {activation!r}", "there are none and relu")
        positive("aesthetic", "frames", options["frames"])

    def values(self, frames: NDArray[np.uint8], prompt: str) -> Mapping[str, float]:
        """Scores of the frames [T, H, W, 3]; the prompt is not looked at."""
        scores = apply(self.layers, self.embedder.images(frames), self.activation)
        return {"score": float(scores.mean()), "lowest": float(scores.min())}

    @staticmethod
    def identity(options: Mapping[str, Any]) -> dict[str, str]:
        """Digests of model, processor and head. Raises UserError for what is missing."""
        head = Path(options["head"])
        return {**model_identity(options), "head": digest(head.parent, [head])}


def apply(layers: Layers, embeddings: Tensor, activation: str) -> Tensor:
    """Scores [T] of embeddings [T, D]."""
    for number, (weight, bias) in enumerate(layers):
        embeddings = embeddings if number == 0 or activation == "none" else embeddings.relu()
        embeddings = embeddings @ weight.T + bias
    return embeddings[:, 0]


def read_head(path: str) -> Layers:
    """(weight [out, in], bias [out]) in float32 of every layer of a safetensors file.

    Raises UserError for a file that is missing or damaged, and for tensors that are not a chain ending in one number.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file", "give the safetensors file of an aesthetic head")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}", "fetch or convert the head again") from None
    names = sorted((name for name in tensors if name.endswith("weight")), key=_natural)
    layers = []
    for name in names:
        weight, own = tensors.pop(name).float(), name.removesuffix("weight") + "bias"
        layers.append((weight, tensors.pop(own).float() if own in tensors else torch.zeros(len(weight))))
    if tensors or not layers or not _is_chain(layers):
        shapes = ", ".join(f"{name} {list(weight.shape)}" for name, (weight, _) in zip(names, layers, strict=True))
        raise UserError(f"{path} holds no head that ends in one number: {', '.join([shapes, *tensors])}", HINT)
    return layers


def _is_chain(layers: Layers) -> bool:
    if any(weight.ndim != 2 or bias.shape != weight.shape[:1] for weight, bias in layers):
        return False
    sizes = [(weight.shape[1], weight.shape[0]) for weight, _ in layers]
    return sizes[-1][1] == 1 and all(left[1] == right[0] for left, right in pairwise(sizes))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `layers.10` after `layers.9`."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", name)]
