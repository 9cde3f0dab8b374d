"""The loss, piece by piece: clipped policy gradient, the hold, RatioNorm, KL, DiffusionNFT, DPO. Pure functions.

A `mask` broadcasts to the latents; only elements where it is not 0 count. It leaves out a given first frame, which is
not the policy's to choose, as the log-prob does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rollout.transitions import average


class PolicyLoss(NamedTuple):
    """What the clipped loss says about each sample of a chunk."""

    loss: Tensor
    """[B] loss of each sample, to be averaged over the samples that count."""
    ratio: Tensor
    """[B] probability ratio, detached."""
    clipped: Tensor
    """[B] bool: the clipped branch is the one in force, so the sample gives no gradient."""


def policy_loss(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> PolicyLoss:
    """Clipped surrogate of PPO on the ratio of *mean* log-probs (Flow-GRPO, arXiv 2505.05470, equation 4).

    `log_ratio` and `advantage` are [B] fp32; a positive advantage pulls the sample closer. With log-probs averaged
    over N latent elements the ratio is the N-th root of the true one, which is why clip ranges are 1e-5 to 1e-3.
    """
    ratio = log_ratio.exp()
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return PolicyLoss(torch.maximum(unclipped, clipped), ratio.detach(), (clipped > unclipped).detach())


def held_loss(pull: Tensor, square: Tensor, advantage: Tensor, proximal: float, clip_range: float) -> PolicyLoss:
    """-A <e, q> + (proximal / 2) |q|², with A <e, q> clipped: a policy gradient with a hold in function space.

    `pull` is <e, q> and `square` |q|² of `estimators.compare`, both [B]. The log-ratio <e, q> - |q|²/2 times -A is
    concave where A < 0: the loss of a bad sample falls without bound as the model moves, in any direction. Here the
    square holds on both signs, and the minimum of one sample lies at q = A e / proximal. It is PPO's penalty form
    (arXiv 1707.06347, section 4) with the KL of a step, |q|²/2, in place of the adaptive KL; `clip_range` limits
    <e, q> from outside: beyond it a sample gives no pull, and the hold alone is left.
    """
    unclipped = -advantage * pull
    clipped = -advantage * pull.clamp(-clip_range, clip_range)
    loss = torch.maximum(unclipped, clipped) + 0.5 * proximal * square
    return PolicyLoss(loss, (pull - 0.5 * square).exp().detach(), (clipped > unclipped).detach())


def clip_advantage(advantage: Tensor, limit: float) -> Tensor:
    """Advantages [B] limited to [-limit, limit] (DanceGRPO, Flow-GRPO: 5)."""
    return advantage.clamp(-limit, limit)


def mean_shift(mean: Tensor, old_mean: Tensor, std: float, mask: Tensor | None = None) -> Tensor:
    """d [B]: root mean square of (mean - old_mean) over the latent elements, in units of `std`.

    It is what clipping really sees: the mean log-ratio of a step is -d²/2 in expectation.
    """
    return _mean_square(mean - old_mean, mask).sqrt() / std


def ratio_norm(log_ratio: Tensor, mean: Tensor, old_mean: Tensor, std: float, mask: Tensor | None = None) -> Tensor:
    """RatioNorm of GRPO-Guard [B] (arXiv 2510.22319): (log-ratio + d²/2) std, the log of the ratio that is clipped.

    With N latent elements a log-ratio is -d²/2 ± d/sqrt(N), where d is the shift of the mean in units of `std`. Adding
    d²/2 takes out the one-sided shift, so that both sides are clipped alike. Times `std` what is left spreads as the
    mean moved, |mean - old_mean| / sqrt(N), whatever the noise of the step is, so that one clip range fits all steps;
    GRPO-Guard has 2e-6 to 4e-6. Its other half, the loss over the length of the step, is the step weight
    inverse-gradient.
    """
    return (log_ratio + _mean_square(mean - old_mean, mask) / (2.0 * std**2)) * std


def kl_divergence(
    kind: Literal["velocity", "transition"],
    *,
    velocity: Tensor,
    reference_velocity: Tensor,
    mean: Tensor,
    reference_mean: Tensor,
    std: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Distance [B] to the reference policy, averaged over latent elements, with its gradient.

    velocity:    |v - v_ref|², the same scale at every step (Flow-GRPO's later choice).
    transition:  |mean - mean_ref|² / (2 std²), the Gaussian KL of one step; small at early steps of a large shift.
    """
    if kind == "velocity":
        return _mean_square(velocity - reference_velocity.detach(), mask)
    return _mean_square(mean - reference_mean.detach(), mask) / (2.0 * std**2)


