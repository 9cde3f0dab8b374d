"""Estimators of the policy gradient: which state the model is shown, where its velocity is pulled, how a step weighs.

A sample asks the model for a target velocity u at a state x. With v the velocity of the policy, v_old that of the
policy that sampled, and w the weight of the step,

    e = sqrt(w) (u - v_old)      what the sample asks for
    q = sqrt(w) (v - v_old)      how far the model has moved

and every objective of this package is a loss in <e, q> and |q|² (docs/objectives.md). An estimator is a choice of x, u:

    noise      x = x_k, the stored state      u = v_old + (x_{k+1} - mean_old) / (d mean / d v)    the step's own noise
    endpoint   x = x_k, the stored state      u = (x_k - x0) / s                                   the video's own end
    fresh      x = (1-s) x0 + s eps           u = eps - x0                                         flow matching

`endpoint` is `noise` with the noise of the step integrated out: in the exact form E[x_{k+1} - mean | x_k, x0] is
kappa (x0 - x0_hat) with kappa = (1-s') - s' c (1-s) / s = -(d mean / d v) / s, so that E[u_noise | x_k, x0] is
u_endpoint. That holds where (x_k, x0) is distributed as in the forward process; `gaussian_factor` says how far it is
from that for other laws. `fresh` is the estimator of AWM (arXiv 2509.25050).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from rollout.schedule import step_kernel, step_slope, step_std
from rollout.transitions import average

if TYPE_CHECKING:
    from shards.config import ErrorWeight
    from shards.records.schedule import Schedule


class Compared(NamedTuple):
    """A sample's target against the movement of the model, averaged over latent elements: all [B] fp32."""

    pull: Tensor
    """<e, q>, with gradient."""
    square: Tensor
    """|q|², with gradient."""
    wanted: Tensor
    """|e|², detached."""


def compare(
    velocity: Tensor, old_velocity: Tensor, target: Tensor, weight: float | Tensor, mask: Tensor | None = None
) -> Compared:
    """<e, q>, |q|² and |e|² of velocities [B, C, F, H, W]; `weight` is w, a number or [B]. Gradients reach `velocity`.

    Only latents where `mask` is not 0 count.
    """
    old = old_velocity.detach().float()
    moved, wanted = velocity.float() - old, target.detach().float() - old
    return Compared(
        weight * average(moved * wanted, mask),
        weight * average(moved.square(), mask),
        weight * average(wanted.square(), mask),
    )


def adaptive_weight(old_velocity: Tensor, target: Tensor, sigma: float, mask: Tensor | None = None) -> Tensor:
    """w [B] = s / mean|u - v_old|: errors of x0 over the sample's own mean absolute error (DiffusionNFT, AWM's codes).

    With x0_hat = x - s v an error of x0 is s times one of the velocity, so its square is s² |.|², over s mean|.|.
    """
    error = average((target - old_velocity).detach().float().abs(), mask)
    return sigma / error.clamp_min(1e-5)


def step_weight(kind: ErrorWeight, schedule: Schedule, step: int, window: Collection[int]) -> float:
    """w of a step for the kinds that do not depend on the sample; `window` are all stochastic steps of its group.

    derived      ((d mean / d v) / std)²: <e, q> - |q|²/2 is the log-ratio of the step, in nats per latent element
    calibrated   the same times `gaussian_factor`
    velocity     1: squared errors of the velocity, as in pretraining

    Raises ValueError for `adaptive`, and for a step without noise where the law is asked.
    """
    if kind == "velocity":
        return 1.0
    if kind not in ("derived", "calibrated"):
        raise ValueError(f"the weight {kind!r} is one of each sample")
    std = step_std(schedule, step)
    if std == 0:
        raise ValueError(f"step {step} is deterministic: no law weighs it")
    weight = (step_slope(schedule, step) / std) ** 2
    return weight * gaussian_factor(schedule, step, window) if kind == "calibrated" else weight


def gaussian_factor(schedule: Schedule, step: int, window: Collection[int]) -> float:
    """E[A noise] over E[A kappa (x0 - x0_hat) / std] of a step, for latents N(0, 1) and the velocity that fits them.

    With such data every step is linear, x_{k+1} = m_k x_k + std_k z_k, and by Stein's lemma both expectations are
    E[A'] times a covariance with x0, for every test function A of x0:

        Cov(x0, z_k) = P_{k+1} std_k         Cov(x0, x0 - a_k x_k) = V_N - a_k P_k V_k

    where V_k is the variance of x_k, P_k the product of m_j for j >= k, and x0_hat = a_k x_k. Steps outside `window`
    are Euler steps. The factor tends to 1 for c = q (flow-sde at eta sqrt 2, dpm-sde at eta 1) as steps shrink.
    Raises ValueError for a step outside the window.
    """
    if step not in window:
        raise ValueError(f"step {step} is not in the window {sorted(window)}")
    variances, gains, stds = [1.0], [], []
    for number in range(schedule.steps):
        gain, std = _linear_step(schedule, number, number in window)
        gains.append(gain)
        stds.append(std)
        variances.append(gain**2 * variances[-1] + std**2)
    after = 1.0
    for gain in gains[step + 1 :]:
        after *= gain
    sigma = schedule.sigmas[step]
    clean = (1.0 - sigma) / ((1.0 - sigma) ** 2 + sigma**2)
    residual = variances[-1] - clean * after * gains[step] * variances[step]
    kappa = -step_slope(schedule, step) / sigma
    return after * stds[step] ** 2 / (kappa * residual)


def _linear_step(schedule: Schedule, step: int, stochastic: bool) -> tuple[float, float]:
    """m and std of a step for latents N(0, 1), whose velocity is (2s-1) x / ((1-s)² + s²)."""
    sigma, sigma_next = schedule.sigmas[step], schedule.sigmas[step + 1]
    slope = (2.0 * sigma - 1.0) / ((1.0 - sigma) ** 2 + sigma**2)
    if not stochastic:
        return 1.0 + (sigma_next - sigma) * slope, 0.0
    on_x, on_velocity, std = step_kernel(schedule, step)
    return on_x + on_velocity * slope, std
