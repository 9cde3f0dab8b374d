"""The loss pieces against numbers computed another way, their gradients and their limits."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rollout import transitions as tr
from rollout.schedule import make_schedule
from shards.config import RolloutConfig, TrainConfig
from shards.records.schedule import Schedule
from train.batch_loss import weights_of_steps
from train.objectives.losses import (
    clip_advantage,
    kl_divergence,
    mean_shift,
    nft_loss,
    nft_optimality,
    pair_loss,
    policy_loss,
    ratio_norm,
    step_weights,
)

finite = st.floats(-3.0, 3.0, allow_nan=False, width=32)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "clipped"),
    [
        (0.0, 2.0, -2.0, False),
        (0.05, 2.0, -2.0 * math.exp(0.05), False),
        (0.5, 2.0, -2.0 * 1.1, True),  # a good sample already pulled in far enough
        (-0.5, 2.0, -2.0 * math.exp(-0.5), False),  # a good sample pushed away: full gradient back
        (0.5, -2.0, 2.0 * math.exp(0.5), False),  # a bad sample pulled in: full gradient back
        (-0.5, -2.0, 2.0 * 0.9, True),
    ],
)
def test_policy_loss_golden(log_ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    result = policy_loss(torch.tensor([log_ratio]), torch.tensor([advantage]), 0.1)
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)
    assert result.ratio.item() == pytest.approx(math.exp(log_ratio), rel=1e-6)
    assert bool(result.clipped.item()) is clipped


@given(log_ratio=finite, advantage=finite, clip=st.floats(1e-5, 0.5))
def test_policy_loss_is_never_below_the_unclipped_one_and_clipping_stops_the_gradient(
    log_ratio: float, advantage: float, clip: float
) -> None:
    assume(abs(abs(math.exp(log_ratio) - 1.0) - clip) > 1e-6)  # on the edge half a gradient is as right as all of it
    value = torch.tensor([log_ratio], requires_grad=True)
    result = policy_loss(value, torch.tensor([advantage]), clip)
    assert result.loss.item() >= -advantage * math.exp(log_ratio) - 1e-4
    (gradient,) = torch.autograd.grad(result.loss.sum(), value)
    expected = 0.0 if result.clipped.item() else -advantage * math.exp(log_ratio)
    assert gradient.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_descending_the_loss_makes_a_good_sample_likelier_and_a_bad_one_less() -> None:
    log_ratio = torch.zeros(2, requires_grad=True)
    policy_loss(log_ratio, torch.tensor([1.0, -1.0]), 1e-3).loss.sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad[0] < 0 < log_ratio.grad[1]


def test_clip_advantage_limits_both_sides() -> None:
    assert clip_advantage(torch.tensor([-9.0, 0.5, 9.0]), 5.0).tolist() == [-5.0, 0.5, 5.0]


def test_ratio_norm_takes_out_the_mean_shift() -> None:
    """With N elements log r is -d²/2 ± d/sqrt(N); RatioNorm leaves only the noise, times std."""
    generator = torch.Generator().manual_seed(3)
    std, d, shape = 0.2, 0.3, (4, 1, 1, 300, 300)
    old_mean = torch.randn(shape, generator=generator)
    mean = old_mean + d * std * torch.randn(shape, generator=generator)
    x_next = old_mean + std * torch.randn(shape, generator=generator)
    log_ratio = (torch.distributions.Normal(mean, std).log_prob(x_next)
                 - torch.distributions.Normal(old_mean, std).log_prob(x_next)).flatten(1).mean(1)  # fmt: skip
    torch.testing.assert_close(mean_shift(mean, old_mean, std), torch.full((4,), d), rtol=0.02, atol=0)
    assert (log_ratio + d**2 / 2).abs().max() < 0.01
    assert (log_ratio < -0.03).all()
    assert ratio_norm(log_ratio, mean, old_mean, std).abs().max() < 0.01 * std


def test_ratio_norm_is_exactly_the_identity_until_the_mean_moves() -> None:
    mean = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ratio_norm(torch.zeros(2), mean, mean.clone(), 0.1), torch.zeros(2))


def test_transition_kl_is_the_gaussian_one_and_velocity_kl_its_mean_square() -> None:
    generator = torch.Generator().manual_seed(1)
    mean, reference, velocity, reference_velocity = (torch.randn(2, 3, 5, generator=generator) for _ in range(4))
    arguments = {"velocity": velocity, "reference_velocity": reference_velocity, "mean": mean,
                 "reference_mean": reference, "std": 0.3}  # fmt: skip
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, 0.3), normal(reference, 0.3)).flatten(1).mean(1)
    torch.testing.assert_close(kl_divergence("transition", **arguments), expected)
    by_hand = [sum((a - b) ** 2 for a, b in zip(v.flatten().tolist(), r.flatten().tolist(), strict=True)) / 15
               for v, r in zip(velocity, reference_velocity, strict=True)]  # fmt: skip
    torch.testing.assert_close(kl_divergence("velocity", **arguments), torch.tensor(by_hand))


@pytest.mark.parametrize("kind", ["velocity", "transition"])
def test_kl_gradient_reaches_the_velocity_and_not_the_reference(kind: str) -> None:
    velocity = torch.ones(1, 4, requires_grad=True)
    reference = torch.zeros(1, 4, requires_grad=True)
    kl = kl_divergence(kind, velocity=velocity, reference_velocity=reference, mean=-0.5 * velocity,
                       reference_mean=-0.5 * reference, std=0.5)  # type: ignore[arg-type]  # fmt: skip
    kl.sum().backward()
    assert velocity.grad is not None
    assert (velocity.grad > 0).all()
    assert reference.grad is None


@given(stds=st.dictionaries(st.integers(0, 50), st.floats(0.01, 2.0), min_size=1), power=st.floats(0.2, 5.0))
def test_step_weights_average_to_one_and_level_the_gradient(stds: dict[int, float], power: float) -> None:
    scales = {step: std**power for step, std in stds.items()}
    for kind in ("none", "std", "inverse-gradient"):
        weights = step_weights(kind, stds, scales)  # type: ignore[arg-type]
        assert math.fsum(weights.values()) / len(weights) == pytest.approx(1.0)
    levelled = [step_weights("inverse-gradient", stds, scales)[step] * scales[step] for step in stds]
    assert max(levelled) == pytest.approx(min(levelled))
    by_std = step_weights("std", stds, scales)
    assert all(by_std[step] / std == pytest.approx(by_std[min(stds)] / stds[min(stds)]) for step, std in stds.items())


def test_nft_optimality_maps_advantages_to_probabilities() -> None:
    assert nft_optimality(torch.tensor([-9.0, -2.5, 0.0, 5.0]), 5.0).tolist() == [0.0, 0.25, 0.5, 1.0]


def test_nft_loss_golden() -> None:
    """One element, worked by hand: v=2, v_old=1, x=3, sigma=.5, x0=1, beta=1 -> v+=2, v-=0, x0+=2, x0-=3."""
    one = torch.ones(1, 1)
    loss = nft_loss(2 * one, one, 3 * one, one, 0.5, torch.tensor([0.75]), 1.0)
    assert loss.item() == pytest.approx(0.75 * (1.0 / 1.0) + 0.25 * (4.0 / 2.0))


@settings(deadline=None)
@given(beta=st.floats(0.1, 1.0), good=st.booleans())
def test_nft_pulls_towards_good_samples_and_away_from_bad_ones(beta: float, good: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise, old = (torch.randn(1, 8, generator=generator) for _ in range(3))
    sigma = 0.6
    velocity = old.clone().requires_grad_()
    x = (1 - sigma) * x0 + sigma * noise
    nft_loss(velocity, old, x, x0, sigma, torch.tensor([1.0 if good else 0.0]), beta).sum().backward()
    assert velocity.grad is not None
    towards = (noise - x0) - old  # the velocity that leads to x0
    assert ((-velocity.grad * towards).sum() > 0) == good


def test_nft_loss_of_many_elements_is_the_published_one() -> None:
    """DiffusionNFT, sample by sample in float64: r |x0(v+) - x0|^2 / w+ + (1-r) |x0(v-) - x0|^2 / w-, over beta."""
    generator = torch.Generator().manual_seed(5)
    velocity, old, x, x0 = (torch.randn(3, 2, 4, generator=generator) for _ in range(4))
    sigma, beta, optimality = 0.7, 0.3, torch.tensor([0.0, 0.25, 1.0])
    found = nft_loss(velocity, old, x, x0, sigma, optimality, beta)
    for row in range(3):
        v, o, noisy, clean = (tensor[row].double() for tensor in (velocity, old, x, x0))
        errors = []
        for mixed in (beta * v + (1 - beta) * o, (1 + beta) * o - beta * v):
            difference = (noisy - sigma * mixed) - clean
            errors.append((difference**2).mean() / difference.abs().mean())
        r = optimality[row].double()
        expected = (r * errors[0] + (1 - r) * errors[1]) / beta
        assert found[row].item() == pytest.approx(expected.item(), rel=1e-5)


def test_ratio_norm_weighted_by_inverse_gradient_is_grpo_guard_as_published() -> None:
    """exp((d log p + |d mean|^2 / (2 std^2)) std), clipped, over the length of the step, on Flow-GRPO's own step."""
    plan = plan_of("flow-sde")
    weights = weights_of(plan, ratio_norm=True)
    factors, clipped = [], 0
    for step in STEPS:
        x, old, move, noise = (tr.noise((6, 24), seed=4 * step + number).double() for number in range(4))
        s, dt = plan.sigmas[step], plan.sigmas[step + 1] - plan.sigmas[step]
        level = 0.7 * math.sqrt(s / (1 - s))
        slope = (1 + level**2 * (1 - s) / (2 * s)) * dt
        std, start = level * math.sqrt(-dt), x * (1 + level**2 / (2 * s) * dt)
        v = (old + 1e-3 * move).requires_grad_()
        before, mean = start + slope * old, start + slope * v
        x_next, advantage = before + std * noise, torch.tensor([2.0, -1.0, 0.5, 3.0, -2.0, 1.0], dtype=torch.float64)
        normal = torch.distributions.Normal
        log_ratio = (normal(mean, std).log_prob(x_next) - normal(before, std).log_prob(x_next)).mean(1)
        ratio = ((log_ratio + (mean - before).square().mean(1) / (2 * std**2)) * std).exp()
        limited = ratio.clamp(1 - 3e-6, 1 + 3e-6)
        published = torch.maximum(-advantage * ratio, -advantage * limited).mean() / -dt
        found = policy_loss(ratio_norm(log_ratio, mean, before, std), advantage, 3e-6)
        torch.testing.assert_close(found.ratio, ratio.detach(), rtol=0, atol=1e-10)
        ours = weights[step] * found.loss.mean()
        gradients = [torch.autograd.grad(loss, v, retain_graph=True)[0] for loss in (published, ours)]
        factors.append((gradients[1].norm() / gradients[0].norm()).item())
        torch.testing.assert_close(gradients[1], factors[-1] * gradients[0], rtol=1e-5, atol=1e-9)
        clipped += int(found.clipped.sum())
    assert factors == pytest.approx([factors[0]] * len(STEPS), rel=1e-5)  # one factor of all steps, for the optimizer
    assert 0 < clipped < 6 * len(STEPS)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("law", ["flow-sde", "dance-sde", "cps", "dpm-sde-2m"])
