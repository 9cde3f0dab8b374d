"""Trainer checkpoints: bitwise resume, and nothing half-written is ever taken for whole."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rollout.ranks.world import World
from shards.errors import RunFailed, UserError
from tests.support.forks import Fork
from train import checkpoint, checkpoint_files
from train.checkpoint import Checkpoints, TrainerState

PATIENCE = 300.0  # seconds; a busy machine may let no thread on for a while


def make_state(width: int = 4) -> TrainerState:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, width)
    parameters = dict(layer.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    return TrainerState(parameters, optimizer, {name: value.detach().clone() for name, value in parameters.items()})


def step(state: TrainerState) -> None:
    weight, bias = state.parameters["weight"], state.parameters["bias"]
    state.optimizer.zero_grad()
    (torch.randn(2, 3) @ weight.T + bias).square().sum().backward()
    state.optimizer.step()
    state.updates += 1
    for name, average in state.ema.items():
        average.lerp_(state.parameters[name].detach(), 0.1)


def everything(state: TrainerState) -> list[torch.Tensor]:
    return [value.clone() for _, value in sorted(checkpoint.state_tensors(state).items())]


def same(one: TrainerState, other: TrainerState) -> bool:
    return all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))


def test_resume_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    straight = make_state()
    torch.manual_seed(1)
    for update in range(1, 6):
        step(straight)
        if update == 3:
            checkpoint.save(tmp_path, straight, update)
    resumed = make_state()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found[0] == 3
    torch.manual_seed(99)
    checkpoint.load(found[1], resumed)
    for _ in range(2):
        step(resumed)
    assert same(straight, resumed)


def test_the_next_iteration_takes_the_optimizer_but_not_the_weights(tmp_path: Path) -> None:
    before = make_state()
    step(before)
    path = checkpoint.save(tmp_path, before, 1)
    after = make_state()
    initial = after.parameters["weight"].detach().clone()
    checkpoint.load(path, after, weights=False)
    assert torch.equal(after.parameters["weight"], initial)
    moments = after.optimizer.state[after.parameters["weight"]]
    assert torch.equal(moments["exp_avg"], before.optimizer.state[before.parameters["weight"]]["exp_avg"])
    assert moments["step"].item() == 1
    assert after.updates == 1


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    state = make_state()
    for update in range(1, 6):
        step(state)
        checkpoint.save(tmp_path, state, update)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-000004", "update-000005"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    state = make_state()
    for update in (1, 2):
        step(state)
        checkpoint.save(tmp_path, state, update)
    tensors = next((tmp_path / "update-000002").glob("*.safetensors"))
    os.truncate(tensors, tensors.stat().st_size // 2)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found[0] == 1
    checkpoint.save(tmp_path, state, 2)
    assert checkpoint.latest(tmp_path) == (2, tmp_path / "update-000002")


def test_nothing_on_disk_is_a_pickle(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, make_state(), 0)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, make_state(), 1)
    other = make_state(width=5)
    before = everything(other)
    with pytest.raises(UserError, match="does not fit this model"):
        checkpoint.load(path, other)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(other), strict=True))


@contextmanager
def full_disk(after: int = 2000) -> Iterator[None]:
    """No file can grow beyond `after` bytes: writing fails half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(RunFailed, match=r"could not be written \(File too large"):
        checkpoint.save(tmp_path / "trainer", make_state(), 1)
    assert list((tmp_path / "trainer").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "policy").write_text("")
    with pytest.raises(RunFailed, match="Not a directory"):
        checkpoint.save(tmp_path / "policy" / "trainer", make_state(), 1)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, make_state(), 1)
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    other = make_state(width=4)
    step(other)
    before = everything(other)
    with pytest.raises(UserError, match=f"{file.name} is damaged: its sha256"):
        checkpoint.load(path, other)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(other), strict=True))


def test_large_states_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "FILE_BYTES", 100)
    state = make_state()
    step(state)
    path = checkpoint.save(tmp_path, state, 1)
    assert len(list(path.glob("*.safetensors"))) > 3
    other = make_state(width=4)
    checkpoint.load(path, other)
    assert same(state, other)


def test_all_is_on_the_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(handle: int) -> None:
        fsync(handle)
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    def noted_rename(old: Path, new: Path) -> None:
        rename(old, new)
        done.append(f"{old.name} -> {new.name}")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    path = checkpoint.save(tmp_path, make_state(), 1)
    tensors = sorted(file.name for file in path.glob("*.safetensors"))
    assert sorted({*done[:-4]}) == tensors  # each of them twice: their headers are put in order
    aside = done[-2].partition(" -> ")[0]
    assert done[-4:] == ["commit.json", aside, f"{aside} -> {path.name}", tmp_path.name]


