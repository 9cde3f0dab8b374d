"""The estimators of the policy gradient against expectations, closed forms and finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from rollout.schedule import make_schedule, step_kernel, step_slope, step_std
from rollout.transitions import gradient_scale
from shards.config import RolloutConfig
from shards.records.schedule import Schedule
from train.objectives import estimators
from train.objectives.losses import held_loss, nft_loss, nft_optimality, policy_loss

SAMPLES = 200_000
Array = NDArray[np.float64]


def plan_of(steps: int, law: str, eta: float, form: str = "exact") -> Schedule:
    """A schedule of shift 3."""
    config = RolloutConfig(steps=steps, shift=3.0, law=law, eta=eta, form=form)  # type: ignore[arg-type]
    return make_schedule(config, boundary=None, scheduler_config={})


# --- Data with a known velocity --------------------------------------------------------------------------------------


class Mixture:
    """Equal isotropic Gaussians at `centres` [M, D] with standard deviation `std`, and the velocity that fits them."""

    def __init__(self, centres: Array, std: float) -> None:
        self.centres, self.std = centres, std

    def clean(self, x: Array, sigma: float) -> Array:
        """E[x0 | x] at sigma, for x [n, D], in float64 by Bayes' rule."""
        spread = (1.0 - sigma) ** 2 * self.std**2 + sigma**2
        distance = x[:, None] - (1.0 - sigma) * self.centres
        logits = -0.5 * (distance**2).sum(-1) / spread
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        each = self.centres + (1.0 - sigma) * self.std**2 / spread * distance
        return np.asarray((share[..., None] * each).sum(1))


ONE_GAUSSIAN = Mixture(np.zeros((1, 1)), 1.0)


def sample(data: Mixture, plan: Schedule, window: list[int], count: int, seed: int) -> dict[int, tuple[Array, Array]]:
    """States x_k and noises z_k of the window steps, and under N the final x0 twice: each [count, D]."""
    rng = np.random.default_rng(seed)
    shape = (count, data.centres.shape[1])
    x = rng.standard_normal(shape)
    kept = {}
    for step in range(plan.steps):
        sigma, following = plan.sigmas[step], plan.sigmas[step + 1]
        velocity = (x - data.clean(x, sigma)) / sigma
        if step not in window:
            x = x + (following - sigma) * velocity
            continue
        noise = rng.standard_normal(shape)
        kept[step] = (x, noise)
        on_x, on_velocity, std = step_kernel(plan, step)
        x = on_x * x + on_velocity * velocity + std * noise
    return kept | {plan.steps: (x, x)}


def both(data: Mixture, plan: Schedule, step: int, kept: dict[int, tuple[Array, Array]]) -> tuple[Array, Array]:
    """What `noise` and `endpoint` ask of the mean of a step, in its standard deviations: [count, D] each."""
    (x, noise), (x0, _) = kept[step], kept[plan.steps]
    kappa = -step_slope(plan, step) / plan.sigmas[step]
    return noise, kappa * (x0 - data.clean(x, plan.sigmas[step])) / step_std(plan, step)


REWARDS: dict[str, Callable[[Array], Array]] = {
    "linear": lambda x0: x0,
    "smooth": lambda x0: np.tanh(2.0 * x0 - 1.0),
    "threshold": lambda x0: (x0 > 0.5).astype(float),
}


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize(("law", "eta", "form"), [
    ("flow-sde", math.sqrt(2.0), "exact"), ("flow-sde", 0.7, "exact"), ("flow-sde", 0.1, "exact"),
    ("dance-sde", 0.3, "exact"), ("wan-sde", 1.0, "exact"), ("cps", 0.5, "exact"), ("dpm-sde", 1.0, "exact"),
    ("flow-sde", 0.7, "euler-maruyama"),
])  # fmt: skip
def test_noise_and_endpoint_agree_up_to_the_factor_of_the_step(law: str, eta: float, form: str, reward: str) -> None:
    """E[A noise] over E[A endpoint] is `gaussian_factor`, whatever the reward A is; 4 standard errors."""
    plan, window = plan_of(10, law, eta, form), [1, 3, 5, 7]
    kept = sample(ONE_GAUSSIAN, plan, window, SAMPLES, seed=1)
    advantage = REWARDS[reward](kept[plan.steps][0])
    advantage = (advantage - advantage.mean()) / advantage.std()
    for step in window:
        noise, endpoint = both(ONE_GAUSSIAN, plan, step, kept)
        factor = estimators.gaussian_factor(plan, step, window)
        assert factor > 0
        residual = advantage * (noise - factor * endpoint)
        assert abs(residual.mean()) < 4.0 * residual.std() / math.sqrt(SAMPLES)
        assert (advantage * endpoint).mean() * factor > 0.01  # there is something to agree on