def test_the_weights_of_a_plan_let_every_step_pull_alike(law: str, normed: bool) -> None:
    """By autograd of the weighted log-ratio; `dpm-sde-2m` pulls half as hard again through its second order."""
    plan, pulls = plan_of(law), []
    weights = weights_of(plan, ratio_norm=normed)
    for step in STEPS:
        x, v, noise, before = (tr.noise((1, 50), seed=9 * step + number) for number in range(4))
        edge = plan.law, plan.form, x, v.requires_grad_(), plan.sigmas[step], plan.sigmas[step + 1], plan.eta
        mean, std = tr.transition(*edge, sigma_1=plan.sigmas[1], previous=(before, plan.sigmas[step - 1]))
        ratio = tr.log_prob((mean + std * noise).detach(), mean, std)
        ratio = ratio_norm(ratio, mean, mean.detach(), std) if normed else ratio
        (gradient,) = torch.autograd.grad(weights[step] * ratio.sum(), v)
        pulls.append((gradient / noise).abs().median().item())
    assert pulls == pytest.approx([pulls[0]] * len(STEPS), rel=2e-3)


def test_the_weights_of_wan_sde_are_nearly_those_of_the_script_it_comes_from() -> None:
    """Flow-GRPO's Wan script multiplies by std_dev_t over sqrt(-dt), the noise of the step over its length."""
    plan = replace(plan_of("wan-sde"), eta=1.0)
    script = [plan.sigmas[1] * plan.sigmas[step] / math.sqrt(plan.sigmas[step] - plan.sigmas[step + 1])
              for step in STEPS]  # fmt: skip
    ours = weights_of(plan, ratio_norm=False)
    quotients = [ours[step] / weight for step, weight in zip(STEPS, script, strict=True)]
    assert max(quotients) <= 1.125 * min(quotients)
    assert max(script) > 2 * min(script)


