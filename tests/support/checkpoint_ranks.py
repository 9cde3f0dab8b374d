"""A small sharded training for the tests of checkpoints, by a rank of several or by a process alone."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rollout.ranks.world import World
from shards.errors import RunFailed, UserError
from train import checkpoint, checkpoint_files
from train.checkpoint import Checkpoints, TrainerState


class Small(nn.Module):
    """Sizes that no number of ranks divides, and a weight of one row, of which most ranks hold nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = torch.tanh(self.first(x)) * self.scale
        result: Tensor = self.second(hidden)
        return result


def make() -> tuple[Small, TrainerState]:
    """The module, sharded over the ranks there are, and its trainer; equal on every number of ranks."""
    torch.manual_seed(0)
    module = Small()
    if distributed.is_initialized():
        fully_shard(module)
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    return module, TrainerState(parameters, optimizer, {name: one.detach().clone() for name, one in parameters.items()})


def step(module: Small, state: TrainerState) -> float:
    """One update on a batch that depends on the number of updates alone."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(state.updates))
    state.optimizer.zero_grad()
    loss = (module(x) - x[:, :2]).square().mean()
    loss.backward()
    state.optimizer.step()
    state.updates += 1
    for name, average in state.ema.items():
        average.lerp_(state.parameters[name].detach(), 0.1)
    return loss.item()


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tensors(state: TrainerState) -> dict[str, Tensor]:
    """A copy of the whole state of all ranks, without generators."""
    return {
        name: whole(one).clone() for name, one in checkpoint.state_tensors(state).items() if "generator" not in name
    }


def go_on(folder: Path, first: int, last: int, keep: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    """Train from the checkpoint of `first` updates (0: from the beginning) to `last`; losses and state."""
    module, state = make()
    if first:
        checkpoint.load(folder / f"update-{first:06d}", state)
        assert state.updates == first
    with Checkpoints(keep) as checkpoints:
        losses = []
        for update in range(first + 1, last + 1):
            losses.append(step(module, state))
            checkpoints.save(folder, state, update)
    return losses, tensors(state)


def one_rank(folder: Path, first: int, last: int, result: Path, fail: bool = False) -> None:
    """Go on from the checkpoint of `first` updates, train up to `last` and save every update.

    The losses and what else was seen go into `result`. With `fail` one rank then cannot write, and another cannot read.
    """
    distributed.init_process_group("gloo")
    torch.manual_seed(100 + distributed.get_rank())
    checkpoint_files.FILE_BYTES = 200  # several files of each rank
    seen: dict[str, object] = {"losses": go_on(folder, first, last)[0]}
    state = make()[1]
    checkpoint.load(folder / f"update-{last:06d}", state)
    seen["drawn"] = gather(torch.rand(3))
    checkpoint.load(folder / f"update-{last:06d}", state)
    seen["again"] = gather(torch.rand(3))
    if fail:
        seen["full"] = gather(save_on_a_full_disk(folder, state))
        seen["misfit"] = gather(load_another(folder / f"update-{last:06d}"))
        files = sorted((folder / f"update-{last:06d}").glob("*.safetensors"))
        seen["damaged"] = {file.name: gather(load_damaged(file, state)) for file in files}
    if distributed.get_rank() == 0:
        torch.save(seen, result)
    World.joined().close()


def save_on_a_full_disk(folder: Path, state: TrainerState) -> str:
    """The disk of rank 1 alone is full; what a rank says, or keeps to itself, in brackets."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        checkpoint.save(folder, state, 99)
    except RunFailed as error:
        return f"({error.problem})" if error.told else error.problem
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def load_another(path: Path) -> str:
    """A trainer without averages meets a checkpoint with them; what a rank says, or keeps to itself, in brackets."""
    state = make()[1]
    state.ema = {}
    try:
        checkpoint.load(path, state)
    except UserError as error:
        return f"({error.problem})" if error.told else error.problem
    return ""


def load_damaged(file: Path, state: TrainerState) -> str:
    """A bit of a file is wrong; what a rank says of it, or keeps to itself, in brackets. It is mended afterwards."""
    good = file.read_bytes()
    distributed.barrier()
    if distributed.get_rank() == 0:
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    distributed.barrier()
    try:
        checkpoint.load(file.parent, state)
    except UserError as error:
        return f"({error.problem})" if error.told else error.problem
    finally:
        distributed.barrier()
        file.write_bytes(good)
    return ""


def gather(value: object) -> list[object]:
    """The values of all ranks."""
    found: list[object] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found
