"""The first step of AdamW by hand: rates of each expert, warm-up, averages and the advantages' limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rollout.policy import Policy
from shards.config import TrainConfig
from shards.run import Run
from tests.support import training
from train.run import train
from train.trainer import _new_state

RATES = {"learning_rate": 4e-3, "learning_rate_2": 8e-4, "warmup": 4, "ema": 0.9, "kl_beta": 0.0}


@pytest.fixture(scope="module")
def rolled(tiny_t2v2: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = training.make_run(tmp_path_factory.mktemp("rates") / "run", tiny_t2v2, {**RATES, "updates_per_rollout": 1})
    training.advise(
        training.roll(run, 0, Policy.of(run.config.model)), lambda key: (50.0 if "s00" in key else -1.0, 1.0)
    )
    return run


def test_the_first_step_of_each_expert_is_its_own_rate_after_warm_up(rolled: Run, tmp_path: Path) -> None:
    """From B = 0 the first step of AdamW is the rate itself, up or down, in every element that has a gradient."""
    run = training.fork(rolled, tmp_path / "run")
    train(run, 0)
    after, average = training.weights(run, 0), training.weights(run, 0, "ema")
    for expert, rate in (("high_noise", 4e-3 / 4), ("low_noise", 8e-4 / 4)):
        ups = {name: value for name, value in after.items() if name.startswith(expert) and "lora_B" in name}
        assert ups
        for name, value in ups.items():
            moved = value[value != 0].abs()
            assert moved.numel() > 0.9 * value.numel()
            torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=0)
            torch.testing.assert_close(average[name], 0.1 * value, rtol=1e-3, atol=0)
    lines = [json.loads(line) for line in (run.iteration(0).policy_dir / "metrics.jsonl").open()]
    assert {line["expert"]: line["learning_rate"] for line in lines} == {"high_noise": 1e-3, "low_noise": 2e-4}
    assert {line["advantage_max"] for line in lines} == {5.0}  # of the 50 that were asked for


def test_warm_up_goes_on_over_iterations_and_ends_at_the_rate(rolled: Run, tmp_path: Path) -> None:
    run = training.fork(rolled, tmp_path / "run", updates_per_rollout=6)
    train(run, 0)
    lines = [json.loads(line) for line in (run.iteration(0).policy_dir / "metrics.jsonl").open()]
    for expert, rate in (("high_noise", 4e-3), ("low_noise", 8e-4)):
        rates = [line["learning_rate"] for line in lines if line["expert"] == expert]
        assert rates == pytest.approx([rate * share for share in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0)])


def test_the_optimizer_takes_its_settings_from_the_run() -> None:
    """Three steps of AdamW by hand (arXiv 1711.05101), with every setting far from its default."""
    config = TrainConfig(learning_rate=0.1, beta1=0.6, beta2=0.8, epsilon=0.03, weight_decay=0.2, ema=0.5)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    state = _new_state({"w": weight}, config)
    value, first, second = weight.detach().double(), torch.zeros(2).double(), torch.zeros(2).double()
    for step, gradient in enumerate(([0.3, -0.1], [0.2, 0.5], [-0.4, 0.1]), 1):
        weight.grad = torch.tensor(gradient)
        state.optimizer.step()
        first = 0.6 * first + 0.4 * weight.grad.double()
        second = 0.8 * second + 0.2 * weight.grad.double() ** 2
        root = (second / (1 - 0.8**step)).sqrt() + 0.03
        value = value * (1 - 0.1 * 0.2) - 0.1 * first / (1 - 0.6**step) / root
    torch.testing.assert_close(weight.detach().double(), value, rtol=1e-5, atol=0)
    assert torch.equal(state.ema["w"], torch.tensor([1.0, -2.0]))
    assert _new_state({"w": weight}, TrainConfig(ema=0.0)).ema == {}