STEPS = (1, 2, 4, 6)


def plan_of(law: str) -> Schedule:
    """Eight steps of shift 5."""
    config = RolloutConfig(steps=8, shift=5.0, law=law, eta=0.7)  # type: ignore[arg-type]
    return make_schedule(config, boundary=None, scheduler_config={})


def weights_of(plan: Schedule, *, ratio_norm: bool) -> dict[int, float]:
    """The weights that training gives to STEPS of a plan, under `inverse-gradient`."""
    inputs: Any = SimpleNamespace(rollouts=SimpleNamespace(schedule=plan, steps=lambda _: list(STEPS)))
    return weights_of_steps(inputs, TrainConfig(step_weight="inverse-gradient", ratio_norm=ratio_norm), 0)


def test_masked_losses_are_those_of_the_elements_kept() -> None:
    generator = torch.Generator().manual_seed(7)
    a, b, c, d = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(4))
    mask = torch.ones(1, 1, 4, 1)
    mask[:, :, 0] = 0
    kept = [tensor[:, :, 1:] for tensor in (a, b, c, d)]
    torch.testing.assert_close(mean_shift(a, b, 0.3, mask), mean_shift(kept[0], kept[1], 0.3))
    zero = torch.zeros(2)
    torch.testing.assert_close(ratio_norm(zero, a, b, 0.3, mask), ratio_norm(zero, kept[0], kept[1], 0.3))
    good = torch.tensor([0.2, 0.9])
    torch.testing.assert_close(nft_loss(a, b, c, d, 0.5, good, 0.4, mask), nft_loss(*kept, 0.5, good, 0.4))


def test_what_a_pair_says_of_its_winner_and_its_loser() -> None:
    """By hand, beta 2: samples 0 and 1 moved alike, 2 further than both; 3 has no pair."""
    found = pair_loss(torch.tensor([0.0, 0.0, math.log(3.0), 9.0]), torch.tensor([0, 0]), torch.tensor([1, 2]), 2.0)
    one, other = math.log(2.0), -math.log(3.0 / 4.0)  # -log sigmoid(0) and -log sigmoid(log 3)
    expected = {
        "loss": [(one + other) / 4.0, one / 2.0, other / 2.0, 0.0],
        "push": [(1 / 2 + 1 / 4) / 2.0, -1 / 2, -1 / 4, 0.0],
        "right": [(1 / 2 + 1) / 2.0, 1 / 2, 1.0, 0.0],
        "wins": [1.0, 0.0, 0.0, 0.0],
    }
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), torch.tensor(values), rtol=1e-5, atol=1e-7, msg=name)
