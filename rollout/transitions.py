"""One step of the sampler as a Gaussian: mean, std, log-prob of every transition law, and the deterministic solvers.

Rectified flow, as in Wan: x_s = (1-s) x0 + s eps and v = eps - x0, with s falling from 1 to 0. From a state x at s
and a velocity v, the clean latents and the noise are estimated as

    x0_hat = x - s v            eps_hat = x + (1-s) v

and a step from s to s' < s is one formula for every law,

    exact form            mean = (1-s') x0_hat + s' c eps_hat                     std = s' sqrt(1 - c^2)
    Euler-Maruyama form   mean = x - D [v + g^2/(2s) (x + (1-s) v)], D = s - s'   std = g sqrt(D)

A law is a choice of c (`refresh`), or of g (`diffusion`). The two belong together: the noise estimate decays as
dy = -(g^2 / 2u^2) y |du| while the clean estimate stands still, hence c = exp(-1/2 int_{s'}^{s} g(u)^2 / u^2 du).
`std` is always the standard deviation of the whole step, the square root of the step length included.

Where a law divides by 1-s, that is guarded by 1-s >= 1-sigma_1, sigma_1 being the second sigma of the schedule: a
test for s == 1 misses schedulers that begin at 1 - 1e-6. The guard acts on the first step only; sigma_1 >= sigma
turns it off.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from shards.records.schedule import Form, Law

Previous = tuple[torch.Tensor, float]
"""What the two-step laws remember of the step before: its x0_hat, like x, and its sigma."""

_EULER_MARUYAMA_LAWS = ("flow-sde", "dance-sde", "wan-sde")
_HALF_LOG_2PI = math.log(math.sqrt(2 * math.pi))


class Kernel(NamedTuple):
    """Both forms are linear in x and v: mean = on_x * x + on_velocity * v, with one std for all elements."""

    on_x: float
    on_velocity: float
    std: float


def resolve_form(law: Law, form: Form) -> Form:
    """The form in which a law is really computed: `cps` and the DPM laws were published in the exact form only."""
    return form if law in _EULER_MARUYAMA_LAWS else "exact"


def diffusion(law: Law, sigma: float, eta: float, sigma_1: float) -> float:
    """Diffusion coefficient g(s) of the laws that are published as a stochastic differential equation.

    flow-sde    g = eta sqrt(s / (1-s))     Flow-GRPO, with 1-s guarded
    dance-sde   g = eta                     DanceGRPO
    wan-sde     g = eta sigma_1 s           the Wan script of flow_grpo, where eta is 1

    Raises ValueError for a law that has no such form.
    """
    if law == "flow-sde":
        return eta * math.sqrt(sigma / max(1.0 - sigma, 1.0 - sigma_1))
    if law == "dance-sde":
        return eta
    if law == "wan-sde":
        return eta * sigma_1 * sigma
    raise ValueError(f"the law {law!r} has no Euler-Maruyama form")


def refresh(law: Law, sigma: float, sigma_next: float, eta: float, sigma_1: float) -> float:
    """Share c of the noise estimate that a step keeps, 0 <= c <= 1; the rest of the noise is drawn afresh.

    With q = (1-s) s' / (s (1-s')), the ratio of the signal-to-noise ratios at s and s':

    ode          c = 1
    flow-sde     c = q^(eta^2/2)
    dance-sde    c = exp(-eta^2/2 (1/s' - 1/s))
    wan-sde      c = exp(-eta^2 sigma_1^2 / 2 (s - s'))
    cps          c = cos(eta pi/2)          the same at every step, which is why `cps` does not keep the marginals;
                                            cps-unnormalised takes the same steps
    dpm-sde(-2m) c = q^eta                  sde-dpmsolver++; eta 1 is the published solver

    At s' = 0 no noise is left and c is 1. Raises ValueError for an unknown law.
    """
    if law == "ode" or sigma_next == 0 or eta == 0:
        return 1.0
    if law == "flow-sde":
        return math.exp(-0.5 * eta**2 * _log_snr_gain(sigma, sigma_next, sigma_1))
    if law == "dance-sde":
        return math.exp(-0.5 * eta**2 * (1.0 / sigma_next - 1.0 / sigma))
    if law == "wan-sde":
        return math.exp(-0.5 * (eta * sigma_1) ** 2 * (sigma - sigma_next))
    if law in ("cps", "cps-unnormalised"):
        return math.cos(0.5 * math.pi * eta)
    if law in ("dpm-sde", "dpm-sde-2m"):
        return math.exp(-eta * _log_snr_gain(sigma, sigma_next, sigma_1))
    raise ValueError(f"unknown law {law!r}")


def kernel(law: Law, form: Form, sigma: float, sigma_next: float, eta: float, sigma_1: float) -> Kernel:
    """The coefficients of the one formula at the top of this file, in float64. std is 0.0 at s' = 0 and for `ode`."""
    if law == "ode" or sigma_next == 0:
        return Kernel(1.0, sigma_next - sigma, 0.0)
    if resolve_form(law, form) == "euler-maruyama":
        length = sigma - sigma_next
        g = diffusion(law, sigma, eta, sigma_1)
        drift = g**2 / (2 * sigma)
        return Kernel(1.0 - length * drift, -length * (1.0 + drift * (1.0 - sigma)), g * math.sqrt(length))
    c = refresh(law, sigma, sigma_next, eta, sigma_1)
    on_velocity = -sigma * (1.0 - sigma_next) + sigma_next * c * (1.0 - sigma)
    return Kernel(1.0 - sigma_next + sigma_next * c, on_velocity, sigma_next * math.sqrt((1.0 - c) * (1.0 + c)))


def transition(
    law: Law,
    form: Form,
    x: torch.Tensor,
    velocity: torch.Tensor,
    sigma: float,
    sigma_next: float,
    eta: float,
    *,
    sigma_1: float,
    previous: Previous | None = None,
) -> tuple[torch.Tensor, float]:
    """Mean, fp32 and shaped like x, and standard deviation of the state at `sigma_next`.

    x and velocity: any shape, the same for both, latents in model space. Gradients reach the velocity. A step without
    noise returns the Euler step, bit for bit, and 0.0. `previous` is used by `dpm-sde-2m` alone; without it the step
    is of first order, and its tensor is data: no gradient reaches it.
    """
    if law == "ode" or sigma_next == 0 or (eta == 0 and law != "dpm-sde-2m"):
        return euler(x, velocity, sigma, sigma_next), 0.0
    k = kernel(law, form, sigma, sigma_next, eta, sigma_1)
    x, velocity = x.float(), velocity.float()
    mean = k.on_x * x + k.on_velocity * velocity
    if law == "dpm-sde-2m" and previous is not None:
        mean = mean + _second_order(x, velocity, sigma, sigma_next, eta, previous)
    return mean, k.std


def gradient_scale(
    law: Law,
    form: Form,
    sigma: float,
    sigma_next: float,
    eta: float,
    sigma_1: float,
    *,
    sigma_previous: float | None = None,
) -> float:
    """R = |d mean / d velocity| / std of one step: how strongly its log-prob pulls on the model.

    d log_prob / d v = noise * (d mean / d v) / std per element, so steps of one window weigh as their R do.
    `sigma_previous` adds the second-order term of `dpm-sde-2m`. The density of `cps-unnormalised` lacks 1/(2 std^2), so
    its R is 2 std^2 times that of `cps`. Raises ValueError for a step without noise.
    """
    k = kernel(law, form, sigma, sigma_next, eta, sigma_1)
    if k.std == 0:
        raise ValueError(f"no gradient scale from sigma {sigma} to {sigma_next}: the step is deterministic")
    slope = abs(velocity_slope(law, form, sigma, sigma_next, eta, sigma_1, sigma_previous=sigma_previous))
    return slope * (2 * k.std if law == "cps-unnormalised" else 1 / k.std)


def velocity_slope(
    law: Law,
    form: Form,
    sigma: float,
    sigma_next: float,
    eta: float,
    sigma_1: float,
    *,
    sigma_previous: float | None = None,
) -> float:
    """d mean / d velocity of one step: below 0, and s' - s without noise.

    `sigma_previous` adds the second-order term of `dpm-sde-2m`.
    """
    on_velocity = kernel(law, form, sigma, sigma_next, eta, sigma_1).on_velocity
    if law == "dpm-sde-2m" and sigma_previous is not None:
        on_velocity -= sigma * _second_order_weight(sigma, sigma_next, eta, sigma_previous)
    return on_velocity


def log_prob(x_next: torch.Tensor, mean: torch.Tensor, std: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Normalised Gaussian log-density of `x_next` [B, ...], averaged over the latent elements: fp32, [B].

    `x_next` must be the state as it is stored, already rounded to the storage dtype. `mask` broadcasts to x_next; only
    elements where it is true (or not 0) count, such as all but the given first frame of image-to-video. Raises
    ValueError for std 0, which has no density, and for a mask that leaves nothing.
    """
    if not std > 0:
        raise ValueError(f"no log-prob at std {std}: the step is deterministic")
    scale = torch.tensor(std, dtype=torch.float32)
    density = -((x_next.float() - mean.float()) ** 2) / (2 * scale**2) - scale.log() - _HALF_LOG_2PI
    return average(density, mask)


def law_log_prob(
    law: Law, x_next: torch.Tensor, mean: torch.Tensor, std: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """What a law calls the log-prob of a step, fp32 [B]: `log_prob`, but for `cps-unnormalised`."""
    if law == "cps-unnormalised":
        return cps_unnormalised_log_prob(x_next, mean, mask)
    return log_prob(x_next, mean, std, mask)


def cps_unnormalised_log_prob(
    x_next: torch.Tensor, mean: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """-(x' - mean)^2 averaged, fp32 [B]: what the public `cps` codes call a log-prob. For parity runs only.

    It is not a density: it lacks the 1/(2 std^2) that weighs the steps, and a clip range means something else with it.
    """
    return average(-((x_next.float() - mean.float()) ** 2), mask)


def average(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean [B] of values [B, ...] over the latent elements that the mask keeps, for log-probs and losses alike.

    Raises ValueError for a mask that leaves nothing; on a device the mean is NaN then.
    """
    if mask is None:
        return values.flatten(1).mean(1)
    keep = (mask != 0).to(values.device).expand_as(values).flatten(1)
    # a device would have to be waited for at every step; there 0 / 0 is NaN, which neither gate nor update accepts
    if keep.device.type == "cpu" and not bool(keep.any(1).all()):
        raise ValueError("the mask leaves no latent element to average over")
    return torch.where(keep, values.flatten(1), 0.0).sum(1) / keep.sum(1)


def euler(x: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """x + (s' - s) v in fp32: the ODE step, bit for bit that of diffusers' FlowMatchEulerDiscreteScheduler in fp32.

    x and the velocity have one shape, [B,C,F,H,W] or any other. For fp32 sigmas, the difference taken in float64 and
    rounded once to fp32 is the fp32 difference. Product and sum stay two operations: a fused one rounds differently.
    """
    return x.float() + (sigma_next - sigma) * velocity.float()


def dpm_2m(
    x: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float, previous: Previous | None = None
) -> torch.Tensor:
    """DPM-Solver++(2M), midpoint: the Euler step plus a correction from the x0_hat of the step before, fp32 like x.

    x and the velocity have one shape, [B, C, F, H, W] or any other. The first step (no `previous`) and the step to
    s' = 0 are of first order, as in diffusers.
    """
    step = euler(x, velocity, sigma, sigma_next)
    if previous is None or sigma_next == 0:
        return step
    return step + _second_order(x.float(), velocity.float(), sigma, sigma_next, 0.0, previous)


def clean_estimate(x: torch.Tensor, velocity: torch.Tensor, sigma: float) -> torch.Tensor:
    """x0_hat = x - s v, fp32, of the shape of x: what `Previous` carries from one step to the next."""
    return x.float() - sigma * velocity.float()


def noise_seed(run_seed: int, iteration: int, prompt_id: int, sample: int, step: int) -> int:
    """Seed of one noise tensor, 0 <= seed < 2**63, from sha256: any sample can be generated again, alone.

    step -1 is the initial noise; evaluation uses iteration -1. The text that is hashed is part of the shard format.
    """
    text = f"rushes noise {run_seed} {iteration} {prompt_id} {sample} {step}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def noise(shape: Sequence[int], *, seed: int) -> torch.Tensor:
    """Standard normal noise, fp32, always drawn on the CPU so that it does not depend on the device.

    Philox, because torch's CPU generator keeps only 32 bits of a seed: in a long run two noises would be the same.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def noises(shape: Sequence[int], seeds: Iterable[int]) -> torch.Tensor:
    """One noise for each seed, [B, *shape] fp32, on the CPU."""
    return torch.stack([noise(shape, seed=seed) for seed in seeds])


def _log_snr(sigma: float) -> float:
    """lambda(s) = ln((1-s) / s), minus infinity at s = 1."""
    return math.log((1.0 - sigma) / sigma) if sigma < 1.0 else -math.inf


def _log_snr_gain(sigma: float, sigma_next: float, sigma_1: float) -> float:
    """-ln q = int_{s'}^{s} du / (u (1-u)), where 1-u is at least 1-sigma_1.

    Below sigma_1 that is lambda(s') - lambda(s); above, 1-u stands still and the integral is ln(s / s') / (1-sigma_1).
    """
    edge = max(min(sigma, sigma_1), sigma_next)
    below = _log_snr(sigma_next) - _log_snr(edge) if edge > sigma_next else 0.0
    above = math.log(sigma / edge) / (1.0 - sigma_1) if sigma > edge else 0.0
    return below + above


def _second_order_weight(sigma: float, sigma_next: float, eta: float, sigma_previous: float) -> float:
    """1/2 (1-s') (1 - q^(1+eta)) h/h0, with h and h0 the log-SNR gains of this step and of the one before.

    From s_previous = 1 the gain h0 is infinite and the term vanishes. The step to s' = 0 stays of first order.
    """
    if sigma_next == 0:
        return 0.0
    h = _log_snr(sigma_next) - _log_snr(sigma)
    h0 = _log_snr(sigma) - _log_snr(sigma_previous)
    return -0.5 * (1.0 - sigma_next) * math.expm1(-(1.0 + eta) * h) * h / h0


def _second_order(
    x: torch.Tensor, velocity: torch.Tensor, sigma: float, sigma_next: float, eta: float, previous: Previous
) -> torch.Tensor:
    """The term that DPM-Solver++(2M) adds to a first-order step: weight * (x0_hat - x0_hat of the step before)."""
    before, sigma_previous = previous
    weight = _second_order_weight(sigma, sigma_next, eta, sigma_previous)
    return weight * (clean_estimate(x, velocity, sigma) - before.detach().float())
