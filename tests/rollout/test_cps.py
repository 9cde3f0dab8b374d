"""The un-normalised density of the public `cps` codes: same steps as `cps`, another log-prob, for parity runs only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rollout import transitions as tr
from rollout.policy import Policy
from shards.errors import UserError
from shards.run import Stage
from tests.support import training
from tests.support.training import frame_of
from train.run import train

PEER: Any = "cps-unnormalised"
STEPS = (0, 1, 2, 4, 8, 12, 16, 18)
PUBLISHED_R = (0.020, 0.034, 0.049, 0.082, 0.152, 0.217, 0.206, 0.096)
"""|d log-prob / d v| per unit of noise at shift 5, 20 steps, eta 0.8, measured apart from this program."""


def published(x_next: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Flow-CPS: -((prev_sample - prev_sample_mean) ** 2), then the mean over all but the batch."""
    return (-((x_next.detach() - mean) ** 2)).mean(dim=tuple(range(1, mean.ndim)))


def test_it_takes_the_steps_of_cps_and_scores_them_as_the_peers_do() -> None:
    for sigma, sigma_next in ((1.0, 0.98), (0.8, 0.7), (0.1, 0.03)):
        assert tr.kernel(PEER, "exact", sigma, sigma_next, 0.8, 0.98) == tr.kernel(
            "cps", "exact", sigma, sigma_next, 0.8, 0.98
        )
    mean, noise = tr.noise((3, 4, 2, 5, 5), seed=0), tr.noise((3, 4, 2, 5, 5), seed=1)
    assert torch.equal(tr.law_log_prob(PEER, mean + 0.3 * noise, mean, 0.3), published(mean + 0.3 * noise, mean))
    assert torch.equal(tr.law_log_prob("cps", mean + noise, mean, 0.3), tr.log_prob(mean + noise, mean, 0.3))
    mask = torch.ones(1, 1, 2, 1, 1)
    mask[:, :, 0] = 0
    kept = published((mean + noise)[:, :, 1:], mean[:, :, 1:])
    torch.testing.assert_close(tr.law_log_prob(PEER, mean + noise, mean, 0.3, mask), kept)


def test_its_gradient_is_the_published_one() -> None:
    line = np.linspace(1.0, 0.0, 21)
    sigmas = (5 * line / (1 + 4 * line)).tolist()
    found = [tr.gradient_scale(PEER, "exact", sigmas[i], sigmas[i + 1], 0.8, sigmas[1]) for i in STEPS]
    assert found == pytest.approx(PUBLISHED_R, abs=6e-4)
    x, v = tr.noise((2, 64), seed=0), tr.noise((2, 64), seed=1).requires_grad_()
    mean, std = tr.transition(PEER, "exact", x, v, 0.8, 0.7, 0.8, sigma_1=0.98)
    drawn = tr.noise(x.shape, seed=2)
    tr.law_log_prob(PEER, (mean + std * drawn).detach(), mean, std).sum().backward()
    assert v.grad is not None
    scale = tr.gradient_scale(PEER, "exact", 0.8, 0.7, 0.8, 0.98)
    torch.testing.assert_close((v.grad * 64).abs(), (scale * drawn).abs(), rtol=1e-4, atol=1e-6)


def test_a_parity_run_samples_the_same_videos_and_replays(tiny_t2v: Path, tmp_path: Path) -> None:
    policy = Policy.load(tiny_t2v, device="cpu", text_length=training.TEXT_LENGTH)
    small = {"prompts_per_iteration": 1, "group_size": 2, "low_steps": 0, "high_steps": 2, "eta": 0.8}
    stages: dict[str, Stage] = {}
    for law in ("cps", PEER):
        run = training.make_run(tmp_path / law, tiny_t2v, {"kl_beta": 0.0}, law=law, **small)
        stages[law] = training.roll(run, 0, policy)
    normal, peer = (frame_of(stages[law]) for law in ("cps", PEER))
    assert normal["latent_crc32"].map(list).tolist() == peer["latent_crc32"].map(list).tolist()
    assert all(value < 0 for row in peer["log_prob"] for value in row)
    assert not any(np.allclose(a, b) for a, b in zip(normal["log_prob"], peer["log_prob"], strict=True))
    training.advise(stages[PEER])
    report = train(run, 0, policy)
    assert report.replay == 0.0
    lines = [json.loads(line) for line in (stages[PEER].policy_dir / "metrics.jsonl").open()]
    assert all(line["gradient_norm"] > 0 for line in lines)


def test_ratio_norm_needs_a_density(tiny_t2v: Path, tmp_path: Path) -> None:
    run = training.make_run(tmp_path / "run", tiny_t2v, {"ratio_norm": True}, law=PEER, eta=0.8)
    with pytest.raises(UserError) as caught:
        train(run, 0)
    problem = "train.ratio_norm needs a density, which rollout.law = cps-unnormalised is not"
    assert (caught.value.problem, caught.value.hint) == (problem, "set rollout.law = cps")
