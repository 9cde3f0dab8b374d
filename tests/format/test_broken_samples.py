"""A sample whose numbers outgrow their dtype costs its own video, not the iteration."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rollout.policy import Policy
from rollout.run import regenerate, rollout
from score.run import score
from shards.reader import open_shard
from shards.run import Run, Stage
from tests.support import training
from train.run import train

STATUS = "its latents or log-probs are not finite"
SMALL = {"prompts_per_iteration": 1, "group_size": 4, "low_steps": 0, "high_steps": 2, "storage_dtype": "float16"}


def sampled(run: Run, policy: Policy, every: int) -> Stage:
    """Iteration 0 by a model whose answers number `every`, 2 `every`, … are too large for every second sample."""
    calls = []

    def outgrow(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        large = torch.tensor([1.0, 1.0 if len(calls) % every else 1e9])
        return out * large.view(2, *[1] * (out.ndim - 1))

    handle = policy.experts.module(0).proj_out.register_forward_hook(outgrow)  # type: ignore[union-attr]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # of a NaN that became a pixel
            report = rollout(run, run.iteration(0), policy)
    finally:
        handle.remove()
    assert (report.done, report.broken) == (4, 2)
    assert str(report).endswith("; 2 of them are not finite and earn no reward: take a wider dtype, or less guidance")
    return run.iteration(0)


@pytest.mark.parametrize(
    ("law", "every", "objective"),
    [("flow-sde", 1, "grpo"), ("dpm-sde-2m", 1, "grpo"), ("flow-sde", 12, "grpo"), ("flow-sde", 1, "nft")],
)
def test_a_sample_that_is_not_finite_is_missing_and_the_others_are_trained_on(
    law: str, every: int, objective: str, tiny_t2v: Path, tmp_path: Path
) -> None:
    """From the first of 12 forwards on, or in the last one, when all log-probs are there and finite."""
    policy = Policy.load(tiny_t2v, device="cpu", text_length=training.TEXT_LENGTH)
    rewards = {"rewards": {"contrast": 1.0}, "min_spread": 0.0, "max_missing": 1.0}
    settings = {"objective": objective, "kl_beta": 0.1}
    run = training.make_run(tmp_path / "run", tiny_t2v, settings, score=rewards, law=law, **SMALL)
    stage = sampled(run, policy, every)
    shard = open_shard(stage, 0)
    assert [shard.row(key)["status"] for key in shard.keys] == ["ok", STATUS, "ok", STATUS]
    assert not shard.latents(shard.keys[1], shard.row(shard.keys[1])["states"]).any()
    summary = score(run, stage).summary
    assert summary is not None
    assert (summary["missing"], summary["missing_reasons"]) == (2, {STATUS: 2})
    assert summary["used_groups"] == 1
    assert train(run, 0, policy).replay == 0.0
    trained = load_file(stage.policy_dir / "high_noise" / "pytorch_lora_weights.safetensors")
    assert all(torch.isfinite(value).all() for value in trained.values())
    assert all(value.any() for name, value in trained.items() if "lora_B" in name)
    policy.experts.become(None)
    whole = regenerate(run, stage, shard.keys[2], policy)  # beside a neighbour that is finite this time
    assert torch.equal(torch.as_tensor(whole.tensors["latents"]), shard.trajectory(shard.keys[2])["latents"])
