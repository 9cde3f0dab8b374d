"""The weights of a VideoReward checkpoint, read strictly and under the names of current transformers, LoRA merged.

Both layouts are read: one full `model.pth` (the release), or LoRA and the other trained weights in two files, with the
language model's own weights in the base model (what the released training script writes). The names in the files are
those of transformers 4.45 and peft. Source: the reference's `utils.py`, `train_reward.py` and `trainer.py`
(KwaiVGI/VideoAlign, git 219ab9d).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from score.videoalign.checkpoint import AGAIN, Checkpoint, ConfigSection
from shards.errors import UserError

FULL, ADAPTER, OTHERS = "model.pth", "adapter_model.safetensors", "non_lora_state_dict.pth"
SHOWN = 3  # keys named in an error


@dataclass(frozen=True)
class Names:
    """The names a checkpoint must use for the weights of `network`, in the layout of transformers 4.45 and peft."""

    plain: Mapping[str, str]
    """Name in the file -> name in the network."""
    lora: Mapping[str, tuple[str, str]]
    """Name in the network -> names of its lora_A and lora_B in the file."""
    head: str
    """lm_head, which a full file holds and scoring never uses."""

    @classmethod
    def of(cls, network: nn.Module, lora: ConfigSection) -> Names:
        """Names for a network made of `visual`, `language_model` and `rm_head`."""
        enabled = bool(lora.get("lora_enable"))
        prefix = "base_model.model." if enabled else ""
        targets = _lora_targets(network, lora) if enabled else {}
        plain, pairs = {}, {}
        for name in network.state_dict():
            module, _, leaf = name.rpartition(".")
            base = ".base_layer" if module in targets else ""
            plain[f"{prefix}{_old_name(module)}{base}.{leaf}"] = name
            if base and leaf == "weight":
                a, b = (f"{prefix}{targets[module]}.lora_{side}.default.weight" for side in "AB")
                pairs[name] = (a, b)
        return cls(plain, pairs, f"{prefix}lm_head.weight")


def _old_name(module: str) -> str:
    """A module of the network under its name in transformers 4.45."""
    return re.sub(r"^language_model\.", "model.", module)


def _lora_targets(network: nn.Module, lora: ConfigSection) -> dict[str, str]:
    """Modules with LoRA, new name -> old name: every linear or embedding whose old name holds no excluded word."""
    excluded = lora.get("lora_namespan_exclude") or []
    excluded = [excluded] if isinstance(excluded, str) else excluded
    found = {
        name: _old_name(name)
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and not any(word in _old_name(name) for word in excluded)
    }
    last = int(lora.get("num_lora_modules") or -1)
    return dict(list(found.items())[-last:]) if last > 0 else found


def read_weights(
    checkpoint: Checkpoint, base_model: Path, network: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of `network` by name, LoRA merged, float32. `convert` is applied to each stored tensor before.

    Raises UserError naming the first keys that are missing, unexpected or of another shape.
    """
    names = Names.of(network, checkpoint.lora)
    stored = _read_full(checkpoint, names) or _read_split(checkpoint, base_model, names)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    for file_name, name in names.plain.items():
        weight = convert(_shaped(checkpoint, file_name, stored[file_name], shapes[name]))
        if name in names.lora:
            a_name, b_name = names.lora[name]
            rank = int(checkpoint.lora["lora_r"])
            a = convert(_shaped(checkpoint, a_name, stored[a_name], torch.Size([rank, shapes[name][1]])))
            b = convert(_shaped(checkpoint, b_name, stored[b_name], torch.Size([shapes[name][0], rank])))
            weight = weight + checkpoint.lora_scale * (b @ a)
        yield name, weight


