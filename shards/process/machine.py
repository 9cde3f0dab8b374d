"""Which process of its machine this is, so that each takes a GPU of its own: as torchrun, srun or `--worker` say."""

from __future__ import annotations

import multiprocessing
import os
import re
from dataclasses import dataclass

from shards.errors import UserError
from shards.process import torchrun

STEP_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # of srun: `4(x2),3`, tasks on each node


@dataclass(frozen=True)
class LocalPlace:
    """One of the processes of a machine."""

    index: int
    """Its number there, from 0; of a worker that no launcher started, its number among all workers."""
    count: int | None
    """How many there are; None where no launcher says."""


_worker = [(0, 1, 1)]  # number of this worker, of how many, and the processes that each of them has
_helper: list[LocalPlace] = []  # that of a process which another one started


def take_place(part: tuple[int, int], processes: int = 1) -> None:
    """Say that this process is worker i of n, each of which has so many processes, itself the first of its own."""
    _worker[0] = (*part, processes)


def take_helper_place(of: LocalPlace | None) -> None:
    """In a helper process: its place, from that of the process which started it. Helpers are numbered as they start."""
    number = multiprocessing.current_process()._identity
    _helper[:] = [LocalPlace((of.index if of else 0) + (number[-1] - 1 if number else 0), None)]


def place() -> LocalPlace | None:
    """The place of this process; None for one that is alone. UserError for a variable that is not a number.

    torchrun and srun know who is on this machine. Workers that were started otherwise have their numbers.
    """
    number, count, each = _worker[0]
    if _helper:
        return _helper[0]
    if torchrun.world_size() > 1:
        local = torchrun.local_rank()
        return LocalPlace(local, max(torchrun.local_size(), local + 1))
    tasks = _tasks_of_node()
    if tasks > 1:
        return LocalPlace(torchrun.launched_number("SLURM_LOCALID", 0) * each, tasks * each)
    return None if count == 1 else LocalPlace(number * each, None)


def own_gpu(gpus: int) -> int | None:
    """The number of the GPU of this process among the `gpus` that it sees; None for a process that is alone.

    UserError where the processes of this machine are more than its GPUs. Where a launcher shows each of them only its
    own, by CUDA_VISIBLE_DEVICES, that is the first.
    """
    found = place()
    if found is None:
        return None
    if found.count is not None and found.count > gpus and not _has_one_to_itself(gpus):
        raise UserError(
            f"{found.count} processes on this machine, but {gpus} GPU{'' if gpus == 1 else 's'}",
            f"start {gpus} a machine, or set model.device = cpu",
        )
    return found.index % gpus


def shared_gpu(gpus: int) -> str:
    """A sentence for a worker that may have to share its GPU with others, as far as their numbers tell; or ""."""
    found, (number, count, each) = place(), _worker[0]
    if found is None or found.count is not None or count * each <= gpus or _has_one_to_itself(gpus):
        return ""
    most, own = max(1, gpus // each), found.index % gpus
    said = f"worker {number}/{count} takes GPU {own} of the {gpus} here"
    return f"{said}: where more than {most} workers are on one machine, they share GPUs"


def _has_one_to_itself(gpus: int) -> bool:
    return gpus == 1 and bool(os.environ.get("CUDA_VISIBLE_DEVICES"))


def _tasks_of_node() -> int:
    """Tasks of this step of srun on this node; 1 outside of srun."""
    found = STEP_TASKS.findall(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    each = [int(tasks) for tasks, times in found for _ in range(int(times or 1))]
    node = torchrun.launched_number("SLURM_NODEID", 0)
    return each[node] if node < len(each) else 1
