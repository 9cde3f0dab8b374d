"""LoRA of a policy: adapters on every expert, saved and loaded in diffusers' own format, one folder per expert."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from shards.errors import UserError
from shards.files import publish_replace, sha256_file
from shards.run import EXPERT_NAMES

ADAPTER = "policy"
WEIGHTS = "pytorch_lora_weights.safetensors"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
PREFIX = "transformer."  # diffusers uses it in the files of both experts


def add_adapter(module: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Put a trainable adapter on attention and feed-forward layers: A gaussian from `seed`, B zero, both fp32.

    With B zero the model computes the same bits as without an adapter. peft would give the weights the dtype of the
    base; in bfloat16 updates of 1e-4 would be rounded away.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(TARGETS))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]
    _to_float(module)


def remove_adapter(module: nn.Module) -> None:
    """Take the adapter off, if there is one."""
    if has_adapter(module):
        module.delete_adapters(ADAPTER)  # type: ignore[operator]
        module.requires_grad_(False)


def has_adapter(module: nn.Module) -> bool:
    """Whether the module carries the policy's adapter."""
    return ADAPTER in getattr(module, "peft_config", {})


def save_adapter(module: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write FOLDER/pytorch_lora_weights.safetensors as `WanPipeline.save_lora_weights` does, alpha in the metadata.

    Without that metadata diffusers would load the adapter with alpha = rank, silently. `state` replaces the module's
    own weights (by averaged ones, or gathered from ranks), under the module's names.
    """
    state = get_peft_model_state_dict(module, None if state is None else dict(state), adapter_name=ADAPTER)
    layers = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    config = module.peft_config[ADAPTER].to_dict()  # type: ignore[index, union-attr]
    # sets have no order of their own: sorted, so that equal adapters are equal files
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as aside:
        WanPipeline.save_lora_weights(aside, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata)
        publish_replace(folder / WEIGHTS, _ordered((Path(aside) / WEIGHTS).read_bytes()))


def load_adapter(module: nn.Module, folder: Path) -> None:
    """Put the adapter of FOLDER on a module, trainable, fp32, replacing the one that is there.

    Raises UserError when the file is missing, damaged, or made for other layers.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such file", "a policy folder holds high_noise/ and, with two experts, low_noise/")
    try:
        state, metadata = WanPipeline.lora_state_dict(str(folder), weight_name=WEIGHTS, return_lora_metadata=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as LoRA weights: {error}", "the file is damaged or foreign") from error
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    config = _config_of(state, metadata, path)
    remove_adapter(module)
    try:
        module.add_adapter(config, adapter_name=ADAPTER)  # type: ignore[operator]
    except ValueError as error:  # none of its layers is there
        raise UserError(f"{path}: has no layer of this model", "an adapter of another model") from error
    _to_float(module)
    module.eval()  # layers that peft adds are in training: the dropout of a foreign adapter would be on
    misfit = _misfit(state, get_peft_model_state_dict(module, adapter_name=ADAPTER))
    if misfit:
        remove_adapter(module)
        raise UserError(f"{path}: does not fit this model: {misfit}", "an adapter of another model")
    set_peft_model_state_dict(module, state, adapter_name=ADAPTER)


def _misfit(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """How the weights of an adapter differ from those a module has room for, by one example; empty when they fit."""
    for name in sorted(own.keys() | state.keys()):
        theirs, ours = (tuple(part[name].shape) if name in part else None for part in (state, own))
        if theirs != ours:
            known = f"is {list(ours)}" if ours else "does not exist"
            return f"{name} is {list(theirs)} there, and here {known}" if theirs else f"{name} is missing there"
    return ""


def expert_folder(folder: Path, expert: int, experts: int) -> Path:
    """Where the adapter of an expert lies: FOLDER/high_noise, or, for a plain adapter of one expert, FOLDER itself."""
    inner = folder / EXPERT_NAMES[expert]
    return folder if experts == 1 and not inner.is_dir() and (folder / WEIGHTS).is_file() else inner


def adapter_hashes(folder: Path, experts: tuple[int, ...]) -> dict[str, str]:
    """sha256 of every adapter file of a policy folder, by its path inside the folder."""
    paths = [expert_folder(folder, expert, len(experts)) / WEIGHTS for expert in experts]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file", "the policy folder is incomplete: train that iteration again")
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


def _config_of(state: dict[str, Tensor], metadata: dict[str, Any] | None, path: Path) -> LoraConfig:
    """The adapter's configuration: from the metadata, or read off the shapes (then alpha = rank, as in diffusers)."""
    if metadata:
        plain = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
        return LoraConfig(**plain)
    downs = {name: tensor for name, tensor in state.items() if name.endswith(".lora_A.weight")}
    ranks = {int(tensor.shape[0]) for tensor in downs.values()}
    if len(ranks) != 1:
        raise UserError(f"{path}: ranks {sorted(ranks)}, expected one rank for all layers", "save it with its metadata")
    rank = ranks.pop()
    targets = [name.removesuffix(".lora_A.weight") for name in downs]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)


def _ordered(data: bytes) -> list[bytes]:
    """A safetensors file with its header in a fixed order; the library writes metadata in a random one."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return [struct.pack("<Q", len(text)), text, data[8 + length :]]


def _to_float(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
