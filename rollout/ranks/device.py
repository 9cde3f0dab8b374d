"""The device of a process: what [model] names, checked; of several processes of a machine each has a GPU of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from shards.errors import UserError
from shards.process.machine import own_gpu, place

if TYPE_CHECKING:
    from shards.config import RunConfig


def find_device(name: str, dtype: str = "float32") -> torch.device:
    """The device of `model.device`, of several GPUs the one of this process.

    UserError when it is not there, cannot compute in `dtype`, or when there are more processes than GPUs.
    """
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise UserError(f"model.device: {name!r} is not a device", "auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"model.device: {name}, but this machine has no CUDA device", "set model.device = auto")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", own_gpu(torch.cuda.device_count()))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        problem = f"model.device: {name}, but this machine has {torch.cuda.device_count()} CUDA devices"
        raise UserError(problem, "they are counted from 0: cuda:0, cuda:1")
    if device.type == "cuda":
        use_device(device)
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"model.dtype: bfloat16, which {name} cannot compute", "set model.dtype = float32")
    if dtype == "float16" and device.type == "cpu":
        problem = "model.dtype: float16, which a CPU computes badly or not at all"
        raise UserError(problem, "set model.dtype = float32, or bfloat16")
    return device


def use_device(device: torch.device) -> None:
    """Make a GPU that has a number the current one of this process: what libraries make without a device of ours, and
    the first call that wakes CUDA, would else take memory of the first GPU."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def share_cores(config: RunConfig) -> None:
    """On a CPU give each of `rollout.workers` processes its part of the cores, in every stage alike.

    With all cores each, the threads of one process wait for those of another: on a busy machine for ten times as long
    as they compute. All stages have the same number, since it can change last bits. OMP_NUM_THREADS overrules it, and
    torchrun sets that.
    """
    workers = config.rollout.workers
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ and find_device(config.model.device).type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def device_of_worker(name: str, index: int, count: int) -> str:
    """`model.device` for one of `count` processes of a worker, which each hold the whole model: a GPU for each.

    UserError where they, and those of other workers that srun started here, are more than the GPUs, or where the name
    leaves them no choice. On a CPU they share it.
    """
    if find_device(name).type != "cuda":
        return name
    devices, one = torch.cuda.device_count(), torch.device("cuda" if name == "auto" else name).index is not None
    if one or count > devices:
        there = f"model.device = {name} is one GPU" if one else f"this machine has {devices}"
        fitting = 1 if one else devices
        raise UserError(
            f"rollout.workers = {count}: each worker has the whole model on a GPU of its own, and {there}",
            f"set rollout.workers = {fitting}; `--worker i/n` shares a stage among machines",
        )
    found = place()
    return f"cuda:{((found.index if found else 0) + index) % devices}"
