"""Trainer checkpoints: bitwise resume, and nothing half-written is ever taken for whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shards.errors import RunFailed, UserError
from train import checkpoint
from train.checkpoint import TrainerState


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
    return [value for _, value in sorted(checkpoint._tensors(state).items())]


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


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.state_dict_saver, "save", full)
    with pytest.raises(RunFailed, match="No space left on device"):
        checkpoint.save(tmp_path / "trainer", make_state(), 1)
    assert list((tmp_path / "trainer").iterdir()) == []


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.test_checkpoint import checkpoint, make_state, step
state = make_state()
print("ready", flush=True)
for update in range(1, 100000):
    step(state)
    checkpoint.save(Path(sys.argv[2]), state, update)
"""


def test_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """A process that saves without pause is killed at several moments; what `latest` then names can be read."""
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen([sys.executable, "-c", WRITER, root, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    for number in range(6):
        time.sleep(0.05 + 0.013 * number)
        snapshot = tmp_path.with_name(f"{tmp_path.name}-{number}")
        process.send_signal(signal.SIGSTOP)  # a copy of the stopped process's files is what a kill would leave
        os.waitpid(process.pid, os.WUNTRACED)
        shutil.copytree(tmp_path, snapshot)
        process.send_signal(signal.SIGCONT)
        found = checkpoint.latest(snapshot)
        if found is not None:
            state = make_state()
            checkpoint.load(found[1], state)
            assert state.updates == found[0]
            checkpoint.save(snapshot, state, found[0] + 1)
            assert not list(snapshot.glob(".writing-*"))
    process.kill()
    process.wait()
    process.stdout.close()
    assert checkpoint.latest(tmp_path) is not None