class Held:
    """Holds the writing thread back until it is let go; counts the writes at work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.most = threading.Event(), threading.Event(), 0
        write, at_work = checkpoint_files.Writer.write_data, []

        def held(writer: checkpoint_files.Writer, plan: object, planner: object) -> object:
            at_work.append(writer)
            self.most = max(self.most, len(at_work))
            self.begun.set()
            assert self.go.wait(PATIENCE)
            result = write(writer, plan, planner)  # type: ignore[arg-type]
            at_work.remove(writer)
            return result

        monkeypatch.setattr(checkpoint_files.Writer, "write_data", held)


def test_training_goes_on_while_a_snapshot_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, state = Held(monkeypatch), make_state()
    step(state)
    then = everything(state)
    with Checkpoints() as checkpoints:
        checkpoints.save(tmp_path, state, 1)
        assert held.begun.wait(PATIENCE)
        for _ in range(3):
            step(state)  # in place, on the very tensors that are being written
        assert checkpoint.latest(tmp_path) is None
        held.go.set()
    assert not all(torch.equal(a, b) for a, b in zip(then, everything(state), strict=True))
    other = make_state()
    checkpoint.load(tmp_path / "update-000001", other)
    assert all(torch.equal(a, b) for a, b in zip(then, everything(other), strict=True))


def test_at_most_one_snapshot_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, state = Held(monkeypatch), make_state()
    with Checkpoints(keep=9) as checkpoints:
        checkpoints.save(tmp_path, state, 1)
        assert held.begun.wait(PATIENCE)
        threading.Timer(0.3, held.go.set).start()
        checkpoints.save(tmp_path, state, 2)
        assert (tmp_path / "update-000001").exists()
    assert held.most == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-000001", "update-000002"]


def test_without_async_the_snapshot_is_there_on_return(tmp_path: Path) -> None:
    checkpoints = Checkpoints(keep=1, asynchronous=False)
    for update in (1, 2):
        checkpoints.save(tmp_path, make_state(), update)
        assert [path.name for path in tmp_path.iterdir()] == [f"update-{update:06d}"]


@pytest.mark.parametrize("where", ["wait", "next save", "end of the block"])
def test_an_error_in_the_writing_thread_reaches_the_caller(tmp_path: Path, where: str) -> None:
    state = make_state()

    def work() -> None:
        with full_disk(), Checkpoints() as checkpoints:
            checkpoints.save(tmp_path, state, 1)
            if where == "wait":
                checkpoints.wait()
            elif where == "next save":
                checkpoints.save(tmp_path, state, 2)

    with pytest.raises(RunFailed, match=r"update-000001: .*File too large"):
        work()
    assert list(tmp_path.iterdir()) == []


def test_the_first_error_is_told_not_that_of_the_snapshot(tmp_path: Path) -> None:
    def work() -> None:
        with full_disk(), Checkpoints() as checkpoints:
            checkpoints.save(tmp_path, make_state(), 1)
            raise KeyError

    with pytest.raises(KeyError):
        work()


def test_a_rank_that_did_not_exist_gets_random_numbers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state()
    path, drawn = checkpoint.save(tmp_path, state, 1), []
    for rank in (0, 1, 2, 1):
        monkeypatch.setattr(World, "joined", lambda rank=rank: World(rank))
        monkeypatch.setattr(checkpoint, "_check_sums", lambda *_: None)
        checkpoint.load(path, state)
        drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 3
    assert drawn[1] == drawn[3]


def write_without_pause(folder: Path) -> None:
    state = make_state()
    for update in itertools.count(1):
        step(state)
        checkpoint.save(folder, state, update)


def test_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """A process that saves without pause is killed at several moments; what `latest` then names can be read."""
    process = Fork(tmp_path.with_name(f"{tmp_path.name}-process"), lambda: write_without_pause(tmp_path))
    deadline = time.monotonic() + PATIENCE
    while checkpoint.latest(tmp_path) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in range(6):
        time.sleep(0.05 + 0.013 * number)
        snapshot = tmp_path.with_name(f"{tmp_path.name}-{number}")
        process.send(signal.SIGSTOP)  # a copy of the stopped process's files is what a kill would leave
        os.waitpid(process.pid, os.WUNTRACED)
        shutil.copytree(tmp_path, snapshot)
        process.send(signal.SIGCONT)
        found = checkpoint.latest(snapshot)
        assert found is not None
        state = make_state()
        checkpoint.load(found[1], state)
        assert state.updates == found[0]
        checkpoint.save(snapshot, state, found[0] + 1)
        assert not list(snapshot.glob(".writing-*"))
        assert checkpoint.latest(snapshot) == (found[0] + 1, snapshot / f"update-{found[0] + 1:06d}")
    process.end()


def test_equal_states_have_equal_bytes(tmp_path: Path) -> None:
    """safetensors writes metadata in the order of a hash table, another one in each process."""
    tensors = b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    kept = []
    for number, metadata in enumerate((b'{"a":"{\\"x\\": 1}","b":"2"}', b'{"b":"2","a":"{\\"x\\": 1}"}')):
        header = (b'{"__metadata__":' + metadata + b"," + tensors).ljust(96)
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        checkpoint_files.put_header_in_order(path)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"a": '{"x": 1}', "b": "2"}
            assert file.get_tensor("w").tolist() == [0.0]
        kept.append(path.read_bytes())
    assert kept[0] == kept[1]
