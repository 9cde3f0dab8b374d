"""An export, loaded back by plain diffusers and compared with the policy before anything is published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rollout.lora.merged import BaseLora
from rollout.policy.folder import EXPERT_FOLDERS, Layout
from rollout.policy.plain import Pipeline, open_plain, probe, sample, settle, wear
from shards.errors import RunFailed
from shards.run import EXPERT_NAMES


@dataclass(frozen=True)
class Exported:
    """What an export is, for its proof."""

    folder: Path
    layout: Layout
    """Of the base model."""
    dtype: str
    text_length: int
    files: Mapping[int, Path] = field(default_factory=dict)
    """The LoRA file of each expert; none for a whole pipeline in `folder`."""
    base_lora: BaseLora | None = None
    """What lies between the base model and the LoRA."""

    def open(self, *, whole: bool) -> Pipeline:
        """The pipeline that the export belongs to, in plain diffusers; with text encoder and VAE if `whole`."""
        pipe = open_plain(self.layout.folder if self.files else self.folder, self.dtype, whole=whole)
        for expert in self.layout.expert_ids if self.files and self.base_lora else ():
            module = getattr(pipe, EXPERT_FOLDERS[expert])
            self.base_lora.merge(module, expert)  # type: ignore[union-attr]
            settle(module)
        return pipe


def prove(exported: Exported, answers: Mapping[int, Tensor], modules: list[nn.Module]) -> None:
    """Load an export and compare, bit for bit: each expert's `answers`, for a LoRA with its metadata and without them,
    and, when the policy's own `modules` are given, the latents of one call of the whole pipeline.

    answers: [2, C, F, H, W] by expert, as `probe` gives them.

    Raises RunFailed where they differ.
    """
    layout, pipe = exported.layout, exported.open(whole=bool(modules))
    if exported.files:
        wear(pipe, {expert: load_file(path) for expert, path in exported.files.items()})
        _compare(pipe, exported, answers, "without its metadata, ")
        pipe.unload_lora_weights()
        wear(pipe, exported.files)
    _compare(pipe, exported, answers, "")
    if not modules:
        return
    theirs = sample(pipe, layout, exported.text_length)
    for expert, module in zip(layout.expert_ids, modules, strict=True):
        setattr(pipe, EXPERT_FOLDERS[expert], module)
    _equal(theirs, sample(pipe, layout, exported.text_length), f"{exported.folder}: a sample")


def beneath_in_diffusers(exported: Exported, answers: Mapping[int, Tensor]) -> float | None:
    """Largest difference to `answers` [2, C, F, H, W] when diffusers itself fuses the LoRA beneath, as in the card.

    None where diffusers cannot read that file as it is.
    """
    base = exported.base_lora
    assert base is not None
    loras = {expert: base.read(expert) for expert in base.files}
    if not all(lora is not None and lora.plain for lora in loras.values()):
        return None
    pipe = open_plain(exported.layout.folder, exported.dtype, whole=False)
    wear(pipe, {expert: file.weights for expert, file in base.files.items()})
    pipe.fuse_lora(components=[EXPERT_FOLDERS[expert] for expert in base.files], lora_scale=base.scale)
    pipe.unload_lora_weights()
    for expert in base.files:
        settle(getattr(pipe, EXPERT_FOLDERS[expert]))
    wear(pipe, exported.files)
    return largest(answers, {e: probe(getattr(pipe, EXPERT_FOLDERS[e]), exported.layout) for e in answers})


def largest(one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> float:
    """Largest absolute difference between the answers [2, C, F, H, W] of the same experts."""
    return max(float((one[expert] - other[expert]).abs().max()) for expert in one)


def _compare(pipe: Pipeline, exported: Exported, answers: Mapping[int, Tensor], how: str) -> None:
    for expert, answer in answers.items():
        found = probe(getattr(pipe, EXPERT_FOLDERS[expert]), exported.layout)
        _equal(found, answer, f"{exported.folder}: {how}the {EXPERT_NAMES[expert]} expert")


def _equal(found: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        difference = (found - expected).abs().max().item()
        raise RunFailed(
            f"{what} loaded back by plain diffusers differs from the policy by {difference:.3g}",
            "nothing was published; tell us which versions of diffusers and peft you have",
        )