def step_weights(
    kind: Literal["none", "std", "inverse-gradient"], stds: Mapping[int, float], gradient_scales: Mapping[int, float]
) -> dict[int, float]:
    """Weight of each trained step in the loss, scaled to a mean of 1 over the steps given.

    `stds` is the transition standard deviation of a step and `gradient_scales` how strongly its log-ratio pulls on the
    velocity: R = |dmean/dv| / std, which spans two orders of magnitude over a schedule, and R std under RatioNorm. std:
    weight ~ std, so that noisy steps count more; inverse-gradient: weight ~ 1 / scale, so that every step pulls alike.
    On wan-sde as published that is std / step length, the weight in Flow-GRPO's Wan script, to within an eighth; under
    RatioNorm and flow-sde as published it is 1 / step length, the weight of GRPO-Guard.
    """
    if kind == "none":
        return dict.fromkeys(stds, 1.0)
    raw = dict(stds) if kind == "std" else {step: 1.0 / scale for step, scale in gradient_scales.items()}
    total = math.fsum(raw.values())
    return {step: value * len(raw) / total for step, value in raw.items()}


def nft_optimality(advantage: Tensor, limit: float) -> Tensor:
    """Advantage [B] as the probability in [0, 1] of a good sample (DiffusionNFT): clip(A / limit) / 2 + 1/2."""
    return (advantage / limit).clamp(-1.0, 1.0) / 2.0 + 0.5


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x: Tensor,
    x0: Tensor,
    sigma: float,
    optimality: Tensor,
    beta: float,
    mask: Tensor | None = None,
) -> Tensor:
    """DiffusionNFT's loss [B]: flow matching of an implicit good and an implicit bad policy (arXiv 2509.16117).

    v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v; each predicts x0 as x - sigma v±, and its squared
    error is divided by its own detached mean absolute error, as the authors do. `velocity`, `old_velocity`, `x` (the
    noised latents at `sigma`) and `x0` (the final latents) are [B, C, F, H, W]; `optimality` is [B].
    """
    old = old_velocity.detach()
    good = _adaptive_error(x - sigma * (beta * velocity + (1.0 - beta) * old), x0, mask)
    bad = _adaptive_error(x - sigma * ((1.0 + beta) * old - beta * velocity), x0, mask)
    return (optimality * good + (1.0 - optimality) * bad) / beta


def matching_error(velocity: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Flow matching [B]: mean squared error of velocities [B, C, F, H, W] against `target`."""
    return _mean_square(velocity - target.detach(), mask)


class PairLoss(NamedTuple):
    """What the pairs of a group say of its samples: all [N], detached."""

    push: Tensor
    """d loss / d error of each sample, averaged over its pairs: above 0 for one that should be matched better."""
    loss: Tensor
    """Half of the loss of each pair for either of its samples, averaged over the pairs of the sample."""
    right: Tensor
    """Share of a sample's pairs whose winner the policy has moved to more than to the loser; a tie counts half."""
    wins: Tensor
    """Share of a sample's pairs that it wins."""


def pair_loss(gain: Tensor, winners: Tensor, losers: Tensor, beta: float) -> PairLoss:
    """Diffusion-DPO on flow matching (arXiv 2311.12908, equation 14; for velocities arXiv 2501.13918).

    `gain` [N] is the flow-matching error of each sample of a group less that of the reference policy, at the same
    noise; `winners` and `losers` [P] are indices into it. The loss of a pair is
    -log sigmoid(-beta/2 (gain_w - gain_l)). Samples without a pair have 0 everywhere.
    """
    inside = -0.5 * beta * (gain[winners] - gain[losers]).detach()
    push, loss = 0.5 * beta * torch.sigmoid(-inside), 0.5 * torch.nn.functional.softplus(-inside)
    right = 0.5 + 0.5 * inside.sign()
    one, zero = torch.ones_like(push), torch.zeros_like(gain)
    pairs = zero.index_add(0, winners, one).index_add(0, losers, one).clamp_min(1.0)

    def both(of_winner: Tensor, of_loser: Tensor) -> Tensor:
        return zero.index_add(0, winners, of_winner).index_add(0, losers, of_loser) / pairs

    return PairLoss(both(push, -push), both(loss, loss), both(right, right), both(one, 0.0 * one))


def _adaptive_error(prediction: Tensor, x0: Tensor, mask: Tensor | None) -> Tensor:
    """Mean square error [B] over the detached mean absolute error; the floor keeps a perfect prediction finite."""
    difference = prediction - x0
    scale = average(difference.detach().abs(), mask).clamp_min(1e-5)
    return _mean_square(difference, mask) / scale


def _mean_square(difference: Tensor, mask: Tensor | None) -> Tensor:
    """[B] mean of squares over all but the batch dimension, in fp32."""
    return average(difference.float().square(), mask)
