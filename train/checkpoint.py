"""Trainer state on disk: weights, AdamW, EMA, generators and cursor of one expert, whole or not at all.

A checkpoint is a folder `update-000007` of safetensors files written by torch.distributed.checkpoint, on one rank or on
many, and read on any number of ranks. It is written under another name, synced and renamed, so a folder of that name
is always whole. Nothing in it is a pickle.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from rollout.ranks.world import World
from shards.errors import RunFailed, UserError
from shards.files import Files, LocalFiles, sha256_file
from shards.records.kinds import CheckpointRecord, read_checkpoint
from shards.records.opening import COPY
from shards.run import COMMIT
from train.checkpoint_files import Writer, found
from train.ranks import is_lost

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KEEP = 2
PATIENCE = timedelta(minutes=30)  # for the slowest rank to write its part
_ROOT = "trainer"  # one entry at the top: DCP does its bookkeeping once per entry there
_ALONE = ".*(torch.distributed is|single process).*"  # DCP warns when there is one process
_writers: dict[object, Any] = {}  # the group of the writing threads, by the default one it belongs to


@dataclass
class TrainerState:
    """Everything that training one expert changes; under FSDP the tensors are DTensors."""

    parameters: dict[str, torch.nn.Parameter]
    """The trainable weights, by name."""
    optimizer: torch.optim.AdamW
    ema: dict[str, Tensor] = field(default_factory=dict)
    """Averaged weights, by the same names; empty when `train.ema` is 0."""
    updates: int = 0
    """Optimizer steps of this expert over all iterations; drives the warm-up."""


class Checkpoints:
    """Writes checkpoints one after another in a thread beside training, at most one at a time.

    All ranks must call `save` and `wait` at the same places. At the end of a `with` block the last one is waited for.
    """

    def __init__(self, keep: int = KEEP, asynchronous: bool = True, files: Files | None = None) -> None:
        self.keep, self.asynchronous, self.files = keep, asynchronous, files or LocalFiles()
        self._flying: tuple[Future[object], Writer] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            return self.wait()
        with suppress(RunFailed, RuntimeError):  # the first error is the one to tell
            self._settle()

    def save(self, directory: Path, state: TrainerState, update: int) -> Path:
        """Copy the state after `update` updates of this iteration and begin to write it; the copy is made on return.

        Waits for the write before. A whole checkpoint that exists is left as it is; all but the last `keep` are
        dropped. RunFailed when the disk of any rank is full or broken: here, at the next save, or in `wait`.
        """
        self.wait()
        final = directory / f"update-{update:06d}"
        ranks = World.joined()
        if ranks.broadcast(_whole(final)):
            return final
        writer = Writer(final, update, self.keep, self.files)
        warnings.filterwarnings("ignore", message=_ALONE)
        future = state_dict_saver.async_save(
            {_ROOT: state_tensors(state)},
            storage_writer=writer,
            process_group=_writing_group(),
            no_dist=ranks.size == 1,
        )
        assert isinstance(future, Future)
        self._flying = future, writer
        if not self.asynchronous:
            self.wait()
        return final

    def wait(self) -> None:
        """Until no checkpoint is being written. RunFailed, from rank 0, when the last one could not be."""
        try:
            self._settle()
        except RunFailed as error:
            if isinstance(error.__cause__, CheckpointException):  # torch told all ranks, so that all come here
                World.joined().one_voice(error)
            raise

    def _settle(self) -> None:
        """Wait, and say what came of it on this rank; RuntimeError when another rank is gone."""
        if self._flying is None:
            return
        (future, writer), self._flying = self._flying, None
        try:
            future.result()
        except (Exception, CheckpointException) as error:
            writer.discard()
            if is_lost(error):
                raise
            raise _failure(writer.final, error) from error


def save(directory: Path, state: TrainerState, update: int, keep: int = KEEP) -> Path:
    """Write one checkpoint and wait until it is on the disk; see `Checkpoints.save`."""
    return Checkpoints(keep, asynchronous=False).save(directory, state, update)


def latest(directory: Path, files: Files | None = None) -> tuple[int, Path] | None:
    """Number of updates and folder of the newest whole checkpoint, or None; all ranks get what the first one sees."""
    (files or LocalFiles()).fetch_newest(directory, COMMIT)
    whole = [update for update, path in found(directory) if _whole(path)]
    update = World.joined().broadcast(whole[-1] if whole else None)
    return None if update is None else (update, directory / f"update-{update:06d}")


def load(path: Path, state: TrainerState, *, weights: bool = True) -> dict[str, Tensor]:
    """Read a checkpoint into the live weights, optimizer, EMA and generator; returns the stored weights by name.

    The number of ranks may be another than that which wrote it; all of them must call this. With `weights=False` (the
    trainer of the iteration before) the weights and the generator stay as they are. UserError when the checkpoint was
    made with other trainable weights, or is damaged; nothing has been changed then.
    """
    commit = read_checkpoint(path / COMMIT, f"{COPY}, or delete {path.name}")
    live = state_tensors(state)
    _check_same(path, commit, live)
    _check_sums(path, commit.sha256)
    # read aside, so that reading can fail without having touched the live weights
    tensors = {name: torch.empty_like(value) for name, value in live.items() if name in commit.tensors}
    generators = {name: torch.get_rng_state() for name in commit.tensors if _is_generator(name)}
    tensors |= generators
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ALONE)
        reader, alone = HuggingFaceStorageReader(str(path)), World.joined().size == 1
        state_dict_loader.load({_ROOT: tensors}, storage_reader=reader, no_dist=alone)
    for name, parameter in state.parameters.items():
        if weights:
            parameter.data.copy_(tensors[f"weight.{name}"])
        # a fused optimizer counts where it steps, any other one on the host
        where = parameter.device if state.optimizer.defaults["fused"] else "cpu"
        state.optimizer.state[parameter] = {
            "step": tensors[f"step.{name}"].reshape(()).to(where, copy=True),
            "exp_avg": tensors[f"first.{name}"],
            "exp_avg_sq": tensors[f"second.{name}"],
        }
    state.ema = {name: tensors[f"ema.{name}"] for name in state.ema}
    state.updates = int(tensors["updates"].item())
    if weights:
        _set_generator(generators)
    return {name: tensors[f"weight.{name}"] for name in state.parameters}


def state_tensors(state: TrainerState) -> dict[str, Tensor]:
    """The live state as one flat dictionary of tensors; moments AdamW has not made yet are zeros at step 0."""
    tensors = {"updates": torch.tensor([state.updates]), _generator(World.joined().rank): torch.get_rng_state()}
    for name, parameter in state.parameters.items():
        moments = state.optimizer.state.get(parameter, {})
        tensors[f"weight.{name}"] = parameter.detach()
        tensors[f"step.{name}"] = torch.as_tensor(moments.get("step", 0.0), dtype=torch.float32).cpu().reshape(1)
        for ours, theirs in (("first", "exp_avg"), ("second", "exp_avg_sq")):
            tensors[f"{ours}.{name}"] = moments[theirs].detach() if theirs in moments else torch.zeros_like(parameter)
    return tensors | {f"ema.{name}": value.detach() for name, value in state.ema.items()}


def _generator(rank: int) -> str:
    """Name of the state of a rank's random generator."""
    return f"generator.{rank}" if rank else "generator"