def _shaped(checkpoint: Checkpoint, key: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if tensor.shape != shape:
        raise UserError(
            f"{checkpoint.folder}: {key} is {list(tensor.shape)}, the configuration asks for {list(shape)}",
            f"check that {checkpoint.config_file.name} and `base_model` belong to this checkpoint",
        )
    return tensor.detach()


def _read_full(checkpoint: Checkpoint, names: Names) -> dict[str, torch.Tensor] | None:
    """All tensors of `model.pth` by their names there; None when the folder has no such file."""
    file = checkpoint.folder / FULL
    if not file.is_file():
        return None
    stored = _load_tensors(file)
    expected = {*names.plain, names.head, *(key for pair in names.lora.values() for key in pair)}
    _refuse_differences(file, missing=expected - set(stored), unexpected=set(stored) - expected)
    return stored


def _read_split(checkpoint: Checkpoint, base_model: Path, names: Names) -> dict[str, torch.Tensor]:
    """The tensors of the split layout under the names of the full one. What the adapter file holds counts last."""
    adapter_file, others_file = checkpoint.folder / ADAPTER, checkpoint.folder / OTHERS
    for file in (adapter_file, others_file):
        if not file.is_file():
            raise UserError(f"no {FULL} and no {file.name} in {checkpoint.folder}", AGAIN)
    others = _load_tensors(others_file)
    adapter = dict(_safe(adapter_file))
    full_names = {key.replace(".default.", "."): key for pair in names.lora.values() for key in pair}
    known = {*names.plain, names.head}
    _refuse_differences(others_file, missing=set(), unexpected=set(others) - known)
    _refuse_differences(
        adapter_file, missing=set(full_names) - set(adapter), unexpected=set(adapter) - known - set(full_names)
    )
    stored = others | {full_names.get(key, key): tensor for key, tensor in adapter.items()}
    absent = {file_name: name for file_name, name in names.plain.items() if file_name not in stored}
    from_base = {file_name: name for file_name, name in absent.items() if _frozen(name, checkpoint)}
    _refuse_differences(others_file, missing=set(absent) - set(from_base), unexpected=set())
    return stored | _read_base(base_model, from_base)


def _frozen(name: str, checkpoint: Checkpoint) -> bool:
    """Whether training left a weight as the base model has it: the language model's, the vision tower's if said so."""
    if name.startswith("language_model."):
        return not name.startswith("language_model.embed_tokens.")
    if not name.startswith("visual."):
        return False
    if checkpoint.lora.get("vision_lora"):
        return True
    if name.startswith("visual.merger."):
        return checkpoint.model.get("tune_merger") is False
    return checkpoint.model.get("freeze_vision_tower") is True


def _read_base(base_model: Path, wanted: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Weights of the base model, `wanted` as file name -> network name, under the file names."""
    spellings = {}  # a folder saved by transformers 4 or 5
    for file_name, name in wanted.items():
        spellings[_old_name(name)] = spellings[f"model.{name}"] = file_name
    found: dict[str, torch.Tensor] = {}
    files = sorted(base_model.glob("model*.safetensors"))
    if not files:
        raise UserError(
            f"no model*.safetensors in {base_model}",
            f"a checkpoint without {FULL} needs the base model's weights: give `base_model` their folder",
        )
    for file in files:
        found |= {spellings[key]: tensor for key, tensor in _safe(file, spellings)}
    missing = {_old_name(wanted[file_name]) for file_name in wanted if file_name not in found}
    _refuse_differences(base_model / "model*.safetensors", missing=missing, unexpected=set())
    return found


def _refuse_differences(file: Path, *, missing: set[str], unexpected: set[str]) -> None:
    """UserError that names keys which should not be there, or are not."""
    for keys, what in ((unexpected, "unexpected"), (missing, "missing")):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            shown = ", ".join(sorted(keys)[:SHOWN])
            raise UserError(
                f"{file}: {what} {'key' if len(keys) == 1 else 'keys'} {shown}{more}",
                "the file belongs to another model or is damaged",
            )


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `torch.save` file. Only tensors are unpickled; anything else in it is an error."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file} holds more than tensors, or is damaged, and is not opened", AGAIN) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}", AGAIN) from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{file} is not a table of tensors", AGAIN)
    return dict(content)


def _safe(file: Path, wanted: Mapping[str, str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a safetensors file, all or those in `wanted`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                if wanted is None or key in wanted:
                    yield key, tensors.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}", AGAIN) from None
