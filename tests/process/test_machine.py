"""Which GPU a process takes beside others of its machine. No GPU is at hand: torch's answers are put in its mouth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from rollout import processes
from rollout import run as rollout_run
from rollout.policy import Policy
from rollout.ranks import world
from rollout.ranks.device import device_of_worker, find_device, share_cores
from score.options import device_named
from shards.errors import UserError
from shards.process import machine
from shards.process.machine import LocalPlace, own_gpu, place, shared_gpu, take_helper_place, take_place
from tests.support import training
from train.run import train

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_LOCALID", "SLURM_NODEID",
             "SLURM_STEP_TASKS_PER_NODE", "CUDA_VISIBLE_DEVICES")  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that nobody started in a row, before and after."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    take_place((0, 1))
    yield
    take_place((0, 1))


def launched(monkeypatch: pytest.MonkeyPatch, **variables: int | str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """So many GPUs; returns what is asked of CUDA, in order."""
    asked: list[str] = []

    def answer(name: str, value: Any) -> None:
        def called(*arguments: Any, **_: Any) -> Any:
            asked.append(" ".join([name, *map(str, arguments)]))
            return value

        monkeypatch.setattr(torch.cuda, name, called)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    answer("set_device", None)
    answer("is_bf16_supported", True)
    return asked


def test_launchers_say_who_is_on_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place() is None
    take_place((5, 8))
    assert place() == LocalPlace(5, None)
    launched(monkeypatch, SLURM_LOCALID=0, SLURM_NODEID=0)  # in the script of a job, outside of srun
    assert place() == LocalPlace(5, None)
    launched(monkeypatch, SLURM_STEP_TASKS_PER_NODE="4(x2),3", SLURM_LOCALID=2, SLURM_NODEID=2)
    assert place() == LocalPlace(2, 3)
    take_place((0, 1), 2)  # each task of srun has a second process
    assert place() == LocalPlace(4, 6)
    launched(monkeypatch, WORLD_SIZE=16, RANK=9, LOCAL_RANK=1, LOCAL_WORLD_SIZE=8)
    assert place() == LocalPlace(1, 8)
    launched(monkeypatch, LOCAL_RANK="one")
    with pytest.raises(UserError, match="LOCAL_RANK = 'one' in the environment is not a number"):
        place()


def test_more_processes_than_gpus_are_refused_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    take_place((5, 8))
    assert own_gpu(4) == 1
    assert "worker 5/8 takes GPU 1 of the 4 here: where more than 4 workers are on one machine" in shared_gpu(4)
    assert shared_gpu(8) == ""
    launched(monkeypatch, WORLD_SIZE=4, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4)
    assert (own_gpu(4), shared_gpu(4)) == (3, "")
    with pytest.raises(UserError, match="4 processes on this machine, but 2 GPUs") as caught:
        own_gpu(2)
    assert caught.value.hint == "start 2 a machine, or set model.device = cpu"
    with pytest.raises(UserError, match=r"4 processes on this machine, but 1 GPU \(hint"):
        own_gpu(1)
    launched(monkeypatch, CUDA_VISIBLE_DEVICES=3)  # as srun does with --gpus-per-task=1
    assert own_gpu(1) == 0


def test_the_gpu_is_set_before_the_first_other_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gpus(monkeypatch, 4)
    take_place((6, 8))
    assert find_device("auto", "bfloat16") == torch.device("cuda:2")
    assert asked == ["set_device cuda:2", "is_bf16_supported"]
    assert find_device("cuda:3") == torch.device("cuda:3")
    assert asked[2:] == ["set_device cuda:3"]
    take_place((0, 1))
    assert find_device("cuda") == torch.device("cuda")
    assert asked[3:] == []
    assert find_device("cpu") == torch.device("cpu")


def test_ranks_join_on_the_gpu_of_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, backends = gpus(monkeypatch, 2), []
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **_: backends.append(backend))
    monkeypatch.setattr(world.atexit, "register", lambda _: None)
    for local, size in ((1, 2), (3, 4)):
        launched(monkeypatch, WORLD_SIZE=size, RANK=local, LOCAL_RANK=local, LOCAL_WORLD_SIZE=size, MASTER_ADDR="here")
        world._join()
    assert asked == ["set_device 1"]
    assert backends == ["cpu:gloo,cuda:nccl", "gloo"]  # four ranks on two GPUs can only mean a CPU
    with pytest.raises(UserError, match="4 processes on this machine, but 2 GPUs"):
        find_device("cuda")


def test_processes_of_a_worker_take_the_next_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 8)
    take_place((1, 2), 3)
    assert [device_of_worker("auto", index, 3) for index in range(3)] == ["cuda:3", "cuda:4", "cuda:5"]
    assert find_device("auto") == torch.device("cuda:3")
    launched(monkeypatch, SLURM_STEP_TASKS_PER_NODE="3", SLURM_LOCALID=2)
    with pytest.raises(UserError, match="9 processes on this machine, but 8 GPUs"):
        device_of_worker("auto", 0, 3)


def test_every_stage_takes_its_place_before_it_looks_for_a_device(
    tiny_t2v2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v2, prompts_per_iteration=1)
    places: list[LocalPlace | None] = []

    def looked(*_: object, **__: object) -> torch.device:
        places.append(place())
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout_run, "find_device", looked)
    with pytest.raises(KeyboardInterrupt):
        processes.rollout(run, run.iteration(0), worker=(1, 2))
    training.roll(run, 0, Policy.of(run.config.model))
    monkeypatch.setattr(Policy, "device_of", looked)
    for expert in ("high_noise", "low_noise", ""):
        with pytest.raises(KeyboardInterrupt):
            train(run, 0, expert=expert)
    assert places == [LocalPlace(1, None), LocalPlace(0, None), LocalPlace(1, None), None]


def test_rewards_take_a_gpu_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = gpus(monkeypatch, 2)
    monkeypatch.setattr(torch, "empty", lambda *_, device: torch.zeros(1))
    take_place((3, 4))
    assert device_named("auto") == torch.device("cuda:1")
    assert asked == ["set_device cuda:1"]
    assert device_named("cuda:0") == torch.device("cuda:0")
    take_place((0, 1))
    assert device_named("auto") == torch.device("cuda")


def test_helpers_that_score_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    take_place((1, 2), 2)
    of = place()
    assert of == LocalPlace(2, None)
    monkeypatch.setattr(machine, "_helper", [])
    monkeypatch.setattr(machine.multiprocessing, "current_process", lambda: SimpleNamespace(_identity=(2,)))
    take_helper_place(of)
    assert place() == LocalPlace(3, None)


@pytest.mark.parametrize(
    ("workers", "said", "threads"), [(1, None, []), (2, None, [4]), (3, None, [2]), (20, None, [1]), (2, "8", [])]
)
def test_processes_share_the_cores_of_a_cpu(
    workers: int, said: str | None, threads: list[int], tmp_path: Path, tiny_t2v2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v2, workers=workers)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    share_cores(run.config)
    assert given == threads