def _is_generator(name: str) -> bool:
    return name.partition(".")[0] == "generator"


def _set_generator(stored: dict[str, Tensor]) -> None:
    """The generator of this rank; a rank that did not exist then gets a new one, drawn from that of another."""
    rank = World.joined().rank
    torch.set_rng_state(stored[_generator(rank % len(stored))])
    if rank >= len(stored):
        torch.manual_seed(int(torch.randint(2**62, ()).item()) + rank)


def _whole(path: Path) -> bool:
    """A folder that was renamed into place is whole; this also refuses one that somebody copied by half."""
    try:
        files = read_checkpoint(path / COMMIT).files
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, UserError):
        return False


def _check_same(path: Path, commit: CheckpointRecord, tensors: dict[str, Tensor]) -> None:
    stored = {name: tuple(shape) for name, shape in commit.tensors.items() if not _is_generator(name)}
    wanted = {name: tuple(value.shape) for name, value in tensors.items() if not _is_generator(name)}
    different = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if different:
        problem = f"{path} does not fit this model: {len(different)} tensors differ, first {different[0]}"
        hint = "train with the model.path, lora_rank and ema the run began with, or start a new run"
        raise World.joined().one_voice(UserError(problem, hint))


def _check_sums(path: Path, sums: dict[str, str]) -> None:
    """UserError on all ranks for a file whose content has changed; each rank reads its share of the files."""
    ranks = World.joined()
    mine = sorted(sums)[ranks.rank :: ranks.size]
    changed = ranks.gather(next((name for name in mine if sha256_file(path / name) != sums[name]), None))
    first = next((name for name in changed if name), None)
    if first:
        problem = f"{path / first} is damaged: its sha256 is not that in {COMMIT}"
        hint = f"restore it from a copy, or delete {path.name}; training then continues from the checkpoint before"
        raise ranks.one_voice(UserError(problem, hint))


def _failure(final: Path, error: BaseException) -> RunFailed:
    """What to tell of a checkpoint that was not written, whichever rank it failed on."""
    where, cause = "", error
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        where = "" if World.joined().size == 1 else f"rank {rank}: "
    reason = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, OSError | UserError):
        reason = getattr(cause, "strerror", None) or str(cause)
    return RunFailed(
        f"{final}: the trainer checkpoint could not be written ({where}{reason.splitlines()[0]})",
        "free some disk space, look at the permissions, and run the same command again; it continues from the "
        "checkpoint before",
    )


def _writing_group() -> ProcessGroup | None:
    """The process group of the writing threads: their messages must not mix with those of training."""
    if World.joined().size == 1:
        return None
    default = distributed.group.WORLD
    if default not in _writers:
        _writers.clear()
        _writers[default] = distributed.new_group(backend="gloo", timeout=PATIENCE)
    return _writers[default]
