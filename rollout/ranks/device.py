"""The device of a process: what [model] names, checked; under torchrun each rank of a machine has its own."""

from __future__ import annotations

import torch

from shards.errors import UserError
from shards.process.torchrun import local_rank, world_size


def find_device(name: str, dtype: str = "float32") -> torch.device:
    """The device of `model.device`. UserError when it is not there, or cannot compute in `dtype`."""
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"model.device: {name!r} is not a device", "auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device: {name}, but this machine has no CUDA device", "set model.device = auto")
    if device.type == "cuda" and world_size() > 1 and device.index is None:
        device = torch.device("cuda", local_rank())  # each rank of a machine has a device of its own
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        problem = f"model.device: {name}, but this machine has {torch.cuda.device_count()} CUDA devices"
        raise UserError(problem, "they are counted from 0: cuda:0, cuda:1")
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"model.dtype: bfloat16, which {name} cannot compute", "set model.dtype = float32")
    if dtype == "float16" and device.type == "cpu":
        problem = "model.dtype: float16, which a CPU computes badly or not at all"
        raise UserError(problem, "set model.dtype = float32, or bfloat16")
    return device


def device_of_worker(name: str, index: int, count: int) -> str:
    """`model.device` for one of `count` processes of this machine that each hold the whole model: a GPU for each.

    UserError where they are more than the GPUs, or where the name leaves them no choice. On a CPU they share it.
    """
    device = find_device(name)
    if device.type != "cuda":
        return name
    devices = torch.cuda.device_count()
    if device.index is not None or count > devices:
        there = f"model.device = {name} is one GPU" if device.index is not None else f"this machine has {devices}"
        fitting = 1 if device.index is not None else devices
        raise UserError(
            f"rollout.workers = {count}: each worker has the whole model on a GPU of its own, and {there}",
            f"set rollout.workers = {fitting}; `--worker i/n` shares a stage among machines",
        )
    return f"cuda:{index}"
