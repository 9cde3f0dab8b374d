"""The ranks of a run: who is who on the device mesh, what all of them must agree on, and how they speak with one voice.

The mesh has four dimensions, (replicate, dp, ring, ulysses). The first two determine a rank's data, the last its part
of the token sequence. FSDP shards over all but `replicate`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from shards.errors import UserError
from shards.process import torchrun
from shards.process.machine import own_gpu

if TYPE_CHECKING:
    from shards.config import RunConfig

PATIENCE = timedelta(minutes=30)  # a collective may wait for rank 0 to write a large policy

T = TypeVar("T")
_meshes: dict[tuple[str, int, int], tuple[DeviceMesh, DeviceMesh]] = {}


@dataclass(frozen=True)
class World:
    """The processes that work on one thing together."""

    rank: int = 0
    size: int = 1
    ulysses: int = 1
    """Ranks that share each token sequence."""
    replicate: int = 1
    """Copies of the sharded model; 1 is plain FSDP, more is HSDP."""
    device_mesh: DeviceMesh | None = None
    """(replicate, dp, ring, ulysses); None for a process alone."""
    fsdp_mesh: DeviceMesh | None = None
    """What weights are sharded on: one dimension, or (replicate, fsdp) for HSDP."""

    @classmethod
    def joined(cls) -> World:
        """The ranks that torchrun started, without a layout yet; one alone without torchrun. Joins them once a process.

        Collectives of host tensors go through gloo, those of device tensors through nccl.
        """
        rank, size = torchrun.rank(), torchrun.world_size()
        if size > 1:
            _join()
        return cls(rank, size)

    @classmethod
    def of(cls, config: RunConfig, device: torch.device | str) -> World:
        """The ranks as `train.ulysses` and `train.replicate` lay them out. UserError when that cannot be."""
        ranks = cls.joined()
        ulysses, replicate = config.train.ulysses, config.train.replicate
        with ranks.together():
            check_degrees(ranks.size, ulysses, replicate)
        if ranks.size == 1:
            return ranks
        meshes = _meshes_of(torch.device(device).type, ranks.size, ulysses, replicate)
        return cls(ranks.rank, ranks.size, ulysses, replicate, *meshes)

    @property
    def data_parallel(self) -> int:
        """Number of ranks, or groups of Ulysses ranks, that work on different samples."""
        return self.size // self.ulysses

    @property
    def data_rank(self) -> int:
        """Which of them this rank is in, from 0."""
        return self.rank // self.ulysses

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0

    # --- What all ranks do at the same point of the program ----------------------------------------------------------

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            self.gather(None)

    def broadcast(self, value: T) -> T:
        """What rank 0 has, on every rank; anything that pickles."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """What every rank has, in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def gather_data(self, value: T) -> list[T]:
        """The same over the ranks with different samples: one value from each group of Ulysses ranks, in order."""
        return self.gather(value)[:: self.ulysses]

    def agree(self, what: str, value: str) -> None:
        """UserError on all ranks, told by rank 0, when not all have the same `value`: who differs, and its first line
        that does."""
        if self.size == 1:
            return
        values = self.gather(value)
        others = [rank for rank, found in enumerate(values) if found != values[0]]
        if not others:
            return
        names = f"rank {others[0]} has" if len(others) == 1 else f"ranks {_listed(others)} have"
        theirs, ours = _first_difference(values[others[0]], values[0])
        raise self.one_voice(
            UserError(
                f"{names} another {what} than rank 0: {theirs} instead of {ours}",
                "all ranks need the same run directory, model, settings and software",
            )
        )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, each rank works for itself; what a UserError stops on one rank then stops all, and rank 0 says why.

        No collective may stand inside: a rank that failed would not come to it.
        """
        if self.size == 1:
            yield
            return
        mine: UserError | None = None
        try:
            yield
        except UserError as error:
            mine = error
        found = self.gather(None if mine is None else (type(mine), mine.problem, mine.hint, mine.exit_code))
        failed = [rank for rank, one in enumerate(found) if one is not None]
        if not failed:
            return
        kind, problem, hint, code = next(one for one in found if one is not None)
        if failed[0] > 0:
            problem = f"rank {failed[0]} of {self.size}: {problem}"
        told = kind(problem, hint)
        told.exit_code = code  # of a stop, which signal it was
        raise self.one_voice(told) from mine

    def one_voice(self, error: UserError) -> UserError:
        """An error that all ranks raise at the same place, after they have met there; all but rank 0 end quietly."""
        error.told = self.rank != 0
        self.part()
        return error

    def part(self) -> None:
        """Before all ranks end: wait until each of them has what the last collective gave it.

        A rank of gloo that wakes late, on a busy machine, takes the closed connection of one that has ended for an
        error of its own collective, although all of that has arrived (`UnboundBuffer::waitRecv` of its tcp transport
        looks for an exception first). Here such an error proves that the others have come this far.
        """
        with suppress(RuntimeError):
            self.barrier()

    def close(self) -> None:
        """Leave the other ranks, when all of them do."""
        self.part()
        _leave()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, sharing its memory; a plain tensor is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor; all ranks that share it must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _join() -> None:
    """Meet the other ranks, unless that was done before."""
    if dist.is_initialized():
        return
    if "MASTER_ADDR" not in os.environ:
        problem = (
            f"WORLD_SIZE = {torchrun.world_size()} in the environment, but no MASTER_ADDR where the ranks could meet"
        )
        raise UserError(problem, "start them with torchrun, or unset WORLD_SIZE")
    gpu = None
    with suppress(UserError):  # more ranks than GPUs: right on a CPU, and an error in find_device
        gpu = own_gpu(torch.cuda.device_count()) if torch.cuda.is_available() else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    dist.init_process_group("gloo" if gpu is None else "cpu:gloo,cuda:nccl", timeout=PATIENCE)
    atexit.register(_leave)


def _leave() -> None:
    _meshes.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _meshes_of(device: str, size: int, ulysses: int, replicate: int) -> tuple[DeviceMesh, DeviceMesh]:
    """The mesh of a layout and that of its shards; made once, because each makes process groups of its own."""
    key = (device, ulysses, replicate)
    if key not in _meshes:
        shards = size // replicate
        flat = init_device_mesh(device, (replicate, shards), mesh_dim_names=("replicate", "fsdp"))
        whole = flat._unflatten(1, (shards // ulysses, 1, ulysses), ("dp", "ring", "ulysses"))
        _meshes[key] = whole, flat["fsdp"] if replicate == 1 else flat
    return _meshes[key]


def check_degrees(size: int, ulysses: int, replicate: int) -> None:
    """UserError unless `size` ranks can be divided so; it says which degrees would do."""
    ranks = "1 rank" if size == 1 else f"{size} ranks"
    _check_degree("ulysses", ulysses, size, ranks)
    others = ranks if ulysses == 1 else f"{ranks} with train.ulysses = {ulysses}"
    _check_degree("replicate", replicate, size // ulysses, others)


def _check_degree(name: str, degree: int, of: int, who: str) -> None:
    if of % degree:
        fitting = [number for number in range(1, of + 1) if of % number == 0]
        start = "; torchrun --nproc-per-node N starts N ranks" if torchrun.world_size() == 1 else ""
        raise UserError(f"train.{name} = {degree}: {who} cannot be divided so", f"{_listed(fitting)} would do{start}")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _first_difference(one: str, other: str) -> tuple[str, str]:
    """The first line in which two texts differ, from each, cut to a readable length."""
    pairs = zip_longest(one.splitlines(), other.splitlines(), fillvalue="nothing")
    first = next((pair for pair in pairs if pair[0] != pair[1]), (one, other))
    a, b = (text if len(text) <= 120 else text[:117] + "..." for text in first)
    return a, b
