"""All four layouts of the Wan family, through rollout, score, train and the next rollout, with nothing faked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rollout.policy import Policy
from score.run import score
from shards.run import Run
from tests.support import training
from train.data import Rollouts, read_batch
from train.inputs import freeze
from train.replay import prove
from train.run import train
from train.trainer import ExpertTrainer

CASES: dict[str, dict[str, Any]] = {
    "t2v": {},
    "t2v2": {},
    "i2v2": {"image": True},
    "ti2v": {"height": 32, "width": 32},
    "ti2v with image": {"height": 32, "width": 32, "image": True, "frames": 9},
}
SMALL = {"prompts_per_iteration": 1, "group_size": 2, "batch_size": 2, "shift": 5.0}


def run_of(case: str, folder: Path, request: pytest.FixtureRequest, **train_settings: Any) -> Run:
    model = request.getfixturevalue(f"tiny_{case.split()[0]}")
    low = 1 if case in ("t2v2", "i2v2") else 0
    settings = {**SMALL, "high_steps": 2 - low, "low_steps": low, "guidance_scale": 3.0, **CASES[case]}
    score_all = {"rewards": {"contrast": 1.0}, "min_spread": 0.0}  # tiny random models draw nearly the same every time
    return training.make_run(folder / "run", model, {"kl_beta": 0.1, **train_settings}, score=score_all, **settings)


@pytest.mark.parametrize("case", CASES)
def test_a_layout_goes_round(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run = run_of(case, tmp_path, request)
    policy = Policy.of(run.config.model)
    stage = training.roll(run, 0, policy)
    report = score(run, stage)
    assert report.summary is not None
    assert report.summary["used_groups"] == 1
    trained = train(run, 0, policy)
    assert trained.replay == 0.0
    assert set(trained.updates.values()) == {2}
    assert len(trained.updates) == len(policy.layout.expert_ids)
    lines = [json.loads(line) for line in (stage.policy_dir / "metrics.jsonl").open()]
    assert all(line["gradient_norm"] > 0 for line in lines)
    assert [line["kl"] > 0 for line in lines] == [line["update"] > 1 for line in lines]
    after = training.roll(run, 1, policy)
    assert after.plan().policy.fingerprint == trained.fingerprint  # type: ignore[union-attr]
    assert prove(policy, Rollouts.open(after), samples=10**6, limit=0.0).largest == 0.0


@pytest.mark.parametrize("settings", [
    {"kl": "velocity"}, {"kl": "transition", "ratio_norm": True}, {"objective": "nft"}], ids=str)  # fmt: skip
def test_what_happens_in_the_given_frame_has_no_say(
    settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise added to the model's velocity at the given frame changes neither loss nor KL nor the measured shift."""
    run = run_of("ti2v with image", tmp_path, request, **settings)
    policy = Policy.of(run.config.model)
    stage = training.roll(run, 0, policy)
    training.advise(stage)
    inputs = freeze(run, stage)
    policy.experts.add_lora(2, 4.0, 0)
    trainer = ExpertTrainer(policy, inputs, run.config.train, 0)
    unit = inputs.units()[0]
    with torch.no_grad():
        for parameter in trainer.state.parameters.values():
            parameter += 0.05
    trainer.moved = True
    plain = trainer.backward(unit, 1.0, measure=True)
    assert plain["kl"].min() > 0
    original, calls = policy.velocity, [0]

    def disturbed(*arguments: Any) -> torch.Tensor:
        calls[0] += 1
        velocity = original(*arguments).clone()
        velocity[:, :, 0] += calls[0]  # another disturbance for each of current, old and reference
        return velocity

    monkeypatch.setattr(policy, "velocity", disturbed)
    again = trainer.backward(unit, 1.0, measure=True)
    assert calls[0] >= 2
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
    condition = read_batch(inputs.rollouts, policy, unit).condition
    assert condition is not None
    assert condition.shape[2] == 1
