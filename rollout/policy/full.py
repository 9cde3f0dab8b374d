"""Fully trained experts: saved and loaded as transformer folders in diffusers' layout, one folder per expert."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rollout.lora.find import WEIGHTS
from rollout.policy.folder import EXPERT_FOLDERS, Layout, load_transformer
from rollout.policy.sharding import plain_copy
from shards.errors import RunFailed, UserError
from shards.files import sha256_file, sync
from shards.records.opening import refuse_escape
from shards.run import EXPERT_NAMES

CONFIG = "config.json"


def is_full(folder: Path) -> bool:
    """Whether a policy folder holds whole transformers rather than adapters."""
    return (folder / EXPERT_NAMES[0] / CONFIG).is_file() and not (folder / EXPERT_NAMES[0] / WEIGHTS).is_file()


def save_full(module: nn.Module, folder: Path, base: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write FOLDER/config.json and its safetensors, whole or not at all, in the dtypes the module computes with.

    The configuration is that of `base`, the transformer folder it was loaded from, byte for byte, so that equal weights
    are equal files wherever they were trained. `state` are weights to be written instead of the module's own, all of
    them. RunFailed when the disk is full.
    """
    refuse_escape(folder)
    aside = folder.parent / f".writing-{folder.name}-{uuid.uuid4().hex}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # of a killed process: one trainer at a time has the claim on an expert
        for leftover in folder.parent.glob(f".writing-{folder.name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        source = module if state is None else plain_copy(module, state)
        source.save_pretrained(aside, safe_serialization=True)  # type: ignore[operator]
        shutil.copyfile(base / CONFIG, aside / CONFIG)
        for path in (*aside.iterdir(), aside):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # of a killed process too: policy.json commits what is here
        os.rename(aside, folder)
        sync(folder.parent)
    except OSError as error:
        problem = f"{folder}: the trained weights could not be written ({error.strerror or error})"
        raise RunFailed(problem, "free some disk space and run the same command again") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load_full(layout: Layout, folder: Path, dtype: str, device: torch.device) -> dict[int, nn.Module]:
    """The experts of a policy folder, frozen, in host memory, loaded by the loader of the base model.

    Raises UserError when one is missing, damaged, or of another architecture than the base model.
    """
    found = {}
    for expert in layout.expert_ids:
        place = folder / EXPERT_NAMES[expert]
        if not (place / CONFIG).is_file():
            raise UserError(
                f"{place / CONFIG}: no such file", "the policy folder is incomplete: train that iteration again"
            )
        if (place / CONFIG).read_bytes() != (layout.folder / EXPERT_FOLDERS[expert] / CONFIG).read_bytes():
            raise UserError(
                f"{place}: not an expert of {layout.folder}", "its config.json differs from the base model's"
            )
        found[expert] = load_transformer(layout, expert, dtype, device, place)
    return found


def full_hashes(folder: Path, experts: tuple[int, ...]) -> dict[str, str]:
    """sha256 of every file of the experts of a policy folder, by its path inside. UserError where one is missing."""
    hashes: dict[str, str] = {}
    for expert in experts:
        place = folder / EXPERT_NAMES[expert]
        files = sorted(path for path in place.glob("*") if path.suffix in (".json", ".safetensors"))
        if not {CONFIG} < {path.name for path in files}:
            problem = f"{place}: lacks {CONFIG} or its weights"
            raise UserError(problem, "the policy folder is incomplete: train that iteration again")
        hashes |= {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}
    return hashes
