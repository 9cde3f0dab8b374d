"""A census on fake devices: no step of sampling and no batch of an update makes the host wait, or mixes devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.gpu.fakes import HostRead, NoHostReads, onto
from bench.gpu.tiny import HELD, PUBLISHED
from rollout.policy import Policy
from rollout.sampler import Sampler, State
from shards.run import Run
from tests.support import training
from train import batch_loss
from train.inputs import freeze
from train.trainer import ExpertTrainer

# a given first frame, so that masks and masked means are in it
SETTINGS: dict[str, Any] = {
    "steps": 3, "prompts_per_iteration": 1, "group_size": 2, "shift": 5.0,
    "height": 32, "width": 32, "image": True, "high_steps": 1, "low_steps": 0,
}  # fmt: skip
OBJECTIVES: dict[str, dict[str, Any]] = {
    "published": {**PUBLISHED, "kl_beta": 0.1, "kl": "transition", "gradient_checkpointing": True},
    "held": HELD,
    "dpo": {"objective": "dpo", "pair_margin": 0.0},
}


def sampled(model: Path, folder: Path, **more: Any) -> tuple[Run, Policy]:
    run = training.make_run(folder / "run", model, **SETTINGS, **more)
    policy = Policy.of(run.config.model)
    training.advise(training.roll(run, 0, policy))
    return run, policy


@contextmanager
def faked(policy: Policy, device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[NoHostReads]:
    """The policy's experts on a device that need not be there, all of them at once."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for expert in policy.layout.expert_ids:
            onto(policy.experts.module(expert), device)
        for part in (policy, policy.experts, policy.text, policy.vae):
            monkeypatch.setattr(part, "device", torch.device(device))
        monkeypatch.setattr(policy.experts, "use", lambda expert: None)
        with NoHostReads() as census:
            yield census


def test_no_step_of_sampling_waits(tiny_ti2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, policy = sampled(tiny_ti2v, tmp_path)
    policy.experts.add_lora(2, 4.0, 0)
    stage = run.iteration(0)
    plan = stage.plan()
    assert plan is not None
    sampler = Sampler(policy, plan, stage.plan_sha256())
    shared = sampler.group_tensors([*plan.by_key])
    brought: list[State] = []
    with faked(policy, "cuda", monkeypatch) as census:

        def to_host(state: State) -> None:
            devices = {value.device.type for value in (state.x, *state.kept.values(), *state.log_prob.values())}
            assert devices <= {"cuda", "cpu"}
            assert state.x.device.type == "cuda"
            brought.append(state)

        monkeypatch.setattr(State, "to_host", to_host)  # the one place that may read, once a phase
        for chunk in plan.chunks([*plan.by_key]):
            for _, steps in sampler.phases:
                state = sampler.start(chunk)
                sampler.advance(chunk, state, shared, steps)
        assert census.seen > 500, census.seen
    assert len(brought) == len(sampler.phases)
    assert any(state.log_prob for state in brought)


def test_no_batch_of_an_update_waits(tiny_ti2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd asks for a context of CUDA, so the device is `meta`, which is nowhere and has a backward."""
    sampled_run, policy = sampled(tiny_ti2v, tmp_path, guidance_scale=0.0)
    policy.experts.add_lora(2, 4.0, 0)
    for objective, settings in OBJECTIVES.items():
        run = training.fork(sampled_run, tmp_path / objective, **settings)
        inputs = freeze(run, run.iteration(0))
        units = [unit for unit in inputs.units() if unit.expert == 0]
        stored = {unit: batch_loss._reader(run.config.train)(inputs.rollouts, unit) for unit in units}
        with faked(policy, "meta", monkeypatch) as census:
            trainer = ExpertTrainer(policy, inputs, run.config.train, 0)
            monkeypatch.setattr(trainer.losses.ahead, "take", lambda unit, following=None: stored[unit])  # noqa: B023
            trainer.moved = True
            trainer.losses.prepare([], trainer.moved)
            rows = [trainer.backward(unit, inputs.weight(units), measure=True) for unit in units]
            assert all(value.device.type == "meta" for one in rows for value in one.values()), objective
            assert all(value.grad is not None for value in trainer.state.parameters.values()), objective
            trainer.close()
            assert census.seen > 500, objective


@pytest.mark.parametrize("read", [
    lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x.tolist(), lambda x: bool((x > 0).any()),
    lambda x: x[x > 0], lambda x: torch.zeros(3).copy_(x), lambda x: x.nonzero(),
])  # fmt: skip
def test_the_census_sees_every_kind_of_read(read: Any) -> None:
    for device in ("cuda", "meta"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.zeros(3, device=device)
            with NoHostReads() as census:
                with pytest.raises(HostRead):
                    read(x)
                census.open = True
                assert (x + 1).device.type == device
            with pytest.raises((RuntimeError, AssertionError), match="device"):
                torch.zeros(3) + x  # mixed devices, which fake tensors refuse by themselves
