"""Trainer state on disk: weights, AdamW, EMA, generator and cursor of one expert, whole or not at all.

A checkpoint is a folder `update-000007` of safetensors files written by torch.distributed.checkpoint. It is written
under another name, synced and renamed, so a folder of that name is always whole. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from shards.errors import RunFailed, UserError
from shards.files import sync

KEEP = 2
COMMIT = "commit.json"
_ROOT = "trainer"  # one entry at the top: DCP does its bookkeeping once per entry there
_NAME = re.compile(r"^update-(\d{6})$")


@dataclass
class TrainerState:
    """Everything that training one expert changes."""

    parameters: dict[str, torch.nn.Parameter]
    """The trainable weights, by name."""
    optimizer: torch.optim.AdamW
    ema: dict[str, Tensor] = field(default_factory=dict)
    """Averaged weights, by the same names; empty when `train.ema` is 0."""
    updates: int = 0
    """Optimizer steps of this expert over all iterations; drives the warm-up."""


def save(directory: Path, state: TrainerState, update: int) -> Path:
    """Write the state after `update` updates of this iteration, then drop all but the last two checkpoints.

    A checkpoint that already exists is left as it is. RunFailed when the disk is full or cannot be written.
    """
    final = directory / f"update-{update:06d}"
    if final.exists():
        return final
    temporary = directory / f".writing-{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        _write(temporary, _tensors(state), update)
        os.rename(temporary, final)
        sync(directory)
    except OSError as error:
        raise RunFailed(
            f"{final}: the trainer checkpoint could not be written ({error.strerror or error})",
            "free some disk space and run the same command again; it goes on from the checkpoint before",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for _, old in _found(directory)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(directory: Path) -> tuple[int, Path] | None:
    """Number of updates and folder of the newest whole checkpoint, or None."""
    whole = [(update, path) for update, path in _found(directory) if _whole(path)]
    return whole[-1] if whole else None


def load(path: Path, state: TrainerState, *, weights: bool = True) -> dict[str, Tensor]:
    """Read a checkpoint into the live weights, optimizer, EMA and generator; returns the stored weights by name.

    With `weights=False` (the trainer of the iteration before) the weights and the generator stay as they are.
    UserError when the checkpoint was made with other trainable weights.
    """
    tensors = _tensors(state)
    _check_same(path, tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        state_dict_loader.load({_ROOT: tensors}, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=_alone())
    for name, parameter in state.parameters.items():
        if weights:
            parameter.data.copy_(tensors[f"weight.{name}"])
        state.optimizer.state[parameter] = {
            "step": tensors[f"step.{name}"].reshape(()).clone(),
            "exp_avg": tensors[f"first.{name}"],
            "exp_avg_sq": tensors[f"second.{name}"],
        }
    state.ema = {name: tensors[f"ema.{name}"] for name in state.ema}
    state.updates = int(tensors["updates"].item())
    if weights:
        torch.set_rng_state(tensors["generator"])
    return {name: tensors[f"weight.{name}"] for name in state.parameters}


def _tensors(state: TrainerState) -> dict[str, Tensor]:
    """The state as one flat dictionary of tensors; moments AdamW has not made yet are zeros at step 0.

    Copies, not views: reading a checkpoint must be able to fail without having touched the live weights.
    """
    tensors = {"updates": torch.tensor([state.updates]), "generator": torch.get_rng_state()}
    for name, parameter in state.parameters.items():
        moments = state.optimizer.state.get(parameter, {})
        tensors[f"weight.{name}"] = parameter.detach().clone()
        tensors[f"step.{name}"] = torch.as_tensor(moments.get("step", 0.0), dtype=torch.float32).cpu().reshape(1)
        for ours, theirs in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            tensors[f"{ours}.{name}"] = moments.get(theirs, torch.zeros_like(parameter)).detach().clone()
    return tensors | {f"ema.{name}": value.detach().clone() for name, value in state.ema.items()}


def _write(folder: Path, tensors: dict[str, Tensor], update: int) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        state_dict_saver.save({_ROOT: tensors}, storage_writer=writer, no_dist=_alone())
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    shapes = {name: list(value.shape) for name, value in sorted(tensors.items())}
    commit = folder / COMMIT
    commit.write_text(json.dumps({"schema": 1, "update": update, "files": sizes, "tensors": shapes}, indent=1) + "\n")
    for file in folder.iterdir():
        sync(file)
    sync(folder)


def _whole(path: Path) -> bool:
    """A folder that was renamed into place is whole; this also refuses one that somebody copied by half."""
    try:
        files = json.loads((path / COMMIT).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _check_same(path: Path, tensors: dict[str, Tensor]) -> None:
    stored = {name: tuple(shape) for name, shape in json.loads((path / COMMIT).read_text())["tensors"].items()}
    wanted = {name: tuple(value.shape) for name, value in tensors.items()}
    different = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if different:
        raise UserError(
            f"{path}: the checkpoint does not fit this model: {len(different)} tensors differ, first {different[0]}",
            "train with the model.path, lora_rank and ema the run began with, or start a new run",
        )


def _found(directory: Path) -> list[tuple[int, Path]]:
    names = [(match, path) for path in directory.glob("update-*") if (match := _NAME.match(path.name))]
    return sorted((int(match[1]), path) for match, path in names)


def _remove_leftovers(directory: Path) -> None:
    """A checkpoint that a killed process left half written."""
    for path in directory.glob(".writing-*"):
        shutil.rmtree(path, ignore_errors=True)


def _alone() -> bool:
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())
