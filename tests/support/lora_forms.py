"""Random LoRAs for the tiny models, in the forms that people publish, and what plain diffusers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from rollout.policy import Policy
from rollout.policy.folder import read_layout
from rollout.policy.plain import open_plain, probe, settle
from tests.support.tiny_models import TEXT_LENGTH

Tensors = dict[str, Tensor]
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
NATIVE = {
    **{
        f"{native}_attn.{theirs}": f"{ours}.{part}"
        for native, ours in (("self", "attn1"), ("cross", "attn2"))
        for theirs, part in ATTENTION.items()
    },
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
"""Layers of a block: the official name and that of diffusers."""


def layers(model: WanTransformer3DModel) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the layers of all blocks, by official name: `blocks.0.self_attn.q`."""
    found = {}
    for block in range(model.config.num_layers):
        for native, ours in NATIVE.items():
            weight = model.get_submodule(f"blocks.{block}.{ours}").weight
            found[f"blocks.{block}.{native}"] = (int(weight.shape[0]), int(weight.shape[1]))
    return found


def native(
    model: WanTransformer3DModel, seed: int, rank: int = 4, alpha: float | None = None, bias: bool = False
) -> Tensors:
    """ComfyUI's keys with lora_A and lora_B; with `alpha` those of each layer differ, with `bias` there is diff_b."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for number, (name, (outputs, inputs)) in enumerate(layers(model).items()):
        key = f"diffusion_model.{name}"
        found[f"{key}.lora_A.weight"] = 0.3 * torch.randn(rank, inputs, generator=generator)
        found[f"{key}.lora_B.weight"] = 0.3 * torch.randn(outputs, rank, generator=generator)
        if alpha is not None:
            found[f"{key}.alpha"] = torch.tensor(alpha + number % 3)
        if bias:
            found[f"{key}.diff_b"] = 0.3 * torch.randn(outputs, generator=generator)
    return found


def renamed(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    """The same tensors, other text in their keys."""
    found = {}
    for name, value in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = value
    return found


def diffusers_keys(tensors: Tensors) -> Tensors:
    """Native keys without alpha under the names of diffusers: `transformer.blocks.0.attn1.to_q.lora_A.weight`."""
    pairs = [(f".{theirs}.", f".{ours}.") for theirs, ours in NATIVE.items()]
    return renamed(tensors, ("diffusion_model.", "transformer."), *pairs, (".diff_b", ".lora_B.bias"))


def musubi_keys(tensors: Tensors) -> Tensors:
    """Native keys with alpha as musubi-tuner writes them: `lora_unet_blocks_0_self_attn_q.lora_down.weight`."""
    found = {}
    for name, value in tensors.items():
        layer, end = next((name.removesuffix(f".{part}"), part) for part in
                          ("lora_A.weight", "lora_B.weight", "alpha") if name.endswith(f".{part}"))  # fmt: skip
        end = end.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        found[layer.replace("diffusion_model.", "lora_unet_").replace(".", "_") + f".{end}"] = value
    return found


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Save tensors as a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def plain(model: Path, *files: Path, dtype: str = "float32") -> list[Tensor]:
    """What the experts of a plain pipeline answer after `load_lora_weights` of a file for each."""
    pipe = open_plain(model, dtype, whole=False)
    for expert, file in enumerate(files):
        pipe.load_lora_weights(str(file), adapter_name=f"lora-{expert}", load_into_transformer_2=expert == 1)
        module = (pipe.transformer, pipe.transformer_2)[expert]
        assert f"lora-{expert}" in module.peft_config
        settle(module)
    layout = read_layout(model)
    return [probe(module, layout) for module in (pipe.transformer, pipe.transformer_2) if module is not None]


def load(model: Path, **options: Any) -> Policy:
    """A policy on a CPU."""
    return Policy.load(model, device="cpu", text_length=TEXT_LENGTH, **{key: _text(v) for key, v in options.items()})


def answers(policy: Policy) -> list[Tensor]:
    """What the experts of a policy answer."""
    return [probe(policy.experts.module(expert), policy.layout) for expert in policy.layout.expert_ids]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether all answers are equal, bit for bit."""
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