def test_the_factor_tends_to_one_where_the_chain_is_the_time_reversal_of_the_noising() -> None:
    for law, eta in (("flow-sde", math.sqrt(2.0)), ("dpm-sde", 1.0)):
        largest = []
        for steps in (10, 40, 160, 640):
            plan, window = plan_of(steps, law, eta), list(range(steps - 1))
            trained = [step for step in window if 0.2 < plan.sigmas[step] < 0.95]
            largest.append(max(abs(estimators.gaussian_factor(plan, step, window) - 1.0) for step in trained))
        # of first order in the length of a step: four times as many steps bring it to less than half
        assert all(after < 0.5 * before for before, after in itertools.pairwise(largest))
        assert largest[-1] < 0.05
    plan, window = plan_of(640, "flow-sde", 0.7), list(range(639))
    assert estimators.gaussian_factor(plan, window[160], window) > 2.0  # and to nothing of the kind for other laws


def test_the_calibrated_weight_hardly_depends_on_the_noise_of_the_law() -> None:
    """It holds the gradient of the reward itself, which a law only measures: eta .1 to .7 differ by a tenth."""
    window = [1, 2, 4, 6]
    for step in window:
        weights = [estimators.step_weight("calibrated", plan_of(10, "flow-sde", eta), step, window)
                   for eta in (0.1, 0.3, 0.5, 0.7)]  # fmt: skip
        assert max(weights) < 1.25 * min(weights)
    derived = [estimators.step_weight("derived", plan_of(10, "flow-sde", eta), 4, window) for eta in (0.1, 0.7)]
    assert derived[0] > 20 * derived[1]


