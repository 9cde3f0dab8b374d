"""Memory on fake tensors: a step of a tiny model against its plan, shared weights, and the page."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import memory_fake
from bench.gpu import tracked
from bench.gpu.fakes import onto
from rollout.memory import needs
from rollout.memory.estimate import read_model, state_bytes
from rollout.memory.needs import Need
from tests.support import forks
from tests.support.training import make_run


def test_a_step_of_a_tiny_model_is_what_is_planned(tiny_t2v: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_t2v, {"lora_rank": 4}, low_steps=0, high_steps=1, height=64, width=64)
    model = read_model(run.config)
    need, state = needs._rollout(model), state_bytes(model.shape, "float32")
    # x, noise, velocities, mean, next state: of a tiny model they are not small, and the plan leaves them out
    assert 0 <= tracked.sampling(model) - need.device < 8 * state
    assert need.reserved > need.device


def test_fake_weights_have_a_device_and_stay_shared() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    with FakeTensorMode():
        onto(module, "cuda")
        assert {value.device.type for value in module.parameters()} == {"cuda"}
        assert module(torch.zeros(2, 3, device="cuda")).shape == (2, 3)
    assert module[0].weight is module[1].weight


def test_a_child_can_train_after_devices_that_are_not_there(tmp_path: Path) -> None:
    """Other tests of this process kill children in the midst of an update."""
    with FakeTensorMode():
        torch.zeros(2, device="cuda")
    torch.ones(1, requires_grad=True).sum().backward()
    forks.finish(forks.Fork(tmp_path / "child", lambda: torch.ones(1, requires_grad=True).sum().backward()))


def test_the_page_gets_every_row_as_it_comes(tmp_path: Path, monkeypatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin memory -->\n<!-- end memory -->\nafter\n", encoding="utf-8")
    seen = []

    def measured(row: str, model: object) -> int:
        seen.append(page.read_text(encoding="utf-8"))
        return 2**30

    monkeypatch.setattr(memory_fake, "measured", measured)
    monkeypatch.setattr(memory_fake, "plan_memory", lambda run, ranks: [Need("rollout", 2**30, 0, {}, 2**30)])
    memory_fake.main(["--row", "step", "--page", str(page)])
    assert [text.count("| yes |") for text in seen] == [0, 1, 2]
    text = page.read_text(encoding="utf-8")
    assert text.count("| step | 1.00 | 1.00 | 1.00 | yes |") == 3
    assert "Wan2.2-TI2V-5B, 704×1280×33" in text
    assert text.endswith("<!-- end memory -->\nafter\n")
