"""LoRA merged into weights: `model.base_lora`, frozen beneath the policy, and the policy itself in a fused export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rollout.lora.adapter import ADAPTER, put_on
from rollout.lora.find import LoraFile, find_lora
from rollout.lora.read import Lora, read_lora
from shards.errors import RunFailed, UserError
from shards.run import EXPERT_NAMES

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

SETTING = "model.base_lora"


class BaseLoraIdentity(TypedDict):
    """Which LoRA it is."""

    files: dict[str, dict[str, str]]
    """{"weights": sha256} by name of the expert."""
    scale: float


class BaseLoraRecord(BaseLoraIdentity):
    """The same in export.json."""

    names: dict[str, str]
    """Of the files, by name of the expert."""
    plain: bool
    """Whether diffusers reads them as they are."""


@dataclass(frozen=True)
class BaseLora:
    """A LoRA that is merged into the base model of every stage, so that it costs nothing and is in the reference too.

    Unfused it would take a second adapter through every forward, and switching the policy's off would need care.
    """

    files: Mapping[int, LoraFile]
    """By expert; one of two may have none."""
    scale: float
    contents: Mapping[int, Mapping[str, str]]
    """sha256 of the files of each expert when they were opened, by `weights` and `config`."""
    folder: Path | None
    """Where they were found together."""

    @classmethod
    def open(
        cls, first: str, second: str, scale: float, experts: Sequence[int], folder: Path | None = None
    ) -> BaseLora | None:
        """What `model.base_lora`, `_2` and `_scale` name; None when they name nothing. UserError as `find_lora`."""
        if not first and not second:
            return None
        files = find_lora(SETTING, first, second, experts)
        if not files:
            raise UserError(f"{SETTING} = {first!r}, {SETTING}_2 = {second!r} name no file", "leave both empty instead")
        return cls(files, scale, {expert: _contents(file) for expert, file in files.items()}, folder)

    def read(self, expert: int) -> Lora | None:
        """The LoRA of an expert. RunFailed when its file has changed since it was opened."""
        file = self.files.get(expert)
        if file is None:
            return None
        lora = read_lora(file)
        if _contents(file) != self.contents[expert]:
            raise RunFailed(f"{file.weights}: changed while it was in use", "restore it, or start the command again")
        return lora

    def merge(self, module: nn.Module, expert: int) -> None:
        """Merge the LoRA of an expert into a module that carries none, and leave it frozen."""
        lora = self.read(expert)
        if lora is not None:
            put_on(module, lora)
            merge_adapter(module, self.scale)

    def identity(self) -> BaseLoraIdentity:
        """What it is: {"files": {expert: {"weights": sha256}}, "scale"}. Names and places of files do not count."""
        return {
            "files": {EXPERT_NAMES[expert]: dict(one) for expert, one in self.contents.items()},
            "scale": self.scale,
        }

    def record(self, plain: bool) -> BaseLoraRecord:
        """What an export tells of it: `identity`, the names of the files, and whether diffusers reads them as they are.

        Names only: where they lie is nobody's business but ours.
        """
        names = {EXPERT_NAMES[expert]: file.weights.name for expert, file in self.files.items()}
        return {**self.identity(), "names": names, "plain": plain}


@torch.no_grad()
def merge_adapter(module: WanTransformer3DModel, scale: float = 1.0) -> None:
    """Merge the adapter of a module into its weights, `scale` times, and take it off; the module is frozen then.

    W + scale * alpha/rank * B A, and biases alike, are computed in float64 and rounded once to the dtype of the weight,
    so that machines agree on the bits whatever the order in which they add (but for ties of that rounding).
    """
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            _merge_layer(layer, scale)
    module.unload_lora()
    module.requires_grad_(False)


def _merge_layer(layer: LoraLayer, scale: float) -> None:
    layer.set_scale(ADAPTER, scale)
    layer.lora_A[ADAPTER].double()
    layer.lora_B[ADAPTER].double()
    base = layer.get_base_layer()
    weight = base.weight.double() + layer.get_delta_weight(ADAPTER)
    if layer.use_dora[ADAPTER]:
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight.double()
        weight *= (magnitude / weight.flatten(1).norm(dim=1)).view(-1, *[1] * (weight.ndim - 1))
    base.weight.data = weight.to(base.weight.dtype)
    if layer.lora_bias[ADAPTER]:
        bias = base.bias.double() + layer.scaling[ADAPTER] * layer.lora_B[ADAPTER].bias
        base.bias.data = bias.to(base.bias.dtype)


def _contents(file: LoraFile) -> dict[str, str]:
    """sha256 of the files of a LoRA, whatever they are called."""
    weights, *config = file.hashes().values()
    return {"weights": weights, **({"config": config[0]} if config else {})}