@cache
def many_dimensions(dimensions: int) -> tuple[Mixture, Schedule, list[int], dict[int, tuple[Array, Array]]]:
    """Two modes that differ in the first dimension, and a sample of them."""
    centres = np.zeros((2, dimensions))
    centres[:, 0] = (-1.0, 1.0)
    data, plan, window = Mixture(centres, 0.4), plan_of(10, "flow-sde", 0.7), [1, 3, 5, 7]
    return data, plan, window, sample(data, plan, window, SAMPLES // max(1, dimensions // 4), seed=2)


@pytest.mark.parametrize("dimensions", [1, 16])
def test_on_a_mixture_both_point_the_same_way_and_the_variance_falls(
    dimensions: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gradient of a bias and of a linear map of the state; the reward tells which mode a sample is of."""
    data, plan, window, kept = many_dimensions(dimensions)
    advantage = np.sign(kept[plan.steps][0][:, :1])
    for step in window:
        state = np.concatenate([np.ones_like(advantage), kept[step][0]], 1)
        gradients = [(advantage * asked)[:, None, :] * state[:, :, None] for asked in both(data, plan, step, kept)]
        noise, endpoint = (gradient.mean(0).ravel() for gradient in gradients)
        cosine = noise @ endpoint / np.linalg.norm(noise) / np.linalg.norm(endpoint)
        assert cosine > 0.9, f"step {step}: {cosine}"
        # variance of the mean of as many samples, each scaled to a signal of 1
        spread = [gradient.var(0).sum() / (gradient.mean(0) ** 2).sum() for gradient in gradients]
        fall = spread[0] / spread[1]
        with capsys.disabled():
            print(
                f"\n{dimensions} dimensions, step {step}: cosine {cosine:.3f}, variance falls {fall:.1f} times", end=""
            )
        assert fall > 1.0


# --- Losses ----------------------------------------------------------------------------------------------------------


def velocities(seed: int, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """v, v_old and u: [count, 2, 3, 4, 5]."""
    generator = torch.Generator().manual_seed(seed)
    old, moved, wanted = (torch.randn(count, 2, 3, 4, 5, generator=generator) for _ in range(3))
    return old + 0.3 * moved, old, old + wanted


def by_hand(v: Tensor, old: Tensor, u: Tensor, weight: float, advantage: Tensor, proximal: float) -> Tensor:
    """-A <e, q> + lambda/2 |q|², in float64 from the definitions of e and q."""
    v, old, u = v.double(), old.double(), u.double()
    e, q = (math.sqrt(weight) * (one - old) for one in (u, v))
    pull, square = (value.flatten(1).mean(1) for value in (e * q, q * q))
    return -advantage.double() * pull + 0.5 * proximal * square


@pytest.mark.parametrize("proximal", [0.2, 1.0, 30.0])
def test_the_gradient_of_the_held_loss_is_that_of_finite_differences(proximal: float) -> None:
    v, old, u = velocities(0)
    advantage, weight = torch.tensor([1.3, -0.7, 2.0]), 0.6
    v.requires_grad_()
    compared = estimators.compare(v, old, u, weight)
    held = held_loss(compared.pull, compared.square, advantage, proximal, clip_range=10.0)
    torch.testing.assert_close(
        held.loss.double(), by_hand(v, old, u, weight, advantage, proximal), rtol=1e-5, atol=1e-6
    )
    (gradient,) = torch.autograd.grad(held.loss.sum(), v)
    generator = torch.Generator().manual_seed(9)
    for _ in range(5):
        direction, width = torch.randn(v.shape, generator=generator, dtype=torch.float64), 1e-4
        ahead, behind = (by_hand(v.detach() + side * width * direction, old, u, weight, advantage, proximal).sum()
                         for side in (1, -1))  # fmt: skip
        assert (gradient.double() * direction).sum() == pytest.approx(((ahead - behind) / (2 * width)).item(), rel=1e-4)


@given(seed=st.integers(0, 10_000), strength=st.floats(-5.0, 5.0), proximal=st.floats(0.05, 50.0))
@settings(deadline=None)
def test_the_held_loss_is_bounded_below_on_both_signs(seed: int, strength: float, proximal: float) -> None:
    """By -A² |e|² / (2 lambda), which it reaches at q = A e / lambda; without a hold a bad sample has no bound."""
    _, old, u = velocities(seed, 1)
    advantage = torch.tensor([strength])
    for distance in (0.1, 1.0, 10.0, 1000.0):
        far = old + distance * torch.randn(old.shape, generator=torch.Generator().manual_seed(seed))
        compared = estimators.compare(far, old, u, 1.0)
        loss = held_loss(compared.pull, compared.square, advantage, proximal, 1e9).loss
        least = -(strength**2) * compared.wanted / (2.0 * proximal)
        assert (loss >= least - 1e-4 * (1.0 + least.abs())).all()
    best = old + strength / proximal * (u - old)
    compared = estimators.compare(best, old, u, 1.0)
    loss = held_loss(compared.pull, compared.square, advantage, proximal, 1e9).loss
    torch.testing.assert_close(loss, -(strength**2) * compared.wanted / (2.0 * proximal), rtol=1e-3, atol=1e-5)


def test_without_a_hold_the_log_ratio_of_a_bad_sample_has_no_lower_bound() -> None:
    _, old, u = velocities(3, 1)
    losses = []
    for distance in (1.0, 10.0, 100.0):
        compared = estimators.compare(old + distance * torch.ones_like(old), old, u, 1.0)
        losses.append((compared.pull - 0.5 * compared.square).item())  # -A times this with A = -1
    assert losses[2] < 50 * losses[1] < 0


@pytest.mark.parametrize("proximal", [1.0, 100.0, 10_000.0])
def test_a_large_hold_freezes_the_policy(proximal: float) -> None:
    """Descended to its end, the movement is A e / lambda, also with the clip outside it."""
    _, old, u = velocities(4)
    advantage = torch.tensor([1.0, -2.0, 0.5])
    v = old.clone().requires_grad_()
    optimizer = torch.optim.SGD([v], lr=60.0 / proximal)  # a mean over 120 elements
    for _ in range(200):
        optimizer.zero_grad()
        compared = estimators.compare(v, old, u, 1.0)
        held_loss(compared.pull, compared.square, advantage, proximal, 1e6).loss.sum().backward()
        optimizer.step()
    expected = advantage.view(-1, 1, 1, 1, 1) / proximal * (u - old)
    torch.testing.assert_close(v.detach() - old, expected, rtol=1e-3, atol=1e-6)


def test_the_clip_stops_the_pull_and_leaves_the_hold() -> None:
    v, old, u = velocities(5)
    v = (old + 0.5 * (u - old)).requires_grad_()  # every sample is pulled towards its target
    advantage = torch.tensor([1.0, 2.0, -1.0])
    compared = estimators.compare(v, old, u, 1.0)
    held = held_loss(compared.pull, compared.square, advantage, 2.0, clip_range=1e-3)
    assert held.clipped.tolist() == [True, True, False]  # a bad sample that came closer is pushed back in full
    (gradient,) = torch.autograd.grad(held.loss.sum(), v)
    hold = 2.0 * (v - old).detach() / v[0].numel()
    torch.testing.assert_close(gradient[:2], hold[:2])
    torch.testing.assert_close(gradient[2], hold[2] + (u - old)[2] / v[0].numel())
    away = estimators.compare(2.0 * old - v.detach(), old, u, 1.0)
    assert held_loss(away.pull, away.square, -advantage, 2.0, clip_range=1e-3).clipped.tolist() == [True, True, False]


def test_the_ratio_of_a_held_loss_is_that_of_the_probabilities() -> None:
    v, old, u = velocities(5)
    compared = estimators.compare(v, old, u, 1.0)
    held = held_loss(compared.pull, compared.square, torch.ones(3), 2.0, clip_range=1e-3)
    torch.testing.assert_close(held.ratio, (compared.pull - compared.square / 2.0).exp())


def test_without_a_hold_the_ratio_is_the_published_one() -> None:
    """With the noise of the step as target, <e, q> - |q|²/2 is the difference of the Gaussian log-probs."""
    plan, step = plan_of(10, "flow-sde", 0.7), 4
    on_x, on_velocity, std = step_kernel(plan, step)
    generator = torch.Generator().manual_seed(6)
    x, old, move, noise = (torch.randn(3, 2, 3, 4, 5, generator=generator) for _ in range(4))
    v = old + 0.02 * move
    before, mean = (on_x * x + on_velocity * one for one in (old, v))
    x_next = before + std * noise
    normal = torch.distributions.Normal
    log_ratio = (normal(mean, std).log_prob(x_next) - normal(before, std).log_prob(x_next)).flatten(1).mean(1)
    u = old + (x_next - before) / step_slope(plan, step)
    weight = estimators.step_weight("derived", plan, step, [step])
    compared = estimators.compare(v, old, u, weight)
    torch.testing.assert_close(compared.pull - 0.5 * compared.square, log_ratio, rtol=1e-4, atol=1e-6)
    advantage = torch.tensor([1.0, -1.0, 2.0])
    published = policy_loss(log_ratio, advantage, 1e-3)
    ours = policy_loss(compared.pull - 0.5 * compared.square, advantage, 1e-3)
    torch.testing.assert_close(ours.loss, published.loss, rtol=1e-4, atol=1e-6)
    assert ours.clipped.tolist() == published.clipped.tolist()


@pytest.mark.parametrize("moved", [0.0, 0.4])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_diffusion_nft_is_fresh_noise_with_a_hold(beta: float, moved: float) -> None:
    """Its gradient is twice that of `fresh` with adaptive weights and lambda = c beta, c being train.advantage_clip.

    The authors divide each of the two errors by a scale of its own. At v = v_old both are the adaptive weight. Away
    from there they differ, which changes advantage and hold of a sample: A r+ and lambda r+ below.
    """
    generator = torch.Generator().manual_seed(7)
    x0, noise, old, move = (torch.randn(3, 2, 3, 4, 5, generator=generator) for _ in range(4))
    sigma, limit, advantage = 0.7, 5.0, torch.tensor([1.5, -2.0, 0.3])
    x, u = (1.0 - sigma) * x0 + sigma * noise, noise - x0
    v = (old + moved * move).requires_grad_()
    nft = limit * nft_loss(v, old, x, x0, sigma, nft_optimality(advantage, limit), beta)
    (theirs,) = torch.autograd.grad(nft.sum(), v)

    def scale(mixed: Tensor) -> Tensor:
        return (x - sigma * mixed - x0).abs().flatten(1).mean(1)

    good, bad = (scale(old + side * beta * (v.detach() - old)) for side in (1, -1))
    share = nft_optimality(advantage, limit)
    strength = limit * (share / good - (1.0 - share) / bad)
    hold = limit * beta * (share / good + (1.0 - share) / bad)
    compared = estimators.compare(v, old, u, sigma**2)
    (ours,) = torch.autograd.grad(
        (-strength * compared.pull + 0.5 * hold * compared.square).sum(), v, retain_graph=True
    )
    torch.testing.assert_close(theirs, 2.0 * ours, rtol=1e-4, atol=1e-7)
    if moved == 0.0:
        plain = estimators.compare(v, old, u, estimators.adaptive_weight(old, u, sigma))
        (member,) = torch.autograd.grad(held_loss(*plain[:2], advantage, limit * beta, 1e9).loss.sum(), v)
        torch.testing.assert_close(theirs, 2.0 * member, rtol=1e-4, atol=1e-7)


def test_what_the_mask_leaves_out_neither_pulls_nor_holds() -> None:
    v, old, u = velocities(8)
    mask = torch.ones(1, 1, 3, 1, 1)
    mask[:, :, 0] = 0
    kept = [tensor[:, :, 1:] for tensor in (v, old, u)]
    for found, expected in zip(estimators.compare(v, old, u, 0.5, mask), estimators.compare(*kept, 0.5), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        estimators.adaptive_weight(old, u, 0.4, mask), estimators.adaptive_weight(*kept[1:], 0.4)
    )


def test_weights_of_steps() -> None:
    plan, window = plan_of(10, "dpm-sde-2m", 1.0), [1, 4]
    for step in window:
        scale = gradient_scale("dpm-sde-2m", "exact", plan.sigmas[step], plan.sigmas[step + 1], 1.0, plan.sigmas[1],
                               sigma_previous=plan.sigmas[step - 1])  # fmt: skip
        assert estimators.step_weight("derived", plan, step, window) == pytest.approx(scale**2)
    assert estimators.step_weight("velocity", plan, 1, []) == 1.0
    wrong: list[tuple[Any, Schedule, int]] = [("adaptive", plan, 1), ("derived", replace(plan, law="ode", eta=0.0), 1)]
    for kind, schedule, step in wrong:
        with pytest.raises(ValueError, match=r"one of each sample|deterministic"):
            estimators.step_weight(kind, schedule, step, window)
    with pytest.raises(ValueError, match="not in the window"):
        estimators.gaussian_factor(plan, 2, window)
